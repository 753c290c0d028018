"""What a GPU is measured by, on the simulated device: wrong bytes show, figures are right."""

import json
import threading
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.bench import gpu
from kvtier.bench.gpu import command, copies, crossing, decoding, hits, paged_kernels, served
from kvtier.bench.gpu.blocks import Blocks
from kvtier.bench.gpu.scale import DRY, FULL, Scale
from kvtier.bench.payload import WrongBytes
from kvtier.bench.report import Report
from kvtier.cli import main
from kvtier.kernels.device import DeviceError, Span, Stream
from kvtier.kernels.host import HostDevice
from tests.contracts.device import need_kernels


@pytest.fixture
def kernels() -> None:
    need_kernels(HostDevice())


runs_kernels = pytest.mark.usefixtures("kernels")


# ── Each measurement ─────────────────────────────────────────────────────────────────────────


def test_copies_are_compared_by_size_way_and_urgency() -> None:
    figures = copies.measure("host", DRY)
    assert figures["copies"].keys() == {"16.0 KiB", "64.0 KiB"}
    ratios = []
    for size in figures["copies"].values():
        assert size["bare"].keys() == {"up_gb_s", "down_gb_s", "both_gb_s", "both_gain"}
        ratios += [size[lane][way] for lane in ("loads", "offloads") for way in copies.WAYS]
    assert figures["copies_ratio"] == min(ratios) > 0


@runs_kernels
def test_kernels_are_compared_by_layout() -> None:
    figures = paged_kernels.measure("host", DRY)
    each = figures["kernels"]
    assert each.keys() == {"nhd", "hnd", "mla"}
    for way in ("gather_ratio", "scatter_ratio"):
        assert figures[way] == min(one[way] for one in each.values()) > 0


@runs_kernels
def test_staging_is_compared_by_size() -> None:
    figures = crossing.measure("host", DRY)
    assert figures["staging"]["gain"].keys() == {"4.0 KiB", "16.0 KiB", "64.0 KiB"}
    assert figures["least_copy_bytes"] in {None, *DRY.parts}


@runs_kernels
@pytest.mark.slow
def test_hits_are_compared_by_the_chunks_of_a_prompt() -> None:
    figures = hits.measure("host", DRY)
    assert figures["hits"]["vram"].keys() == {"2", "4"}
    assert figures["vram_hit_ratio"] == figures["hits"]["vram"]["4"]["ratio"] > 0
    assert figures["ram_hit_ratio"] == figures["hits"]["ram"]["2"]["ratio"] > 0


@runs_kernels
@pytest.mark.slow
def test_decoding_is_compared_by_what_goes_on_beside_it() -> None:
    figures = decoding.measure("host", DRY)
    each = figures["decode"]
    assert each.keys() == {*decoding.PACINGS, "engine", "step_ms_alone"}
    assert figures["decode_slowdown_engine_percent"] == each["engine"]["slowdown_percent"]
    assert figures["decode_slowdown_percent"] == each["paced"]["slowdown_percent"]


# ── Wrong bytes ──────────────────────────────────────────────────────────────────────────────


class Idle(HostDevice):
    """Takes kernels for done that never ran."""

    def launch(self, stream: Stream, kernel: str, threads: int, job: bytes) -> None:
        return


class Forgotten(HostDevice):
    """Takes the first bytes of what the lanes of a bus copy for done."""

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        of_bus = threading.current_thread().name.startswith(("kvtier-up-", "kvtier-down-"))
        super().copy(stream, [pair for pair in pairs if pair[0].offset or not of_bus])


@pytest.mark.parametrize(
    ("measurement", "device"),
    [
        (copies, Forgotten),
        (paged_kernels, Idle),
        (crossing, Idle),
        pytest.param(hits, Idle, marks=pytest.mark.slow),
        pytest.param(decoding, Forgotten, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2],
)
@runs_kernels
def test_wrong_bytes_cost_a_measurement_its_figures(
    measurement: ModuleType, device: type[HostDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = served if measurement in (hits, decoding) else measurement
    monkeypatch.setattr(opener, "open_device", lambda name: device())
    with pytest.raises(WrongBytes):
        measurement.measure("host", DRY)


def test_blocks_know_where_their_contents_belong() -> None:
    style, device = DRY.styles["hnd"], HostDevice()
    blocks = Blocks(device, style, 3 * style.blocks_per_chunk)
    every, swapped = blocks.tables(3, seed=1), blocks.tables(3, seed=2)
    blocks.fill()
    blocks.check(every, every)
    with pytest.raises(WrongBytes):
        blocks.check(every, swapped)
    with pytest.raises(WrongBytes):  # the third chunk's blocks are not poison
        blocks.check(every[:2], every[:2])
    blocks.wipe()
    with pytest.raises(WrongBytes):
        blocks.check(every[:1], every[:1])
    device.close()


# ── Figures ──────────────────────────────────────────────────────────────────────────────────


def test_both_directions_at_once_gain_what_neither_loses() -> None:
    seconds = {"up": [1.0, 2.0, 1.0], "down": [1.0, 2.0, 3.0], "both": [1.0, 4.0, 1.0]}
    assert copies.gain(seconds) == 2.0  # of 2, 1 and 4


def test_a_slowdown_is_of_neighbours() -> None:
    alone, beside = [1.0, 2.0, 4.0], [1.5, 2.2, 4.0]
    assert decoding.slowdown_percent(alone, beside) == pytest.approx(10)  # of 50, 10 and 0


@given(st.dictionaries(st.integers(1, 1 << 22), st.floats(0.5, 2.0), min_size=1))
def test_from_the_crossing_on_staging_is_as_fast(gains: dict[int, float]) -> None:
    found = crossing.crossing(gains)
    slow = [size for size, gain in gains.items() if gain < 0.97]
    if found is None:
        assert max(gains) in slow
    else:
        assert found in gains
        assert not any(size >= found for size in slow)
        assert max((size for size in gains if size < found), default=None) in {None, *slow}


@pytest.mark.parametrize("scale", [DRY, FULL], ids=["dry", "full"])
def test_sizes_are_what_they_say(scale: Scale) -> None:
    for part in scale.parts:
        layout = crossing.layout_of(part, layers=3)
        assert layout.nbytes == 3 * part
    assert all(scale.copy_bytes % chunk == 0 for chunk in scale.copy_chunks)


# ── The report ───────────────────────────────────────────────────────────────────────────────


def quick(monkeypatch: pytest.MonkeyPatch, **others: Callable[..., dict[str, Any]]) -> None:
    """Only the quickest measurement, and others in place of the rest."""
    monkeypatch.setattr(command, "MEASUREMENTS", {"copies": copies.measure, **others})


def test_a_dry_run_says_so_and_leaves_a_file_where_it_is_told_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    arguments = ["bench", "gpu", "--device", "host", "--json"]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert file.name.endswith("-host-gpu.json")
    assert file.read_text(encoding="utf-8") == capsys.readouterr().out
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["scenario"] == "gpu"
    assert document["setup"] == {"device": "host", "model": "host"}
    assert document["targets"] == {}
    assert document["copies_ratio"] > 0
    assert document["machine"]["versions"]["kvtier"]
    assert file.name.startswith(document["date"][:10])


def test_figures_of_a_gpu_are_kept_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Path | None] = []

    def measure(name: str, folder: Path | None, *, as_json: bool) -> int:
        kept.append(folder)
        return 0

    monkeypatch.setattr(command, "measure", measure)
    for device in ("cuda:0", "host"):
        assert gpu.run(Namespace(device=device, out=None, json=True)) == 0
    assert kept == [Path("bench/results"), None]


def test_a_measurement_that_fails_costs_no_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, scale: Scale) -> dict[str, Any]:
        raise DeviceError("out of luck")

    quick(monkeypatch, kernels=broken)
    assert main(["bench", "gpu", "--device", "host", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["failed"] == {"kernels": "DeviceError: out of luck"}
    assert document["copies_ratio"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--device", "cuda:99"], "cuda:99"), (["--device", "tpu:0"], 'name one such as "cuda:0"')],
)
def test_a_device_that_is_not_there_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_misses_its_target_is_named() -> None:
    met = {
        "copies_ratio": 0.96,
        "copies_both_gain": None,  # the bus cannot
        "gather_ratio": 0.85,
        "vram_hit_ratio": 0.9,
        "decode_slowdown_percent": 4.0,
    }
    missed = {"scatter_ratio": 0.84}
    assert Report("gpu", met | missed, {}, command.TARGETS).missed == ["scatter_ratio"]
    slow = met | {"decode_slowdown_percent": 11.0}
    assert Report("gpu", slow, {}, command.TARGETS).missed == ["decode_slowdown_percent"]


def test_a_file_is_named_by_day_and_model() -> None:
    name = command.file_name(date(2026, 5, 7), "NVIDIA H100 80GB HBM3")
    assert name == "2026-05-07-nvidia-h100-80gb-hbm3-gpu.json"
