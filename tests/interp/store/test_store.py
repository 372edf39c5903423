"""Extraction to disk: right rows, resumable at any instant, the same bytes, never another run's numbers."""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import build_model, train_tokenizer

from pingscope.interp import ActivationStore, HookedModel, Prompt, UserError, estimate, load_model
from pingscope.interp.model.selection import parse, prompt, role
from pingscope.interp.store import extraction, layer_files
from pingscope.interp.store.extraction import extract

WORDS = "Buy the laptop for my friend and send the invoice to the office".split()


def rows_of(model, n=14):
    """Prompts of 12-60 tokens, labels by turns."""
    return [
        model.render(
            Prompt(f"p{i:02d}", " ".join(WORDS[: 1 + (5 * i) % 13] * (1 + i % 3)), label=("harmful", "benign")[i % 2])
        )
        for i in range(n)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    extract(tiny_model, rows_of(tiny_model), folder, layers="embed,all", token_budget=150)
    return folder


@pytest.mark.parametrize("where", [prompt(), parse("final"), role("instruction", "page") | parse("at:0")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_the_residuals_of_the_index(tiny_model, tmp_path, where, dtype):
    rows = rows_of(tiny_model)
    done = []
    store = extract(
        tiny_model,
        rows,
        tmp_path / "s",
        layers="embed,1,3",
        where=where,
        dtype=dtype,
        token_budget=150,
        progress=done.append,
    )
    assert sum(done) == len(rows) and len(done) > 2
    expected = [(row, p) for row in rows for p, flag in enumerate(where.mask(row)) if flag]
    index = store.index
    assert index.column_names == ["prompt_id", "position", "token_id", "token", "role", "label"]
    assert index["prompt_id"].to_pylist() == [row.id for row, _ in expected]
    assert index["position"].to_pylist() == [p for _, p in expected]
    assert index["token_id"].to_pylist() == [row.ids[p] for row, p in expected]
    assert index["role"].to_pylist() == [row.roles[p] for row, p in expected]
    assert index["label"].to_pylist() == [row.label for row, _ in expected]
    assert index["token"].to_pylist()[0] == tiny_model.tokenizer.decode([expected[0][0].ids[expected[0][1]]])
    assert store.layers == [-1, 1, 3]
    residuals = tiny_model.residuals(rows, "embed,1,3")
    number = {row.id: i for i, row in enumerate(rows)}
    for layer in store.layers:
        wanted = torch.stack([residuals[layer][number[row.id]][p] for row, p in expected])
        found = store.layer(layer)
        assert found.dtype == getattr(torch, dtype) and found.shape == wanted.shape
        assert torch.allclose(found.float(), wanted, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-5)
    cost = estimate(tiny_model, rows, layers="embed,1,3", where=where, dtype=dtype)
    assert cost.tokens == len(index)
    assert cost.bytes == sum(store.layer(layer).nbytes for layer in store.layers)


def test_files_are_readable_without_this_package(finished):
    store = ActivationStore.open(finished)
    assert sorted(p.name for p in (finished / "layers").iterdir()) == sorted(
        ["embed.safetensors", *(f"{l:02d}.safetensors" for l in range(4))]
    )
    for layer in store.layers:
        name = "embed" if layer == -1 else f"{layer:02d}"
        assert torch.equal(load_file(finished / "layers" / f"{name}.safetensors")["resid_post"], store.layer(layer))
    assert pq.read_table(finished / "index.parquet").equals(store.index)


def test_per_prompt_views(tiny_model, finished):
    store, rows = ActivationStore.open(finished), rows_of(tiny_model)
    assert store.prompt_ids == [row.id for row in rows] and store.labels == [row.label for row in rows]
    ids = store.index["prompt_id"].to_pylist()
    for i, row in enumerate(rows):
        assert set(ids[store.rows(row.id)]) == {row.id} and len(ids[store.rows(row.id)]) == len(row)
        assert (store.prompt_index[store.rows(row.id)] == i).all()
    with pytest.raises(UserError, match="'p99'"):
        store.rows("p99")
    with pytest.raises(UserError, match="no layer 7"):
        store.layer(7)


def test_mapped_tensors_do_not_write_through(finished):
    store = ActivationStore.open(finished)
    before = contents(finished)
    store.layer(0).zero_()
    assert contents(finished) == before
    assert store.layer(0).abs().sum() > 0


def test_a_second_run_reads_and_changes_nothing(tiny_model, finished):
    before = contents(finished)
    ran = []
    handle = tiny_model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        extract(tiny_model, rows_of(tiny_model), finished, layers="embed,all", token_budget=16_384)
    finally:
        handle.remove()
    assert contents(finished) == before and not ran


class Interrupted(Exception):
    pass


def interrupt_after(n):
    calls = []

    def progress(_):
        calls.append(1)
        if len(calls) == n:
            raise Interrupted

    return progress


def partial(model, folder, chunks=2):
    with pytest.raises(Interrupted):
        extract(model, rows_of(model), folder, layers="embed,all", token_budget=150, progress=interrupt_after(chunks))


def test_an_interrupted_run_resumes_to_the_same_bytes(tiny_model, finished, tmp_path):
    partial(tiny_model, tmp_path)
    with pytest.raises(UserError, match="unfinished"):
        ActivationStore.open(tmp_path)
    ran = []
    handle = tiny_model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        # another budget would make other batches: the store keeps its own
        extract(tiny_model, rows_of(tiny_model), tmp_path, layers="embed,all", token_budget=999)
    finally:
        handle.remove()
    chunks = len((finished / "chunks.jsonl").read_text().splitlines())
    assert len(ran) == chunks - 2
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize(
    "damage",
    [
        "torn rows",
        "torn journal",
        "lost rows",
        "lost file",
        "short file",
        "lost index",
        "torn index",
        "torn header",
        "no journal",
    ],
)
def test_damage_is_found_and_mended(tiny_model, finished, tmp_path, damage):
    partial(tiny_model, tmp_path, chunks=3)
    layer = tmp_path / "layers" / "02.safetensors"
    raw = bytearray(layer.read_bytes())
    journal = tmp_path / "chunks.jsonl"
    match damage:
        case "torn rows":
            at = len(raw) - raw.rstrip(b"\0").__len__()
            raw[len(raw) - at - 40] ^= 1
            layer.write_bytes(raw)
        case "lost rows":
            layer.write_bytes(raw[:200] + bytes(len(raw) - 200))
        case "lost file":
            layer.unlink()
        case "short file":
            layer.write_bytes(raw[: len(raw) // 2])
        case "torn header":
            layer.write_bytes(bytes(50) + raw[50:])
        case "torn journal":
            journal.write_bytes(journal.read_bytes()[:-30])
        case "no journal":
            journal.unlink()
        case "lost index":
            (tmp_path / "index.parquet").unlink()
        case "torn index":
            (tmp_path / "index.parquet").write_bytes((tmp_path / "index.parquet").read_bytes()[:100])
    extract(tiny_model, rows_of(tiny_model), tmp_path, layers="embed,all", token_budget=150)
    assert contents(tmp_path) == contents(finished)


def test_damage_of_a_finished_store_is_mended_too(tiny_model, finished, tmp_path):
    for name, raw in contents(finished).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    layer = tmp_path / "layers" / "00.safetensors"
    layer.write_bytes(layer.read_bytes()[:-64] + bytes(64))
    (tmp_path / "layers" / "01.safetensors").unlink()
    with pytest.raises(UserError, match=r"01.safetensors: missing or of the wrong size"):
        ActivationStore.open(tmp_path)
    extract(tiny_model, rows_of(tiny_model), tmp_path, layers="embed,all", token_budget=150)
    assert contents(tmp_path) == contents(finished)


def kill_during_extract(model, rows, folder: Path, after_chunks: int, delay: float) -> None:
    """Extract in a forked process; SIGKILL it ``delay`` seconds after so many chunks."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            says = lambda n: os.write(writable, b".")  # noqa: E731
            extract(model, rows, folder, layers="embed,all", token_budget=150, progress=says)
        finally:
            os._exit(0)  # never back into the test runner
    os.close(writable)
    for _ in range(after_chunks):
        assert select.select([readable], [], [], 60)[0] and os.read(readable, 1), "the child stopped by itself"
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(readable)


def test_sigkill_at_any_instant_then_resume(tiny_model, finished, tmp_path):
    rows, unfinished = rows_of(tiny_model), 0
    cases = [(0, 0.0), (0, 0.003), (0, 0.01), (0, 0.03), (1, 0.0), (1, 0.002), (2, 0.004), (3, 0.001), (4, 0.003)]
    for number, (after_chunks, delay) in enumerate(cases):
        folder = tmp_path / str(number)
        kill_during_extract(tiny_model, rows, folder, after_chunks, delay)
        meta = folder / "meta.json"
        unfinished += not meta.exists() or not json.loads(meta.read_text())["complete"]
        extract(tiny_model, rows, folder, layers="embed,all", token_budget=150)
        assert contents(folder) == contents(finished), number
    assert unfinished >= 4, "the kills came too late to test anything"


def test_another_run_is_refused_with_the_field_that_differs(tiny_model, load, finished):
    rows, before = rows_of(tiny_model), contents(finished)

    def again(model=tiny_model, rows=rows, **options):
        extract(model, rows, finished, **({"layers": "embed,all"} | options))

    with pytest.raises(UserError, match="differs in its layers"):
        again(layers="all")
    with pytest.raises(UserError, match="differs in its positions"):
        again(where=parse("final"))
    with pytest.raises(UserError, match="differs in its dtype"):
        again(dtype="bfloat16")
    with pytest.raises(UserError, match="differs in its prompts"):
        again(rows=rows[:-1])
    with pytest.raises(UserError, match="differs in its prompts"):
        again(rows=[*rows[:-1], tiny_model.render(Prompt(rows[-1].id, "Click"))])
    with pytest.raises(UserError, match="differs in its model"):
        again(model=load("qwen2"))
    other = load_model(tiny_model.name, chat_template=tiny_model.tokenizer.chat_template + "{# other #}")
    with pytest.raises(UserError, match="differs in its template"):
        again(model=other)
    assert contents(finished) == before


def test_a_folder_that_is_no_store_is_left_alone(tiny_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        extract(tiny_model, rows_of(tiny_model), tmp_path)
    assert contents(tmp_path)["thesis.tex"] == b"precious"
    with pytest.raises(UserError, match="no activation store"):
        ActivationStore.open(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta.json: not valid JSON"):
        ActivationStore.open(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_with_the_prompt(bad, tmp_path):
    tokenizer = train_tokenizer()
    model = HookedModel(build_model("llama", len(tokenizer)), tokenizer)
    rows = [model.render(Prompt(f"p{i}", text)) for i, text in enumerate(["Buy", "Click 😀 it", "Send the invoice"])]
    poison = next(i for i in rows[1].ids if i not in rows[0].ids + rows[2].ids)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[poison] = bad
    with pytest.raises(UserError, match=r"'p1'.*not finite"):
        extract(model, rows, tmp_path)
    with pytest.raises(UserError, match="unfinished"):
        ActivationStore.open(tmp_path)


def test_two_writers(tiny_model, tmp_path):
    def second(_):
        with pytest.raises(UserError, match="another process is writing"):
            extract(tiny_model, rows_of(tiny_model), tmp_path)

    extract(tiny_model, rows_of(tiny_model), tmp_path, progress=second)


def test_a_full_disk_is_one_line_and_nothing_is_lost(tiny_model, finished, tmp_path):
    size = (finished / "layers" / "00.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(UserError, match=r"disk is full.*free space and run again") as error:
            extract(tiny_model, rows_of(tiny_model), tmp_path, layers="embed,all", token_budget=150)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    extract(tiny_model, rows_of(tiny_model), tmp_path, layers="embed,all", token_budget=150)
    assert contents(tmp_path) == contents(finished)


def short_of_memory(model, monkeypatch, most):
    """Forward passes of more than ``most`` slots fail as a GPU's do; the sizes that ran are returned."""
    ran, read = [], type(model).read

    def limited(batch, *rest):
        if batch.ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        ran.append(batch.ids.numel())
        read(model, batch, *rest)

    monkeypatch.setattr(model, "read", limited)
    return ran


def test_a_store_that_other_code_has_read_is_refused(tiny_model, tmp_path, monkeypatch):
    store = extract(tiny_model, rows_of(tiny_model), tmp_path, layers=[0], token_budget=150)
    assert store.meta["identity"]["code"] == extraction.extraction_code()
    package = shutil.copytree(extraction.PACKAGE, tmp_path / "package" / "interp")
    monkeypatch.setattr(extraction, "PACKAGE", package)
    extraction.extraction_code.cache_clear()
    assert extraction.extraction_code() == store.meta["identity"]["code"]
    (package / "chat" / "messages.py").write_text("# what it renders is in the ids")
    extraction.extraction_code.cache_clear()
    assert extraction.extraction_code() == store.meta["identity"]["code"]
    with (package / "model" / "hooks.py").open("a") as file:
        file.write("MENDED = True\n")
    extraction.extraction_code.cache_clear()
    with pytest.raises(UserError, match="differs in its code"):
        extract(tiny_model, rows_of(tiny_model), tmp_path, layers=[0], token_budget=150)
    monkeypatch.undo()
    extraction.extraction_code.cache_clear()


def test_batches_shrink_when_the_memory_is_short(tiny_model, finished, tmp_path, monkeypatch):
    wanted = ActivationStore.open(finished)
    ran = short_of_memory(tiny_model, monkeypatch, 130)
    with pytest.warns(UserWarning, match="out of memory at 150|out of memory at 14"):
        store = extract(tiny_model, rows_of(tiny_model), tmp_path / "a", layers="embed,all", token_budget=150)
    assert ran and max(ran) <= 130
    assert store.index.equals(wanted.index)
    assert all(torch.allclose(store.layer(l), wanted.layer(l), rtol=1e-5, atol=1e-5) for l in store.layers)
    # Killed on the way, and gone on with more memory: the checksums are of the chunks, however they were run.
    with pytest.raises(Interrupted), pytest.warns(UserWarning, match="out of memory"):
        extract(
            tiny_model, rows_of(tiny_model), tmp_path / "b", layers="embed,all", token_budget=150,
            progress=interrupt_after(3),
        )  # fmt: skip
    monkeypatch.undo()
    before = len(ran)
    extract(tiny_model, rows_of(tiny_model), tmp_path / "b", layers="embed,all", token_budget=150)
    assert len(ran) == before
    reopened = ActivationStore.open(tmp_path / "b")
    assert all(torch.allclose(reopened.layer(l), wanted.layer(l), rtol=1e-5, atol=1e-5) for l in wanted.layers)


def test_a_prompt_too_large_for_the_memory_is_named(tiny_model, tmp_path, monkeypatch):
    rows = rows_of(tiny_model)
    longest = max(rows, key=len)
    short_of_memory(tiny_model, monkeypatch, len(longest) - 1)
    with pytest.raises(UserError, match=f"'{longest.id}': {len(longest)} tokens do not fit"), pytest.warns(UserWarning):
        extract(tiny_model, rows, tmp_path, token_budget=150)


def test_other_runtime_errors_are_not_taken_for_memory(tiny_model, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(tiny_model, "read", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        extract(tiny_model, rows_of(tiny_model), tmp_path)


def test_an_estimate_of_the_time_is_of_the_right_size(tiny_model, tmp_path):
    rows = rows_of(tiny_model, 60)
    cost = estimate(tiny_model, rows, timed=True, token_budget=150)
    start = time.perf_counter()
    extract(tiny_model, rows, tmp_path, token_budget=150)
    taken = time.perf_counter() - start
    assert taken / 10 < cost.seconds < taken * 5  # the run also writes; machines are noisy
    assert estimate(tiny_model, rows).seconds is None


def test_a_second_process_is_refused(tiny_model, finished, tmp_path):
    """While another process holds the store; when it is gone, the run goes on."""
    rows = rows_of(tiny_model)
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with layer_files.locked(tmp_path):
                os.write(writable, b".")
                time.sleep(60)
        finally:
            os._exit(0)
    assert os.read(readable, 1)
    with pytest.raises(UserError, match="another process is writing this store"):
        extract(tiny_model, rows, tmp_path, layers="embed,all", token_budget=150)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    extract(tiny_model, rows, tmp_path, layers="embed,all", token_budget=150)
    assert contents(tmp_path) == contents(finished)


def test_a_model_spread_over_memory_and_disk(tiny_model, finished, checkpoint, tmp_path):
    """Half of the blocks have no weights in memory between passes: identity comes from the checkpoint's files."""
    where = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    where |= {f"model.layers.{l}": "cpu" if l < 2 else "disk" for l in range(4)}
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), device_map=where, offload_folder=tmp_path / "offload"
    )
    spread = HookedModel(hf, tiny_model.tokenizer, name=str(checkpoint("llama")))
    assert any(p.is_meta for p in hf.parameters()) and spread.device.type == "cpu" and not spread.parts_problem
    store = extract(spread, rows_of(spread), tmp_path / "s", layers="embed,all", token_budget=150)
    wanted = ActivationStore.open(finished)
    assert all(torch.equal(store.layer(l), wanted.layer(l)) for l in wanted.layers)
    assert store.meta["identity"]["model"] == spread.fingerprint != tiny_model.fingerprint


def test_bfloat16_weights(checkpoint, tmp_path):
    model = load_model(checkpoint("llama"), dtype="bfloat16")
    rows = rows_of(model)
    store = extract(model, rows, tmp_path, layers="1", dtype="bfloat16")
    alone = torch.cat([model.residuals([row], 1)[1][0] for row in rows])
    assert store.layer(1).dtype == torch.bfloat16
    assert (store.layer(1).float() - alone.float()).abs().max() / alone.float().abs().max() < 5e-2


def test_bad_arguments(tiny_model, tmp_path):
    rows = rows_of(tiny_model)
    for options, words in (
        ({"rows": [*rows, rows[0]]}, "'p00': the id occurs twice"),
        ({"where": role("page")}, "matches no token"),
        ({"dtype": "float16"}, "float16 overflows"),
        ({"layers": "9"}, "no layer 9"),
        ({"rows": [tiny_model.render(Prompt("long", "Buy it " * 400))]}, "'long'"),
        ({"token_budget": 0}, "token budget"),
    ):
        with pytest.raises(UserError, match=words):
            extract(tiny_model, **({"rows": rows, "out_dir": tmp_path / "new"} | options))
    assert not (tmp_path / "new" / "layers").exists()


def test_meta_says_what_the_activations_are_of(tiny_model, finished):
    meta = json.loads((finished / "meta.json").read_text())
    identity = meta["identity"]
    assert identity["model"] == tiny_model.fingerprint and identity["template"] == tiny_model.template_hash
    assert (identity["layers"], identity["positions"], identity["dtype"]) == ([-1, 0, 1, 2, 3], "prompt", "float32")
    assert meta["complete"] and meta["n_prompts"] == 14 and meta["d_model"] == 64


@pytest.mark.parametrize("where", ["prompt", "final", "role:instruction"])
def test_a_finished_store_is_as_it_was_written(tiny_model, tmp_path, where):
    rows = rows_of(tiny_model)
    extract(tiny_model, rows, tmp_path, where=parse(where), token_budget=128).verify()
    for name in ("layers/01.safetensors", "index.parquet", "chunks.jsonl"):
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if name != "chunks.jsonl" else b"")
        with pytest.raises(UserError, match=file.name):
            ActivationStore.open(tmp_path).verify()
        file.write_bytes(whole)
    ActivationStore.open(tmp_path).verify()


def test_a_description_with_a_broken_field_is_refused_by_name(tiny_model, tmp_path):
    extract(tiny_model, rows_of(tiny_model), tmp_path)
    whole = json.loads((tmp_path / "meta.json").read_text())
    for change, said in (
        ({"n_tokens": "9"}, "n_tokens"),
        ({"identity": None}, "field identity"),
        ({"complete": 1}, "complete"),
        ({"identity": whole["identity"] | {"layers": ["a"]}}, "layers"),
    ):
        (tmp_path / "meta.json").write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=said):
            ActivationStore.open(tmp_path)
