"""The demo's run: one document, four engine processes, a sidecar that is restarted and killed.

    transformers alone answers four questions about the document: the reference
    engine A  computes the document's KV, answers, offloads it, and exits
    engine B  answers another question: the prefix comes from RAM
              the sidecar stops and starts again; its files are dropped from the page cache
    engine C  answers another question: the prefix comes from disk
              the sidecar is killed
    engine D  answers all the same

Every answer must be that of the reference, token for token.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from kvtier.bench.demo import report
from kvtier.bench.demo.model import obtain
from kvtier.bench.demo.report import Record, Runs
from kvtier.bench.demo.sidecar import DemoFailed, Sidecar

QUESTIONS = 4
CHUNK_TOKENS = 256
_ENGINE_TIMEOUT_S = 900


def run(out: Path, as_json: bool) -> int:
    """Run the demo; results go to `out`/demo.json and `out`/demo.png.

    Progress goes to stderr; stdout gets the table, or with `as_json` the JSON document. Returns 0
    when every answer is right and every prefix that should have been reused was, else 1. Raises
    KvtierError when a step could not be done. Whatever happens, everything started is stopped.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    with _sigterm_unwinds(), tempfile.TemporaryDirectory(prefix="demo-", dir=out) as work:
        model = obtain(out / "models", progress)
        result = report.summarise(_runs(model, Path(work), progress))
    document = json.dumps(result, indent=2) + "\n"
    (out / "demo.json").write_text(document, encoding="utf-8")
    report.plot(result, out / "demo.png")
    progress(f"wrote {out / 'demo.json'} and demo.png")
    sys.stdout.write(document if as_json else report.table(result))
    return 1 if result["problems"] else 0


class Progress:
    """A line on stderr for each step, with the time since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, step: str) -> None:
        sys.stderr.write(f"[{self.elapsed_s:6.1f} s] {step}\n")
        sys.stderr.flush()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started


def _runs(model: Path, work: Path, progress: Progress) -> Runs:
    """Do all the steps, in their order; `work` is gone afterwards."""
    engines: dict[str, Record] = {}

    def engine(name: str, question: int, *more: str) -> None:
        arguments = ["--question", str(question), "--target", sidecar.target, *more]
        engines[name] = _engine(model, work, name, arguments)[0]

    progress("transformers alone computes every prompt: the reference")
    asked = [str(word) for number in range(QUESTIONS) for word in ("--question", number)]
    reference = _engine(model, work, "reference", asked)
    with Sidecar(work) as sidecar:
        progress("starting the sidecar")
        sidecar.start()
        progress("engine A computes the document, answers and offloads")
        engine("A", 0, "--offload", "--live", "1", "--live", "2")
        progress("engine B, a new process: the prefix comes from RAM")
        engine("B", 1)
        progress("stopping the sidecar and starting it again")
        sidecar.stop()
        sidecar.drop_page_cache()
        sidecar.start()
        progress("engine C: the prefix comes from disk")
        engine("C", 2)
        progress("killing the sidecar")
        sidecar.kill()
        progress("engine D: nobody is there")
        engine("D", 3)
    progress("comparing")
    # summarise() reads the logits while `work` is still there.
    live = {question: work / f"logits-live-{question}.npy" for question in (1, 2)}
    return Runs(reference, engines, live, CHUNK_TOKENS, progress.elapsed_s)


def _engine(model: Path, work: Path, name: str, arguments: Sequence[str]) -> list[Record]:
    """Run one engine process to its end; what it printed. Raises DemoFailed when it failed."""
    command = [
        *(sys.executable, "-m", "kvtier.bench.demo.engine"),
        *("--name", name, "--model", str(model), "--out", str(work), *arguments),
    ]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        # run() kills the process when it is interrupted or late.
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=environ, timeout=_ENGINE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DemoFailed(f"engine {name}: not done after {_ENGINE_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise DemoFailed(
            f"engine {name}: ended with status {done.returncode}; its message is above. "
            "Is the extra installed? pip install 'kvtier[demo]'"
        )
    answers: list[Record] = json.loads(done.stdout)
    return answers


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM end the demo as Ctrl-C does, so that everything started is stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
