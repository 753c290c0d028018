"""Shared memory: owned by one, mapped by many, gone with its owner."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.errors import AlreadyRunning, ConfigError
from kvtier.kernels.shared_memory import SharedMemory, remove_stale

NBYTES = 1 << 20


def test_two_mappings_see_the_same_bytes(tmp_path: Path) -> None:
    owner = SharedMemory.create(tmp_path / "a.arena", NBYTES)
    assert list(owner.populate()) == [NBYTES]
    other = SharedMemory.open(tmp_path / "a.arena", NBYTES)
    other.view[100:103] = b"abc"
    assert list(other.populate()) == [NBYTES], "populating changes nothing"
    assert bytes(owner.view[100:103]) == b"abc"
    owner.close(unlink=True)
    assert not (tmp_path / "a.arena").exists()
    assert bytes(other.view[100:103]) == b"abc", "what is mapped outlives its owner"
    other.close(unlink=False)


def test_touching_pages_by_hand_changes_nothing(tmp_path: Path) -> None:
    memory = SharedMemory.create(tmp_path / "a.arena", NBYTES)
    memory.view[0:4] = b"kept"
    memory._touch(0, NBYTES)
    assert bytes(memory.view[0:4]) == b"kept"
    memory.close(unlink=True)


def test_a_live_arena_has_one_owner(tmp_path: Path) -> None:
    owner = SharedMemory.create(tmp_path / "a.arena", NBYTES)
    with pytest.raises(AlreadyRunning, match=r"a\.arena"):
        SharedMemory.create(tmp_path / "a.arena", NBYTES)
    assert remove_stale(tmp_path, "*.arena") == []
    owner.close(unlink=False)
    assert remove_stale(tmp_path, "*.arena") == [tmp_path / "a.arena"]


def test_what_a_dead_owner_left_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.arena").write_bytes(b"secret" * 1000)
    memory = SharedMemory.create(tmp_path / "a.arena", NBYTES)
    assert not any(bytes(memory.view))
    memory.close(unlink=True)


def test_an_arena_that_does_not_fit_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cpu\.capacity: .* do not fit"):
        SharedMemory.create(tmp_path / "a.arena", 1 << 55)
    assert not (tmp_path / "a.arena").exists()


def test_what_is_no_arena_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "short")
    os.mkfifo(tmp_path / "pipe")
    for name in ("short", "pipe"):
        with pytest.raises(ValueError, match="not a file of"):
            SharedMemory.open(tmp_path / name, NBYTES)
    for name in ("link", "missing"):
        with pytest.raises(OSError, match=name):
            SharedMemory.open(tmp_path / name, 1)


def test_a_mapping_in_use_survives_its_close(tmp_path: Path) -> None:
    memory = SharedMemory.create(tmp_path / "a.arena", NBYTES)
    part = memory.view[:8]
    memory.close(unlink=True)
    part[:] = b"in place"
    assert bytes(part) == b"in place"


def test_memory_is_locked_where_the_limit_allows_it(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from kvtier.kernels.shared_memory import SharedMemory
region = SharedMemory.create(Path(sys.argv[1]), 1 << 20)
locked = region.lock()
kib = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmLck")]
print(locked, kib[0])
region.close(unlink=True)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "arena")],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert ran.stdout.split() in (["True", "1024"], ["False", "0"])
