"""What is said to be in the page cache is there."""

import mmap
import os
from pathlib import Path

from kvtier.kernels.page_cache import Residency

PAGE = mmap.PAGESIZE


def test_what_was_just_read_is_cached(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * PAGE))
    path.read_bytes()
    with path.open("rb") as file:
        residency = Residency(file.fileno())
        assert residency.cached(0, 64 * PAGE)
        assert residency.cached(5 * PAGE + 16, PAGE)
        assert residency.cached(63 * PAGE + 100, PAGE)  # what lies beyond the end does not count
        residency.close()


def test_a_hole_that_nobody_read_is_not_cached(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(PAGE))
        file.truncate(64 * PAGE)
    with path.open("rb") as file:
        residency = Residency(file.fileno())
        assert residency.cached(0, PAGE)
        assert not residency.cached(0, 64 * PAGE)
        assert not residency.cached(32 * PAGE, 10)
        residency.close()
