"""How the index grows, at a small size. How large a figure is says nothing here."""

import json

import pytest

from kvtier.bench.index import fill
from kvtier.cli import main


@pytest.mark.parametrize("policy", ["lru", "gix"])
def test_an_index_is_filled_and_found_in(policy: str) -> None:
    figures = fill(1280, policy)
    assert figures["restart_s"] > 0
    assert figures["lookup_us"] > 0


@pytest.mark.slow
def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "index", "--chunks", "10000", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["lookup_to_rpc"] > 0
    assert document["lookup_growth"] == 1
    assert document["chunks"].keys() == {"10000"}


@pytest.mark.parametrize("chunks", ["9999", "-1"])
def test_too_few_are_refused(chunks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "index", "--chunks", chunks]) == 2
    assert "--chunks" in capsys.readouterr().err
