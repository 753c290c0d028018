"""Configuration: what wins, what is refused and how, and that writing it loses nothing."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.config import MAX_FILE_BYTES, SCHEMA, Config, format_bytes, load, parse_bytes
from kvtier.errors import ConfigError
from kvtier.sections import Cpu, Disk, Gpu, Limits, Retention, Server

MIB = 2**20
GIB = 2**30
HOME = {"HOME": "/home/someone"}


def load_text(text: str, environ: Mapping[str, str] = HOME, *overrides: str) -> Config:
    """Load a configuration file with this text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kvtier.toml"
        path.write_text(text, encoding="utf-8")
        return load(path, environ, overrides)


def refusal(
    text: str = "", environ: Mapping[str, str] = HOME, overrides: Sequence[str] = ()
) -> str:
    """The message with which this configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_text(text, environ, *overrides)
    return str(caught.value)


# ── Where values come from ──


def test_defaults_need_no_file() -> None:
    config = load(None, HOME, [])
    assert config.cpu == Cpu(directory=Path("/dev/shm"), capacity=GIB)
    assert config.disk.directory == Path("/home/someone/.cache/kvtier")
    assert config.disk.compression == "none"
    assert config.limits == Limits()
    assert config.retention == Retention(ttl_s=0.0)


def test_default_places_follow_the_environment() -> None:
    places = {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_CACHE_HOME": "/cache"}
    config = load(None, places, [])
    assert config.server.listen == "unix:///run/user/7/kvtier.sock"
    assert config.disk.directory == Path("/cache/kvtier")


def test_default_socket_is_private_to_the_user_without_a_runtime_directory() -> None:
    listen = load(None, HOME, []).server.listen
    assert listen.startswith("unix:///tmp/kvtier-")
    assert load(None, {**HOME, "XDG_RUNTIME_DIR": "relative"}, []).server.listen == listen


def test_file_then_environment_then_flags() -> None:
    text = "[cpu]\ncapacity = '1GiB'\n[limits]\nsessions = 3\nspaces = 4\nhistory = 5\n"
    environ = {**HOME, "KVTIER_LIMITS_SPACES": "40", "KVTIER_LIMITS_HISTORY": "50"}
    limits = load_text(text, environ, "limits.history=500").limits
    assert (limits.sessions, limits.spaces, limits.history) == (3, 40, 500)


def test_last_flag_wins() -> None:
    config = load(None, HOME, ["cpu.capacity=2GiB", "cpu.capacity=3GiB"])
    assert config.cpu.capacity == 3 * GIB


def test_environment_names_the_file_unless_it_is_given(tmp_path: Path) -> None:
    named, given_path = tmp_path / "named.toml", tmp_path / "given.toml"
    named.write_text("[limits]\nsessions = 1\n", encoding="utf-8")
    given_path.write_text("[limits]\nsessions = 2\n", encoding="utf-8")
    environ = {**HOME, "KVTIER_CONFIG": str(named)}
    assert load(None, environ, []).limits.sessions == 1
    assert load(given_path, environ, []).limits.sessions == 2


def test_empty_directory_means_no_disk_tier() -> None:
    assert load_text("[disk]\ndirectory = ''\n").disk.directory is None
    assert load(None, {"KVTIER_DISK_DIRECTORY": ""}, []).disk.directory is None


def test_variables_that_kubernetes_sets_are_not_ours() -> None:
    cluster = {
        "KVTIER_SERVICE_HOST": "10.0.0.1",
        "KVTIER_SERVICE_PORT_GRPC": "50051",
        "KVTIER_PORT": "tcp://10.0.0.1:50051",
        "KVTIER_PORT_50051_TCP_ADDR": "10.0.0.1",
    }
    assert load(None, {**HOME, **cluster}, []) == load(None, HOME, [])


def test_a_bad_default_harms_only_who_uses_it() -> None:
    environ = {**HOME, "XDG_RUNTIME_DIR": "/" + "long" * 40}
    assert "default: server.listen" in refusal(environ=environ)
    assert load(None, environ, ["server.listen=[::1]:0"]).server.listen == "[::1]:0"


def test_settings_cannot_be_changed_later() -> None:
    config = load(None, HOME, [])
    with pytest.raises(FrozenInstanceError):
        config.cpu.capacity = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


# ── What is refused ──


def test_errors_name_source_key_value_and_what_is_allowed() -> None:
    message = refusal("[cpu]\ncapacity = '8GB'\n")
    assert "kvtier.toml: cpu.capacity = '8GB' (unknown unit GB)" in message
    assert "from 16MiB to 64TiB" in message
    message = refusal(environ={**HOME, "KVTIER_DISK_COMPRESSION": "lz4"})
    assert message.startswith("KVTIER_DISK_COMPRESSION: disk.compression = 'lz4'")
    assert message.endswith('allowed: "none" or "byteplane"')
    assert refusal(overrides=["limits.sessions=0"]) == (
        "--set: limits.sessions = '0' (out of range); allowed: a whole number from 1 to 65536"
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "[cpu]\ncapasity = 1",
            "unknown key 'cpu.capasity'; allowed in [cpu]: directory, capacity",
        ),
        ("[tpu]\n", "unknown section 'tpu'; allowed: server, gpu, cpu"),
        ("[gpu]\ndevice = 'cuda'", "gpu.device"),
        ("[gpu]\ndevice = 'cuda:-1'", "gpu.device"),
        ("[gpu]\nbus_share_percent = 0", "out of range"),
        ("capacity = 1", "'capacity' stands outside a section"),
        ("[cpu\n", "not valid TOML"),
        ("[cpu]\ncapacity = " + "9" * 5000, "not valid TOML"),
        ("[cpu]\ncapacity = " + "[" * 100_000, "nested too deeply"),
        ("[cpu]\ncapacity = 0x" + "f" * 5000, "cpu.capacity = a int (out of range)"),
        ("[cpu]\ncapacity = true", "not a whole number"),
        ("[cpu]\ncapacity = 1.5", "not a whole number"),
        ("[cpu]\ncapacity = '16383KiB'", "out of range"),
        ("[cpu]\ncapacity = '-1GiB'", "not a size"),
        ("[cpu]\ndirectory = 'here'", "not an absolute path"),
        ("[cpu]\ndirectory = ''", "not an absolute path"),
        ('[cpu]\ndirectory = "/a\\u0000b"', "not an absolute path"),
        ("[disk]\ndirectory = 1", "not a string"),
        ("[disk]\ndirectory = '~nobody-of-that-name/x'", "home is not known"),
        ("[disk]\ncompression = []", 'allowed: "none" or "byteplane"'),
        ("[retention]\nttl_s = nan", "out of range"),
        ("[retention]\nttl_s = inf", "out of range"),
        ("[retention]\nttl_s = -1", "out of range"),
        ("[retention]\nttl_s = 'soon'", "not a number"),
        ("[limits]\nsessions = '9999999999999999999999'", "not a whole number"),
        ("[limits]\nsession_lease_percent = 101", "out of range"),
    ],
)
def test_bad_file_is_refused(text: str, part: str) -> None:
    message = refusal(text)
    assert part in message
    assert "kvtier.toml: " in message
    assert len(message) < 1000


def test_undecodable_environment_value_is_refused() -> None:
    assert "not UTF-8" in refusal(environ={**HOME, "KVTIER_CPU_DIRECTORY": "/\udcff"})


@pytest.mark.parametrize("variable", ["KVTIER_CPU_CAPASITY", "KVTIER_TYPO", "KVTIER_"])
def test_unknown_variable_is_refused(variable: str) -> None:
    assert f"unknown variable '{variable}'" in refusal(environ={**HOME, variable: "1"})


@pytest.mark.parametrize("override", ["cpu.capacity", "capacity=1GiB", "=", ""])
def test_malformed_flag_is_refused(override: str) -> None:
    assert "allowed: section.field=value" in refusal(overrides=[override])


def test_a_file_larger_than_a_mebibyte_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_bytes(b"#" * MAX_FILE_BYTES)
    load(path, HOME, [])
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match=r"large\.toml: larger than 1 MiB"):
        load(path, HOME, [])


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "absent.toml", HOME, [])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, HOME, [])
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(path, HOME, [])


# ── Where the service listens ──


@pytest.mark.parametrize(
    "listen",
    ["unix:///run/kvtier.sock", "127.0.0.1:50051", "127.9.9.9:1", "[::1]:0", "localhost:65535"],
)
def test_socket_or_loopback_is_accepted(listen: str) -> None:
    assert load(None, HOME, [f"server.listen={listen}"]).server.listen == listen


@pytest.mark.parametrize(
    "listen",
    [
        "0.0.0.0:1",
        "[::]:1",
        ":1",
        "10.0.0.1:1",
        "128.0.0.1:1",
        "example.org:1",
        "localhost.example.org:1",
        "[::ffff:127.0.0.1]:1",
        "[::1%lo]:1",
        "0x7f000001:1",
        "[localhost ]:1",
    ],
)
def test_wider_bind_is_refused_for_want_of_tls(listen: str) -> None:
    assert "needs TLS and credentials, which this version does not have" in refusal(
        overrides=[f"server.listen={listen}"]
    )


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        ("unix:relative.sock", "not an absolute path"),
        ("unix://host/path.sock", "not an absolute path"),
        ("unix:///with space", "not an absolute path"),
        ("unix:///a%2fb", "not an absolute path"),
        ("unix:///" + "x" * 107, "at most 107 bytes"),
        ("unix-abstract:name", "no port"),
        ("localhost", "no port"),
        ("localhost:65536", "no port"),
        ("localhost:-1", "no port"),
        ("localhost:\u0661", "no port"),
        ("::1:50051", "in brackets"),
        ("[::1:50051", "in brackets"),
    ],
)
def test_malformed_address_is_refused(listen: str, reason: str) -> None:
    assert reason in refusal(overrides=[f"server.listen={listen}"])


# ── Sizes ──


@pytest.mark.parametrize(
    ("text", "count"),
    [("512", 512), ("512B", 512), ("8GiB", 8 * GIB), ("45.0 MiB", 45 * MIB), ("1.5kib", 1536)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "1GB", "1e9", "-1", "1 GiB GiB", "\u0661", "9" * 99])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed: a number of B, KiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (45 * MIB, "45.0 MiB"),
        (GIB - 1, "1.0 GiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes_are_shown_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**50))
def test_shown_size_reads_back_to_within_its_rounding(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= count * 0.05 + 0.5


# ── Writing ──

paths = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20).map(
    lambda tail: Path("/" + tail)
)
socket_names = st.text(st.characters(min_codepoint=0x21, codec="utf-8"), min_size=1, max_size=20)
configs = st.builds(
    Config,
    server=st.builds(
        Server,
        listen=st.sampled_from(["[::1]:7", "localhost:0", "127.1.2.3:65535"])
        | socket_names.filter(lambda name: not set(name) & set("\x7f%?#")).map(
            lambda name: f"unix:///{name}"
        ),
        shutdown_flush_s=st.floats(0, 3600),
    ),
    gpu=st.builds(
        Gpu,
        device=st.sampled_from(["", "host", "cuda:0", "cuda:15"]),
        capacity=st.integers(MIB, 4 * 2**40),
        in_flight=st.integers(MIB, 4 * GIB),
        bus_share_percent=st.integers(1, 100),
    ),
    cpu=st.builds(Cpu, directory=paths, capacity=st.integers(16 * MIB, 64 * 2**40)),
    disk=st.builds(
        Disk,
        directory=st.none() | paths,
        compression=st.sampled_from(["none", "byteplane"]),
        capacity=st.integers(16 * MIB, 2**50),
        commit_bytes=st.integers(MIB, 4 * GIB),
        commit_interval_ms=st.integers(1, 60_000),
        read_threads=st.integers(1, 64),
    ),
    retention=st.builds(Retention, ttl_s=st.floats(0, 1e9)),
    limits=st.builds(
        Limits,
        sessions=st.integers(1, 65_536),
        spaces=st.integers(1, 2**20),
        keys_per_request=st.integers(1, 2**20),
        session_lease_percent=st.integers(1, 100),
        history=st.integers(0, 2**24),
    ),
)


@given(configs)
def test_written_configuration_loads_to_the_same(config: Config) -> None:
    assert load_text(config.to_toml()) == config


def outcome(text: str = "", *overrides: str) -> Config | str:
    """The configuration, or the message with which it was refused; nothing else may come out."""
    try:
        return load_text(text, HOME, *overrides)
    except ConfigError as refused:
        return str(refused)


@given(st.text())
def test_any_text_is_a_configuration_or_an_error(text: str) -> None:
    result = outcome(text)
    assert isinstance(result, Config) or len(result) < 1000


@given(st.sampled_from([(s, n) for s in SCHEMA for n in SCHEMA[s]]), st.text(max_size=200))
def test_any_value_is_refused_by_name_or_survives_writing(key: tuple[str, str], raw: str) -> None:
    name = ".".join(key)
    result = outcome("", f"{name}={raw}")
    if isinstance(result, str):
        assert f"--set: {name} = " in result
    else:
        assert load_text(result.to_toml()) == result


def test_every_setting_is_documented_and_its_default_allowed() -> None:
    config = load(None, HOME, [])
    written = config.to_toml()
    for section, settings in SCHEMA.items():
        for name, setting in settings.items():
            value = getattr(getattr(config, section), name)
            assert setting.doc.endswith(".")
            assert f"\n{name} = {setting.write(value)}" in written
            assert setting.parse(str(value)) == value
