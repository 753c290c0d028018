"""The command: folders, signals, and where the results go."""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from kvtier.bench.demo.demo import Progress
from kvtier.bench.demo.model import obtain
from kvtier.bench.vllm.phases import RAM_BYTES, play_all
from kvtier.bench.vllm.plot import plot
from kvtier.bench.vllm.report import summarise
from kvtier.bench.vllm.server import Launch, versions
from kvtier.bench.vllm.tables import tables
from kvtier.bench.vllm.workload import Encode, build

_SHARED_MEMORY = Path("/dev/shm")


def run(out: Path, as_json: bool, engine_python: Path) -> int:
    """Play it all; results go to `out`/vllm.json and vllm.png, vLLM's own words to vllm-engine.log.

    Progress goes to stderr; stdout gets the tables, or with `as_json` the JSON document. Returns 0
    when every answer is right and every prefix that should have been reused was, else 1. Raises
    KvtierError when a step could not be done. Whatever happens, everything started is stopped.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    with _sigterm_unwinds(), _folder(None) as work, _folder(out) as disk:
        python = engine_python.absolute()  # not resolved: it is a link in its environment
        engine_versions = versions(python)
        model = obtain(out / "models", progress)
        workload = build(_tokenizer(model))
        log = out / "vllm-engine.log"
        log.write_bytes(b"")
        launch = Launch(python, model, work, log)
        with _folder(_memory_folder(out)) as memory:
            played = play_all(launch, workload, disk, memory, progress)
    result = summarise(played, workload, engine_versions, progress.elapsed_s)
    document = json.dumps(result, indent=2) + "\n"
    (out / "vllm.json").write_text(document, encoding="utf-8")
    plot(result, out / "vllm.png")
    progress(f"wrote {out / 'vllm.json'} and vllm.png")
    sys.stdout.write(document if as_json else tables(result))
    return 1 if result["problems"] else 0


def _tokenizer(model: Path) -> Encode:
    """The model's tokenizer, as plain text has it."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - needs the `demo` extra

    words = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: words.encode(text, add_special_tokens=False).ids


@contextmanager
def _folder(place: Path | None) -> Iterator[Path]:
    """A folder that is removed in the end; where temporary files go unless `place` is given."""
    folder = Path(tempfile.mkdtemp(prefix="kvtier-vllm-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _memory_folder(otherwise: Path) -> Path:
    """Where the arena lies: shared memory, unless there is too little of it (containers)."""
    needed = RAM_BYTES + RAM_BYTES // 8
    if os.access(_SHARED_MEMORY, os.W_OK) and shutil.disk_usage(_SHARED_MEMORY).free >= needed:
        return _SHARED_MEMORY
    return otherwise


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, so that everything started is stopped."""
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
