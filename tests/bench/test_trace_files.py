"""Files that are traces, and all others: those are refused by the request or line that is wrong."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.bench.trace.read import read_trace
from kvtier.errors import InvalidRequest
from tests.bench.traces import TRACES, Prompt, trace_of


def arrays_of(prompts: list[Prompt]) -> dict[str, Any]:
    trace = trace_of(prompts)
    return {
        "t": trace.times_s,
        "off": trace.starts,
        "blk": trace.chunks.astype(np.int32),
        "parent": trace.first_parents().astype(np.int32),
        "partial": trace.partly.astype(np.uint8),
    }


@settings(max_examples=30)
@given(TRACES)
def test_npz(tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt]) -> None:
    path = tmp_path_factory.mktemp("npz") / "made.npz"
    np.savez_compressed(path, **arrays_of(prompts))
    read, made = read_trace(path), trace_of(prompts)
    assert read.name == "made"
    for name in ("times_s", "starts", "chunks", "partly"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("t", [0.0, 2.0, 1.0], "request 2: t: 1.0 is before"),
        ("t", [0.0, float("nan"), 1.0], "request 1: t: nan"),
        ("t", [0.0, 1.0], "off: 4 numbers for 2 requests"),
        ("t", [0, 1, 2], "t: an array"),
        ("off", [0, 2, 2, 5], "request 1: off: it needs no chunk"),
        ("off", [0, 3, 2, 5], "request 1: off: it needs no chunk"),
        ("off", [0, 2, 4, 6], "off: it must go from 0 to 5"),
        ("blk", [0, 1, 0, 7, 3], "request 1: blk: 7 is not a chunk; there are 4"),
        ("blk", [0, 1, 0, -1, 3], "request 1: blk: -1 is not a chunk"),
        ("blk", [0, 1, 0, 3, 3], "request 1: blk: a chunk is not below its parent"),
        ("partial", np.zeros(3, np.uint8), "partial: 3 flags for 4 chunks"),
        ("parent", np.zeros((2, 2), np.int32), "parent: an array"),
        ("parent", np.array([None] * 4), "parent: an array"),
    ],
)
def test_npz_that_makes_no_sense(tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = tmp_path / "odd.npz"
    arrays = arrays_of([(1, 2), (1, 0), (2,)]) | {name: np.asarray(value)}
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(InvalidRequest, match=message):
        read_trace(path)


def test_npz_without_an_array(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    arrays = arrays_of([(1,)])
    del arrays["parent"]
    np.savez(path, **arrays)
    with pytest.raises(InvalidRequest, match="parent"):
        read_trace(path)


def test_npz_that_claims_more_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, **arrays_of([(1,)]))
    header = io.BytesIO()
    claim = {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["t.npy"] = header.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InvalidRequest, match="more than the file has"):
        read_trace(path)


@given(noise=st.binary(max_size=200), suffix=st.sampled_from(["npz", "jsonl"]))
def test_noise(tmp_path_factory: pytest.TempPathFactory, noise: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"noise.{suffix}"
    path.write_bytes(noise)
    with pytest.raises(InvalidRequest):
        read_trace(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        read_trace(tmp_path / "none.npz")


GOOD = {"timestamp": 1000, "input_length": 900, "output_length": 5, "hash_ids": [7, 9]}


def test_jsonl_of_mooncake(tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    later = {"timestamp": 2500, "input_length": 1536, "output_length": 5, "hash_ids": [7, 8, 1]}
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(later)}\n")
    trace = read_trace(path)
    assert trace.times_s.tolist() == [1.0, 2.5]
    assert trace.chunks.tolist() == [0, 1, 0, 2, 3]
    assert trace.starts.tolist() == [0, 2, 5]
    assert trace.partly.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"timestamp": 999}, "line 2: timestamp: 999 is before the line above it"),
        ({"timestamp": None}, "line 2: timestamp: nothing"),
        ({"timestamp": True}, "line 2: timestamp: True"),
        ({"timestamp": float("nan")}, "line 2: timestamp: nan"),
        ({"input_length": None}, "line 2: input_length: nothing"),
        ({"input_length": 0}, "line 2: input_length: 0"),
        ({"input_length": 1025}, "line 2: input_length: 1025"),
        ({"hash_ids": None}, "line 2: hash_ids: nothing"),
        ({"hash_ids": []}, r"line 2: hash_ids: \[\]"),
        ({"hash_ids": [1.5]}, "line 2: hash_ids"),
        ({"hash_ids": [9, 7]}, "line 2: hash_ids: a chunk follows another one"),
    ],
)
def test_jsonl_that_makes_no_sense(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD | second)}\n")
    with pytest.raises(InvalidRequest, match=message):
        read_trace(path)


@pytest.mark.parametrize("line", ["[1, 2]", "{", "null", "[" * 100_000])
def test_lines_that_are_no_request(tmp_path: Path, line: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        read_trace(path)
