"""The settings of the service, section by section: what each does, what is allowed, its default."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from kvtier.settings import (
    GIB,
    MIB,
    TIB,
    address,
    choice,
    device_name,
    folder,
    seconds,
    size,
    whole,
)

POLICIES = ("gix", "gix-lite", "s3fifo", "arc", "lru")


def default_listen(environ: Mapping[str, str]) -> str:
    """The user's own socket: in the runtime directory, or in a private folder of /tmp."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    folder_name = runtime if runtime.startswith("/") else f"/tmp/kvtier-{os.getuid()}"
    return f"unix://{folder_name.rstrip('/')}/kvtier.sock"


def default_directory(environ: Mapping[str, str]) -> Path:
    """Where the disk tier lives when nobody says: the user's cache folder."""
    cache = environ.get("XDG_CACHE_HOME", "")
    if cache.startswith("/"):
        return Path(cache) / "kvtier"
    return Path(environ.get("HOME") or Path.home()) / ".cache" / "kvtier"


@dataclass(frozen=True, slots=True)
class Server:
    """Where the service listens and how it stops."""

    # ── What it does ──
    listen: Annotated[
        str,
        address(
            "Where clients connect: a unix socket, or a port of this host. There is no wider bind:"
            " this version has no TLS and no credentials."
        ),
    ] = field(default_factory=lambda: default_listen(os.environ))
    # ── How large and how fast ──
    shutdown_flush_s: Annotated[
        float,
        seconds("How long a clean stop writes what RAM still holds to disk.", 0, 3600),
    ] = 30.0


@dataclass(frozen=True, slots=True)
class Cpu:
    """The arena in host memory."""

    # ── What it does ──
    directory: Annotated[
        Path,
        folder("Where the arena's file lies. Anything but a memory-backed folder makes it slow."),
    ] = Path("/dev/shm")
    # ── How large and how fast ──
    capacity: Annotated[
        int,
        size("Size of the arena. All of it is taken and touched at start.", 16 * MIB, 64 * TIB),
    ] = GIB


@dataclass(frozen=True, slots=True)
class Gpu:
    """The VRAM tier: copies of chunks that engines on the same GPU ask for."""

    # ── What it does ──
    device: Annotated[
        str,
        device_name(
            'Where the tier is; "" means no VRAM tier. `host` is a simulated device for tests and'
            " development."
        ),
    ] = ""
    # ── How large and how fast ──
    capacity: Annotated[
        int,
        size("How much of the device's memory the tier takes, at start.", MIB, 4 * TIB),
    ] = GIB
    in_flight: Annotated[
        int,
        size("How much of what nobody waits for is on the bus at once.", MIB, 4 * GIB),
    ] = 32 * MIB
    bus_share_percent: Annotated[
        int,
        whole("Share of the time in which the bus may carry what nobody waits for.", 1, 100),
    ] = 100


@dataclass(frozen=True, slots=True)
class Disk:
    """The LMDB store."""

    # ── What it does ──
    directory: Annotated[
        Path | None,
        folder('Where chunks are kept across restarts; "" means no disk tier.', optional=True),
    ] = field(default_factory=lambda: default_directory(os.environ))
    compression: Annotated[
        str,
        choice(
            "How a chunk is stored; always lossless. `byteplane` saves space and costs CPU.",
            ("none", "byteplane"),
        ),
    ] = "none"
    write: Annotated[
        str,
        choice(
            "When a chunk is written: `demote` before RAM gives it up, `write_through` as soon as"
            " it is committed, `second_touch` when it is asked for again, `reuse` as demote, but"
            " only if it is likely enough to be. A crash loses what was not written; a clean stop"
            " writes it.",
            ("demote", "write_through", "second_touch", "reuse"),
        ),
    ] = "demote"
    write_reuse_percent: Annotated[
        int,
        whole("With `reuse`, the least probability of being asked for again.", 1, 100),
    ] = 20
    # ── How large and how fast ──
    capacity: Annotated[
        int,
        size("How much the store may occupy, its own overhead included.", 16 * MIB, 1024 * TIB),
    ] = 8 * GIB
    commit_bytes: Annotated[
        int,
        size("A transaction is committed once it holds this much.", MIB, 4 * GIB),
    ] = 64 * MIB
    commit_interval_ms: Annotated[
        int,
        whole("A transaction is committed once it is this old: what a crash can lose.", 1, 60_000),
    ] = 50
    read_threads: Annotated[
        int,
        whole("How many chunks are read and decoded at once.", 1, 64),
    ] = 2
    read_ahead_percent: Annotated[
        int,
        whole(
            "Part of RAM that one session's Lookup and Prefetch may have on its way from disk"
            " before a load asks for it; 0 reads nothing ahead.",
            0,
            50,
        ),
    ] = 25


@dataclass(frozen=True, slots=True)
class Eviction:
    """Which chunks go first."""

    # ── What it does ──
    policy: Annotated[
        str,
        choice("How a tier chooses what it gives up: see docs/eviction.md.", POLICIES),
    ] = "gix"


@dataclass(frozen=True, slots=True)
class Tenants:
    """What one tenant may hold, beside the fair share that nobody takes from it."""

    # ── How large and how fast ──
    gpu_percent: Annotated[int, whole("The part of VRAM that one tenant may hold.", 1, 100)] = 100
    cpu_percent: Annotated[int, whole("The part of RAM that one tenant may hold.", 1, 100)] = 100
    disk_percent: Annotated[int, whole("The part of disk that one tenant may hold.", 1, 100)] = 100
    pin_percent: Annotated[
        int, whole("The part of each tier that one tenant may keep pinned.", 0, 90)
    ] = 20


@dataclass(frozen=True, slots=True)
class Retention:
    """How long chunks are kept."""

    # ── What it does ──
    ttl_s: Annotated[
        float,
        seconds(
            "Age at which a chunk is dropped, used or not; 0 keeps it until evicted.", 0, 10**9
        ),
    ] = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may use up together and each; beyond it they are refused."""

    # ── How large and how fast ──
    sessions: Annotated[int, whole("How many sessions may be open.", 1, 65_536)] = 256
    spaces: Annotated[int, whole("How many spaces may hold chunks.", 1, 2**20)] = 1024
    keys_per_request: Annotated[
        int,
        whole("How many keys one request may name.", 1, 2**20),
    ] = 8192
    session_lease_percent: Annotated[
        int,
        whole("Share of the cpu arena that one session may hold leased for writing.", 1, 100),
    ] = 50
    history: Annotated[
        int,
        whole("How many misses and evictions are remembered, to explain them.", 0, 2**24),
    ] = 65_536
    token_bytes: Annotated[
        int,
        size(
            "Memory for the tokens of chunks, so that a prompt that leaves one half-way can use the"
            " part before; 0 keeps none.",
            0,
            64 * GIB,
        ),
    ] = 64 * MIB
