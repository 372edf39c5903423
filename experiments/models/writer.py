"""The writer: a small language model that answers the prefix search's question, for searches without a network.

    python -m pingscope.experiments.models.writer runs/writer
    pingscope search --model M --tasks T --generator hf:runs/writer

It is to the search's generator what the organism is to its agent: a model small enough to train here that goes the way
of a real one (a chat template, a question, an answer in free text, sampled lines of which some are unusable). What it
is taught, and why it can know of no score, is in :mod:`pingscope.experiments.models.writer_texts`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pingscope.experiments.models.organism.mixes import Document
from pingscope.experiments.models.organism.recipe import Recipe
from pingscope.experiments.models.organism.train import recipe_key
from pingscope.experiments.models.writer_quality import measure_proposals, print_proposals
from pingscope.experiments.models.writer_texts import documents, question_pieces
from pingscope.experiments.run.memory import freed_memory_kept
from pingscope.experiments.run.progress import bar, hide_weight_bars, say
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json
from pingscope.steering.ping import DEFAULT

RECORD = "writer.json"
# The organism's shape, and its training from scratch; only the fields of model and base play a part.
RECIPE = replace(Recipe(), vocab_size=1000, base_steps=400, batch_size=16, warmup=20, threads=1)
MEASURED = 8  # searches without scores that its answers are measured on

Progress = Callable[[int, int, str], None]  # done, total, info


def writer_key(recipe: Recipe, seed: int) -> str:
    """Hash of everything the weights depend on: recipe, seed, packages, the code, and what it is taught."""
    taught = [asdict(document) for document in documents(100, seed)]
    return sha256_of([recipe_key(recipe, seed), hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), taught])


def build_writer(
    out: str | Path, *, seed: int = 0, recipe: Recipe = RECIPE, progress: Progress | None = None
) -> dict[str, Any]:
    """Train the writer into the model folder ``out``, or leave the one that the same recipe and seed made there.

    The folder appears whole or not at all. Returns its record (``key``, ``seed``, ``seconds``, ``losses``).

    Raises:
        UserError: ``out`` holds something that was not built here, or the disk refuses.
    """
    out = Path(out)
    key = writer_key(recipe, seed)
    if (out / RECORD).exists():
        record = read_json(out / RECORD)
        if record.get("key") == key and (out / "config.json").exists():
            return record
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and was not built here; choose another folder")

    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    started = time.monotonic()
    try:
        with torch.random.fork_rng(devices=[]), freed_memory_kept():
            model, tokenizer, losses = train_writer(recipe, seed, progress or (lambda done, total, info: None))
        record = {"key": key, "seed": seed, "seconds": time.monotonic() - started, "losses": losses}
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / RECORD, record)
            temporary.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{out}: cannot write the writer ({error.strerror}); choose another folder") from error
    finally:
        torch.set_num_threads(threads)
    return record


def train_writer(recipe: Recipe, seed: int, progress: Progress) -> tuple[Any, Any, list[float]]:
    """``(model, tokenizer, losses)``; the same for a seed and thread count."""
    from pingscope.experiments.models.organism.base import train_from_scratch
    from pingscope.experiments.models.organism.tokenizer import train_tokenizer

    texts: list[Document] = list(documents(recipe.base_steps * recipe.batch_size, seed))
    sample = (text.prompt + text.answer for text in texts[:2000])
    tokenizer = train_tokenizer(sample, recipe.vocab_size, recipe.context_length)
    tokenizer.add_tokens(question_pieces())
    model, losses = train_from_scratch(recipe, seed, tokenizer, texts, progress)
    return model, tokenizer, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="model folder to make")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    hide_weight_bars()
    try:
        with bar("writer", RECIPE.base_steps) as advance:
            seen = 0

            def moved(done: int, total: int, info: str) -> None:
                nonlocal seen
                advance(done - seen, info=info)
                seen = done

            record = build_writer(given.out, seed=given.seed, progress=moved)
        say(f"writer: {given.out} (trained in {record['seconds']:.0f} s)")
        from pingscope.interp.loading import load_model
        from pingscope.steering.generators import local_ask

        ask = local_ask(load_model(given.out))
        with bar("its answers", MEASURED * DEFAULT.T) as advance:
            print_proposals(measure_proposals(ask, searches=MEASURED, progress=advance))
    except UserError as error:
        say(f"error: {error}")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
