"""A real HTTP server that speaks the chat-completions protocol, with a local model or a script behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def completion(text: str | None, finish: str = "stop", tokens: int = 3) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "local",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens},
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


def model_reply(model: Any, continues: bool = True) -> Reply:
    """Answers of a local model; ``continues``: it goes on from a begun assistant message when asked to."""
    from interp.chat import Prompt
    from interp.generate import generate

    lock = threading.Lock()

    def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        turns = list(request["messages"])
        prefix = None
        if turns[-1]["role"] == "assistant":
            last = turns.pop()
            prefix = last["content"] if continues and request.get("continue_final_message") else None
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
        row = model.render(Prompt("r", turns[-1]["content"], system=system, prefix=prefix))
        with lock:
            (said,) = generate(
                model, [row], max_new_tokens=request["max_tokens"], temperature=request.get("temperature", 0.0),
                seed=request.get("seed") or 0,
            )  # fmt: skip
        return 200, completion(said.text, "stop" if said.finished else "length", len(said.ids) + said.finished)

    return reply
