#!/usr/bin/env python3
"""All that a GPU has to show: its tests, its benchmark, and the one with transformers.

Needs this checkout and an interpreter with the packages; kvtier is not installed. With the device
"host" everything runs on the simulated device: a dry run, in which the GPU's own tests are skipped.
Prints one line for each step; the status is 0 when all went well. Logs go to out/gpu-suite/.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "out" / "gpu-suite"
RESULTS = ROOT / "bench" / "results"
DRY_DEVICE = "host"
# Beside what kvtier always needs; their versions are those of the extras in pyproject.toml.
_ALSO = ("hypothesis", "matplotlib", "pytest", "pytest-asyncio", "torch", "transformers")
_CUPY = "cupy-cuda13x[ctk]>=14"  # or another CUDA's; all of them are imported as cupy
_STEP_TIMEOUT_S, _END_TIMEOUT_S = 1800.0, 120.0
_SHOWN_LINES = 5  # of what a step that failed has said
_DESCRIBE = """
import sys
from kvtier.errors import KvtierError
from kvtier.kernels.devices import open_device
try:
    device = open_device(sys.argv[1])
except KvtierError as error:
    sys.exit(str(error))
print(", ".join(f"{name} {value}" for name, value in device.describe().items()))
device.close()
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step, in a line."""

    ok: bool
    said: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that ended; `log` has its stderr."""

    status: int
    stdout: str
    log: Path

    @property
    def failure(self) -> Outcome:
        lines = self.stdout.splitlines() + self.log.read_text(errors="replace").splitlines()
        shown = "".join(f"\n    {line}" for line in lines[-_SHOWN_LINES:])
        return Outcome(False, f"status {self.status}; its end, the rest is in {self.log}:{shown}")


def main() -> int:
    """Run the suite; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0", metavar="NAME", help='"cuda:N", or "host"')
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go")
    options = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        print(f"gpu: this is Python {sys.version.split()[0]}; name a 3.11 or 3.12 in GPU_PYTHON")
        return 2
    dry = options.device == DRY_DEVICE
    lacking, doubtful = lacks(needs(dry=dry))
    if lacking:
        print(remedy(lacking))
        return 2
    for line in doubtful:
        print(f"gpu: {line}")
    LOGS.mkdir(parents=True, exist_ok=True)
    out = (options.out or (LOGS if dry else RESULTS)).absolute()
    if not step("device", lambda: device_answers(options.device)):
        print("gpu: nothing was measured; without a GPU, GPU_DEVICE=host is a dry run")
        return 1
    good = [
        step("tests", lambda: tests_pass(dry=dry)),
        step("bench gpu", lambda: bench_runs("gpu", options.device, out)),
        step("bench ttft", lambda: bench_runs("ttft", options.device, out)),
    ]
    print(f"gpu: {sum(good)} of {len(good)} steps went well; results are in {out}")
    return 0 if all(good) else 1


def step(name: str, do: Callable[[], Outcome]) -> bool:
    """Run a step, say in a line what came of it, and return whether it went well."""
    start_s = time.monotonic()
    outcome = do()
    verdict = "ok" if outcome.ok else "FAILED"
    print(f"{name:11} {verdict:6} {time.monotonic() - start_s:5.0f} s  {outcome.said}", flush=True)
    return outcome.ok


# ── The steps ────────────────────────────────────────────────────────────────────────────────


def device_answers(device: str) -> Outcome:
    """The device can be opened."""
    finished = run("device", [sys.executable, "-c", _DESCRIBE, device])
    if finished.status:
        return Outcome(False, finished.log.read_text(errors="replace").strip())
    return Outcome(True, finished.stdout.strip())


def tests_pass(*, dry: bool) -> Outcome:
    """Every test for a GPU passes, and but for a dry run some did run."""
    report = LOGS / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}"]
    # Plugins and warnings of other packages there are not what is tested.
    command += ["-p", "pytest_asyncio.plugin", "-W", "default"]
    for ours in ("PytestUnraisableExceptionWarning", "PytestUnhandledThreadExceptionWarning"):
        command += ["-W", f"error::pytest.{ours}"]
    finished = run("tests", [*command, *gpu_test_files()])
    if finished.status or not report.exists():
        return finished.failure
    return judged(report, dry=dry)


def judged(report: Path, *, dry: bool) -> Outcome:
    """What a JUnit report of tests that did not fail is worth."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    reasons = [
        found.get("message", "") for case in cases if (found := case.find("skipped")) is not None
    ]
    ran, said = len(cases) - len(reasons), f"{len(cases) - len(reasons)} passed"
    if reasons:
        said += f", {len(reasons)} skipped ({reasons[0]})"
    return Outcome(ran > 0 or (dry and bool(cases)), said)


def bench_runs(scenario: str, device: str, out: Path) -> Outcome:
    """A benchmark ends well; what it missed is said."""
    command = [sys.executable, "-m", "kvtier", "bench", scenario, "--device", device]
    finished = run(f"bench-{scenario}", [*command, "--json", "--out", str(out)])
    try:
        document = json.loads(finished.stdout)
    except ValueError:
        return finished.failure
    if finished.status:
        return finished.failure
    missed = [f"{name} {document[name]:.3f}" for name in document.get("missed", [])]
    return Outcome(True, f"MISSED: {', '.join(missed)}" if missed else "no target missed")


def gpu_test_files() -> list[str]:
    """The files that have tests for a GPU: others may import what is not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def run(name: str, command: list[str]) -> Finished:
    """Run a command from the checkout, with this interpreter's packages and no settings of ours."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KVTIER_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**kept, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    log = LOGS / f"{name}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        stdout = _ended(process)
    (LOGS / f"{name}.out").write_text(stdout, encoding="utf-8")
    return Finished(process.returncode, stdout, log)


def _ended(process: "subprocess.Popen[str]") -> str:
    """Wait for a process, not for ever; returns its stdout."""
    try:
        return process.communicate(timeout=_STEP_TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # first: a benchmark then stops its service
    try:
        return process.communicate(timeout=_END_TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
    return process.communicate()[0]


# ── What is needed ───────────────────────────────────────────────────────────────────────────


def needs(*, dry: bool) -> list[str]:
    """Requirements of the suite, as pyproject.toml has them."""
    import tomllib  # noqa: PLC0415 - not before Python 3.11, and that is for `main` to say

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    also = {name_of(each): each for each in extras if name_of(each) in _ALSO}
    return [*project["dependencies"], *also.values(), *([] if dry else [_CUPY])]


def lacks(requirements: Iterable[str]) -> tuple[list[str], list[str]]:
    """The requirements that are not there, and a line for each that is there in another version."""
    lacking: list[str] = []
    doubtful: list[str] = []
    for requirement in requirements:
        if requirement == _CUPY:
            lacking += [] if find_spec("cupy") else [requirement]
            continue
        try:
            installed = version(name_of(requirement))
        except PackageNotFoundError:
            lacking.append(requirement)
            continue
        if not _fits(requirement, installed):
            doubtful.append(f"{requirement} is asked for, {installed} is there")
    return lacking, doubtful


def remedy(lacking: list[str]) -> str:
    """How to get what is missing, also where nothing can be fetched."""
    names = shlex.join(lacking)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"gpu: {sys.executable} lacks {', '.join(lacking)}\n"
        f"  {sys.executable} -m pip install {names}\n"
        "Where nothing can be fetched, on another machine of this kind\n"
        f"  pip download --only-binary=:all: --python-version {python} --dest wheels {names}\n"
        "and here\n"
        f"  {sys.executable} -m pip install --no-index --find-links wheels --target site {names}\n"
        "  PYTHONPATH=site make gpu\n"
        "GPU_PYTHON names another interpreter."
    )


def name_of(requirement: str) -> str:
    """The package that a requirement is about."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return found[0]


def _fits(requirement: str, installed: str) -> bool:
    from packaging.requirements import Requirement  # noqa: PLC0415 - pytest brings it

    return Requirement(requirement).specifier.contains(installed, prereleases=True)


if __name__ == "__main__":
    sys.exit(main())
