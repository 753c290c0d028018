"""The command line, as its users meet it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.cli import main
from kvtier.config import load
from kvtier.version import __version__
from tests.sidecar import Sidecar

Capture = pytest.CaptureFixture[str]


def test_version_is_the_packages(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"kvtier {__version__}\n"
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    assert f'version = "{__version__}"' in pyproject.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "command",
    ["", "serve", "stats", "demo", "vllm", "bench"]
    + [f"bench {name}" for name in ("transfer", "lookup", "disk", "gpu", "ttft", "trace", "index")],
)
def test_every_command_explains_itself(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert f"usage: kvtier {command}".rstrip() in capsys.readouterr().out


def test_the_printed_configuration_is_the_effective_one(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTIER_CPU_CAPACITY", "3GiB")
    arguments = [
        "serve",
        "--print-config",
        "--listen",
        "127.0.0.1:7777",
        "--set",
        "disk.capacity=1GiB",
    ]
    assert main(arguments) == 0
    path = tmp_path / "printed.toml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    config = load(path, {}, [])
    assert config.server.listen == "127.0.0.1:7777"
    assert (config.cpu.capacity, config.disk.capacity) == (3 << 30, 1 << 30)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("cpu.capacity=lots", "cpu.capacity"),
        ("cpu.colour=red", "colour"),
        ("server.listen=0.0.0.0:7777", "server.listen"),
    ],
)
def test_a_bad_setting_is_one_line(argument: str, named: str, capsys: Capture) -> None:
    assert main(["serve", "--print-config", "--set", argument]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("kvtier: ")
    assert named in error
    assert "allowed" in error


def test_stats_without_a_service_says_where_it_looked(tmp_path: Path, capsys: Capture) -> None:
    target = f"unix://{tmp_path}/none.sock"
    assert main(["stats", "--target", target]) == 2
    assert target in capsys.readouterr().err


def test_stats_of_a_service(tmp_path: Path, capsys: Capture) -> None:
    with Sidecar(tmp_path) as sidecar:
        assert main(["stats", "--target", sidecar.target, "--json"]) == 0
        stats = json.loads(capsys.readouterr().out)
        assert main(["stats", "--target", sidecar.target]) == 0
    assert stats["version"] == __version__
    assert [tier["name"] for tier in stats["tiers"]] == ["cpu", "disk"]
    printed = capsys.readouterr().out
    assert "cpu" in printed
    assert "MiB" in printed


def test_the_curve_of_a_service(tmp_path: Path, capsys: Capture) -> None:
    drawn = tmp_path / "curve.svg"
    with Sidecar(tmp_path) as sidecar:
        assert main(["stats", "--curve", "--target", sidecar.target, "--json"]) == 0
        curves = json.loads(capsys.readouterr().out)
        asked = ["stats", "--curve", "--target", sidecar.target, "--plot", str(drawn)]
        assert main(asked) == 0
        printed = capsys.readouterr().out
        assert main([*asked[:-1], str(tmp_path / "curve.txt")]) == 2
    assert isinstance(curves, list)
    assert "yet" in printed, "nobody has asked for anything"
    assert drawn.stat().st_size > 0
    assert "--plot" in capsys.readouterr().err


def test_stats_needs_no_more_than_a_client(tmp_path: Path) -> None:
    """As in an engine's image: without what only the service and the benchmarks need."""
    blocked = ["grpc_health", "grpc_reflection", "kvtier.bench", "kvtier.service", "lmdb", "torch"]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from kvtier.cli import main\n"
        f"sys.exit(main(['stats', '--target', 'unix://{tmp_path}/none.sock']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "no kvtier service answers" in done.stderr) == (2, True), done.stderr
