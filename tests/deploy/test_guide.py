"""What docs/vllm.md and the README tell vLLM's operator is what the connector takes."""

import json
import re
from dataclasses import fields
from enum import Enum
from pathlib import Path

import pytest

from kvtier.connectors.vllm.settings import Settings
from kvtier.connectors.vllm.tally import COUNTS
from tests.deploy.manifests import ROOT, compose

GUIDE = ROOT / "docs" / "vllm.md"
TRANSFER = re.compile(r"--kv-transfer-config '(\{.*?\})'", re.DOTALL)


@pytest.mark.parametrize("path", [GUIDE, ROOT / "README.md"], ids=lambda path: path.name)
def test_the_commands_are_those_of_the_manifests(path: Path) -> None:
    examples = TRANSFER.findall(path.read_text(encoding="utf-8"))
    assert examples
    for example in examples:
        given = json.loads(example)
        Settings.parse(given["kv_connector_extra_config"])
        assert {**given, "kv_connector_extra_config": 0} == {
            **compose().transfer,
            "kv_connector_extra_config": 0,
        }


def test_every_setting_is_told_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: json.loads(default) for name, default in rows}
    defaults = {each.name: getattr(Settings(), each.name) for each in fields(Settings)}
    del defaults["target"]  # depends on the environment
    assert told == {
        name: value.value if isinstance(value, Enum) else value for name, value in defaults.items()
    }


def test_every_metric_is_told() -> None:
    told = re.findall(
        r"^\| `vllm:kvtier_(\w+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(told) == sorted(COUNTS)


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"deploy/[\w.]+", GUIDE.read_text(encoding="utf-8")))
    manifests = {f"deploy/{name}" for name in ("compose.yaml", "kubernetes.yaml")}
    assert manifests < named
    assert all((ROOT / path).is_file() for path in named)
