"""A small chat-completions server for what `transformers serve` cannot do: fail on demand, or continue an answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def completion(
    text: str | None, finish: str = "stop", tokens: int = 3, prompt_tokens: int | None = 1
) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    total = tokens + (prompt_tokens or 0)
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "local",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": total},
    }  # fmt: skip


@contextmanager
def serve(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base URL, requests so far); ``reply(request) -> (status, body)``."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request | {"path": self.path, "key": self.headers.get("Authorization")})
            status, body = reply(request)
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            if status == 429:
                self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def model_reply(model: Any) -> Reply:
    """Answers of a local model that goes on from a begun assistant message when asked to, as vLLM does."""
    from pingscope.interp.chat.rendering import Rendered
    from pingscope.interp.generate.generation import generate

    lock = threading.Lock()

    def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids = model.tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=request.get("add_generation_prompt", True),
            continue_final_message=request.get("continue_final_message", False), return_dict=False,
        )  # fmt: skip
        with lock:
            (said,) = generate(
                model, [Rendered("r", "", tuple(ids), ("header",) * len(ids))], max_new_tokens=request["max_tokens"]
            )
        ending = "stop" if said.finished else "length"
        return 200, completion(said.text, ending, len(said.ids) + said.finished, prompt_tokens=len(ids))

    return reply
