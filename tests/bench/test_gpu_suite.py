"""`make gpu`: what it needs, what each step's end means, and what it does without a GPU."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "gpu_suite.py"
NO_GPU = "cuda:99"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path)
    return module


def finished(suite: ModuleType, status: int, stdout: str) -> object:
    log = suite.LOGS / "step.log"
    log.write_text("Traceback: it broke\n", encoding="utf-8")
    return suite.Finished(status, stdout, log)


# ── What is needed ───────────────────────────────────────────────────────────────────────────


def test_it_needs_what_kvtier_needs_and_what_its_tests_need(suite: ModuleType) -> None:
    names = {suite.name_of(each) for each in suite.needs(dry=True)}
    service = {"grpcio", "grpcio-health-checking", "lmdb", "numpy", "xxhash", "zstandard"}
    assert service | {"pytest", "pytest-asyncio", "torch", "transformers"} <= names
    assert {suite.name_of(each) for each in suite.needs(dry=False)} - names == {"cupy-cuda13x"}


def test_what_is_missing_and_what_is_another_version_is_told_apart(suite: ModuleType) -> None:
    given = ["numpy>=1", "kvtier-imaginary>=3", "pytest<1"]
    missing, doubtful = suite.lacks(given)
    assert missing == ["kvtier-imaginary>=3"]
    assert len(doubtful) == 1
    assert doubtful[0].startswith("pytest<1 is asked for, ")


def test_the_remedy_can_be_pasted(suite: ModuleType) -> None:
    said = suite.remedy(["lmdb>=3", "cupy-cuda13x[ctk]>=14"])
    assert f"{sys.executable} -m pip install 'lmdb>=3' 'cupy-cuda13x[ctk]>=14'\n" in said
    assert "PYTHONPATH=site make gpu" in said


def test_only_files_with_tests_for_a_gpu_are_imported(suite: ModuleType) -> None:
    files = [Path(file).name for file in suite.gpu_test_files()]
    assert "test_cuda.py" in files
    assert "test_manifests.py" not in files


# ── What a step's end means ──────────────────────────────────────────────────────────────────


CASE = '<testcase name="a">{}</testcase>'
SKIPPED = CASE.format('<skipped message="no NVIDIA driver"/>')
PASSED = CASE.format("")


@pytest.mark.parametrize(
    ("cases", "dry", "ok", "said"),
    [
        (PASSED * 2 + SKIPPED, False, True, "2 passed, 1 skipped (no NVIDIA driver)"),
        (SKIPPED * 3, False, False, "0 passed, 3 skipped (no NVIDIA driver)"),
        (SKIPPED * 3, True, True, "0 passed, 3 skipped (no NVIDIA driver)"),
        ("", True, False, "0 passed"),
    ],
)
def test_tests_that_were_all_skipped_prove_nothing(
    suite: ModuleType, tmp_path: Path, cases: str, dry: bool, ok: bool, said: str
) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    assert suite.judged(report, dry=dry) == suite.Outcome(ok, said)


@pytest.mark.parametrize(
    ("status", "document", "ok", "said"),
    [
        (0, {"missed": [], "a": 1.0}, True, "no target missed"),
        (0, {"missed": ["a"], "a": 0.5}, True, "MISSED: a 0.500"),
        (1, {"missed": []}, False, "status 1"),
    ],
)
def test_a_benchmark_says_what_it_missed_and_fails_by_its_status(
    suite: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    document: dict[str, object],
    ok: bool,
    said: str,
) -> None:
    end = finished(suite, status, json.dumps(document))
    monkeypatch.setattr(suite, "run", lambda name, command: end)
    outcome = suite.bench_runs("gpu", "host", suite.LOGS)
    assert outcome.ok is ok
    assert outcome.said.startswith(said)


def test_a_benchmark_that_breaks_shows_its_end(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = finished(suite, 1, "")
    monkeypatch.setattr(suite, "run", lambda name, command: end)
    outcome = suite.bench_runs("gpu", "host", suite.LOGS)
    assert not outcome.ok
    assert "it broke" in outcome.said


# ── Without a GPU ────────────────────────────────────────────────────────────────────────────


def test_the_simulated_device_answers(suite: ModuleType) -> None:
    assert suite.device_answers("host") == suite.Outcome(True, "model host")


def test_without_a_gpu_it_says_so_and_measures_nothing(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--device", NO_GPU])
    monkeypatch.setattr(suite, "lacks", lambda requirements: ([], []))
    assert suite.main() == 1
    device, end = capsys.readouterr().out.splitlines()
    assert device.startswith("device      FAILED")
    assert NO_GPU in device
    assert "nothing was measured" in end


def test_with_packages_missing_it_begins_nothing(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py"])
    monkeypatch.setattr(suite, "lacks", lambda requirements: (["lmdb>=3"], []))
    assert suite.main() == 2
    assert "lacks lmdb>=3" in capsys.readouterr().out


@pytest.mark.parametrize("worse", ["tests", "bench gpu", "bench ttft"])
def test_one_step_that_fails_fails_the_suite(
    suite: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    worse: str,
) -> None:
    def outcome(name: str) -> object:
        return suite.Outcome(name != worse, "said")

    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--device", "host"])
    monkeypatch.setattr(suite, "lacks", lambda requirements: ([], []))
    monkeypatch.setattr(suite, "device_answers", lambda device: outcome("device"))
    monkeypatch.setattr(suite, "tests_pass", lambda *, dry: outcome("tests"))
    monkeypatch.setattr(suite, "bench_runs", lambda which, *_: outcome(f"bench {which}"))
    assert suite.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-4] for line in lines[1:4] if worse in line] == ["FAILED"]
    assert lines[-1].startswith("gpu: 2 of 3 steps went well")
