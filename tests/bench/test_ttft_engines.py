"""The TTFT benchmark with a real, tiny model on the simulated device."""
# ruff: noqa: E402 - the modules under test need the engine, which may be absent

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvtier.bench.sidecar import Sidecar, sidecar
from kvtier.bench.ttft import phases
from kvtier.bench.ttft.model import Model
from kvtier.bench.ttft.phases import Plan, Played, Record
from kvtier.bench.ttft.reload import Reloads
from kvtier.bench.ttft.report import TIERS, problems, summarise
from kvtier.bench.ttft.shapes import TINY, Prompt
from kvtier.cli import main

pytestmark = [pytest.mark.engine, pytest.mark.slow]

DUE = {length: length // TINY.chunk_tokens for length in TINY.lengths}


def plan_in(folder: Path) -> Plan:
    return Plan(TINY, "host", 1, folder, folder / "store")


def settings_in(folder: Path) -> dict[str, str]:
    """A sidecar's, with its arena in a file of the test's."""
    (folder / "arena").mkdir()
    return phases.settings(plan_in(folder)) | {"cpu.directory": str(folder / "arena")}


def nonzero(sources: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in sources.items() if count}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Sidecar]:
    with sidecar(tmp_path, settings_in(tmp_path)) as running:
        yield running


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY, torch.device("cpu"))


@pytest.fixture
def reloads(service: Sidecar, model: Model) -> Iterator[Reloads]:
    with Reloads(model, "host", service.target) as made:
        yield made


def test_what_is_loaded_is_what_was_computed(model: Model, reloads: Reloads) -> None:
    tokens = TINY.token_ids(Prompt(512, 0))
    _, logits = model.compute(tokens)
    computed = model.digest(512)
    assert reloads.store(tokens) == DUE[512]
    for tier in ("load_ram_hits", "load_vram_hits"):
        model.wipe()
        assert model.digest(512) != computed
        before = reloads.counters()
        first = reloads.first_token(tokens)
        assert first.reused_tokens == 512
        assert model.digest(512) == computed
        assert first.logits.equal(logits)
        assert first.token == int(logits.argmax())
        assert nonzero(reloads.settle(before)) == {tier: DUE[512]}


@pytest.mark.parametrize("chunks", [0, 1, DUE[512] - 1])
def test_what_is_not_all_there_is_computed(model: Model, reloads: Reloads, chunks: int) -> None:
    tokens = TINY.token_ids(Prompt(512, chunks))
    _, logits = model.compute(tokens)
    computed = model.digest(512)
    if chunks:
        assert reloads.store(tokens, chunks) == chunks
    model.wipe()
    first = reloads.first_token(tokens)
    assert first.reused_tokens == 0
    assert first.logits.equal(logits)
    assert model.digest(512) == computed


@pytest.mark.parametrize("layer", range(TINY.layout.layers))
def test_every_layer_of_a_prefix_decides_the_answer(model: Model, layer: int) -> None:
    """Else the same answer would prove nothing."""
    tokens = TINY.token_ids(Prompt(512, 0))
    cache, logits = model.compute(tokens)
    answered, computed = model.answer(int(logits.argmax()), cache), model.digest(512)
    model.room.data[layer, :, :, 256] *= -1  # one token
    assert model.digest(512) != computed
    assert not model.forward(model.input_ids(tokens[-1:]), model.cache(512)).equal(logits)
    model.room.data[layer, :, :, :512] *= -1
    cache = model.cache(512)
    first = int(model.forward(model.input_ids(tokens[-1:]), cache).argmax())
    assert model.answer(first, cache) != answered


def test_bits_that_change_on_the_way_are_reported(tmp_path: Path) -> None:
    """What one process stored is spoilt in the arena; what another one loads is then compared."""
    plan = plan_in(tmp_path)
    with sidecar(tmp_path, settings_in(tmp_path)) as service:
        cold = phases.engine(plan, "cold", service.target)
        (file,) = (tmp_path / "arena").glob("*.arena")
        arena = np.memmap(file, np.uint8, "r+")
        arena[3::4] ^= 0x80  # the sign of every number
        spoilt = phases.engine(plan, "ram", service.target)["answers"]
    answers = {phase: well_loaded(cold["answers"], tier) for phase, tier in TIERS.items()}
    answers["cold"] = cold["answers"]
    answers["alone"] = [each | {"at_once": each} for each in cold["answers"]]
    assert problems(Played(cold["facts"], answers, 0), TINY) == []
    answers["ram"] = spoilt
    figures = summarise(Played(cold["facts"], answers, 0), TINY, 0.0).figures
    assert figures["identical"] is False
    assert figures["max_logit_diff"] > 0
    for length in TINY.lengths:
        wrong = f"ram, {length:,} tokens, prompt 1:"
        assert f"{wrong} loaded other KV than was computed" in figures["problems"]
        assert f"{wrong} answers otherwise than the process that computed it" in figures["problems"]


def well_loaded(cold: list[Record], tier: str) -> list[Record]:
    """What an engine says that loads just what was computed."""
    return [
        each
        | {
            "reused_tokens": each["length"],
            "sources": dict.fromkeys(TIERS.values(), 0) | {tier: each["stored_chunks"]},
        }
        for each in cold
    ]


def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    assert main(["bench", "ttft", "--device", "host", "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == []
    assert document["identical"] is True
    assert document["max_logit_diff"] == 0
    assert document["lengths"].keys() == {str(length) for length in TINY.lengths}
    for length, figures in document["lengths"].items():
        for phase, tier in TIERS.items():
            due = dict.fromkeys(TIERS.values(), 0) | {tier: TINY.repeats * DUE[int(length)]}
            assert figures[phase]["sources"] == due
            assert figures[phase]["bytes"] == DUE[int(length)] * TINY.layout.nbytes
            assert figures[phase]["identical"] is True
    assert document["setup"]["device"] == "CPU, simulated device"
    files = sorted(file.name for file in tmp_path.iterdir())
    assert [name.rpartition("-host-")[2] for name in files] == ["ttft.json", "ttft.png"]
    written = json.loads((tmp_path / files[0]).read_text(encoding="utf-8"))
    assert written == document
