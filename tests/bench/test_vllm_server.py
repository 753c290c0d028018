"""The engine's process: a stand-in for vLLM is started, waited for, stopped, and leaves nothing."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from kvtier.bench.vllm import server
from kvtier.bench.vllm.ask import EngineFailed, is_ready
from kvtier.bench.vllm.server import (
    Launch,
    cause,
    command,
    connector,
    engine,
    environment,
    versions,
)

# What stands for vLLM: it serves /health, and has a child and shared memory as vLLM has.
STAND_IN = """
import http.server, multiprocessing.shared_memory, os, pathlib, signal, subprocess, sys
if "--stubborn" in os.environ.get("STAND_IN", ""):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "--broken" in os.environ.get("STAND_IN", ""):
    sys.exit("no such model")
child = subprocess.Popen(["sleep", "600"])
shared = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid} {shared.name}")

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
print("the stand-in serves", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    module = tmp_path / "path" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    folder = tmp_path / "work"
    folder.mkdir()
    log = tmp_path / "log"
    log.write_text("of another\n", encoding="utf-8")
    return Launch(Path(sys.executable), tmp_path / "model", folder, log)


def left_of(launch: Launch) -> list[str]:
    *pids, shared = (launch.folder / "pids").read_text().split()
    return [pid for pid in pids if server._members(int(pid)) or alive(int(pid))] + [
        str(file) for file in [Path("/dev/shm") / shared] if file.exists()
    ]


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_it_serves_inside_the_block_and_is_gone_after_it(launch: Launch) -> None:
    said: list[str] = []
    with engine(launch, None, said.append) as running:
        assert is_ready(running.port)
        assert running.start_s > 0
        assert running.said() == "the stand-in serves\n"
        assert len(left_of(launch)) == 3
    assert left_of(launch) == []
    assert len(said) == 1


def test_one_that_does_not_stop_is_killed(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "--stubborn")
    monkeypatch.setattr(server, "_STOP_S", 0.2)
    with engine(launch, None, lambda _: None) as running:
        pass
    assert running.process.returncode == -signal.SIGKILL
    assert left_of(launch) == []


def test_an_error_in_the_block_stops_it_too(launch: Launch) -> None:
    with pytest.raises(KeyboardInterrupt), engine(launch, None, lambda _: None):
        raise KeyboardInterrupt
    assert left_of(launch) == []


def test_one_that_does_not_start_says_why(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "--broken")
    with (
        pytest.raises(EngineFailed, match=r"did not start \(no such model\)"),
        engine(launch, None, lambda _: None),
    ):
        pytest.fail("it does not serve")


def test_one_that_takes_too_long_is_given_up(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_START_S", -1.0)
    with (
        pytest.raises(EngineFailed, match="does not serve after"),
        engine(launch, None, lambda _: None),
    ):
        pytest.fail("it was not waited for")


def test_the_cause_is_the_first_error() -> None:
    said = (
        "(EngineCore pid=1) WARNING [a.py:1] this can cause `OSError: too many files`\n"
        "(EngineCore pid=1) ERROR [core.py:1510] Traceback\n"
        "(EngineCore pid=1) ERROR [core.py:1510] ValueError: no such model\n"
        "RuntimeError: Engine core initialization failed.\n"
        "a warning\n"
    )
    assert cause(said) == "ValueError: no such model"
    assert cause("killed\n\n") == "killed"
    assert cause("") == "it said nothing"


def test_only_with_kvtier_there_is_a_connector(launch: Launch) -> None:
    assert "--kv-transfer-config" not in command(launch, 1, None)
    words = command(launch, 1, "unix:///s")
    given = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert given == connector("unix:///s")
    assert given["kv_connector_extra_config"]["target"] == "unix:///s"


def test_the_environment_is_the_engines_own(tmp_path: Path) -> None:
    inherited = {"PATH": "/bin", "KVTIER_CONFIG": "x", "VLLM_PORT": "1", "OMP_NUM_THREADS": "99"}
    environ = environment(tmp_path, inherited)
    assert environ["PATH"] == "/bin"
    assert environ["TMPDIR"] == str(tmp_path)
    assert not environ.keys() & {"KVTIER_CONFIG", "VLLM_PORT"}
    cpus = environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")
    assert len(cpus) == int(environ["OMP_NUM_THREADS"])
    assert {int(cpu) for cpu in cpus} <= os.sched_getaffinity(0)


def test_an_environment_without_vllm_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"no vLLM.*No such file.*make vllm-env"):
        versions(tmp_path / "python")
    with pytest.raises(EngineFailed, match=r"no vLLM.*PackageNotFound.*make vllm-env"):
        versions(Path(sys.executable))
