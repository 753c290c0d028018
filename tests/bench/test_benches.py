"""Each benchmark runs at a small size, and says what it promises.

How large a figure is says nothing here: other work may be running on the machine.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli import main


def _bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["scenario"] == arguments[0]
    assert document["machine"]["cpus"] >= 1
    assert document["machine"]["versions"]["kvtier"]
    assert document["date"]
    return document


@pytest.mark.slow
@pytest.mark.parametrize("path", ["shm", "inline"])
def test_transfer(capsys: pytest.CaptureFixture[str], path: str) -> None:
    size = ("--chunk-mib", "0.25", "--batch", "3", "--rounds", "2")
    document = _bench(capsys, "transfer", "--path", path, *size)
    assert document["offload_ratio"] > 0
    assert document["load_ratio"] > 0
    assert document["setup"]["chunk_bytes"] == 256 << 10


@pytest.mark.slow
def test_lookup(capsys: pytest.CaptureFixture[str]) -> None:
    document = _bench(capsys, "lookup", "--tokens", "1024", "--calls", "5", "--seconds", "0.2")
    for name in ("lookup_ms_p50", "unary_ms_p50", "ratio"):
        assert document[name] > 0
    assert document["lookups_per_s"].keys() == {"1", "4"}
    assert all(rate > 0 for rate in document["lookups_per_s"].values())


@pytest.mark.slow
def test_disk(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    size = ("--chunk-mib", "0.25", "--batch", "3", "--rounds", "1", "--chunks", "300")
    document = _bench(capsys, "disk", *size, "--directory", str(tmp_path))
    names = ("load_warm_ratio", "restart_s", "resident_mib_100k", "start_s")
    for name in names:
        assert document[name] > 0
    # None where the file system does not let its page cache go.
    assert document["load_cold_ratio"] is None or document["load_cold_ratio"] > 0
    assert document["by_compression"].keys() == {"byteplane", "none"}
    assert not list(tmp_path.iterdir())
