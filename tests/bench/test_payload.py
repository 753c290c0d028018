"""The parts of the benchmarks that decide whether a figure means anything."""

from pathlib import Path

import numpy as np
import pytest

from kvtier.bench.page_cache import cached_bytes, warm
from kvtier.bench.payload import WrongBytes, check_same, filled, kv_like, renew, space_for
from kvtier.bench.report import Report, Target
from kvtier.bench.timing import ratio


@pytest.mark.parametrize(("mib", "nbytes"), [(32, 32 << 20), (5.6, 45 << 17), (0.01, 1 << 17)])
def test_chunks_have_about_the_size_asked_for(mib: float, nbytes: int) -> None:
    assert space_for(mib).layout.nbytes == nbytes


def test_wrong_bytes_are_noticed() -> None:
    stored = filled(2, 4096, seed=1)
    check_same([chunk.copy() for chunk in stored], stored)
    broken = [chunk.copy() for chunk in stored]
    broken[1][4095] ^= 1
    with pytest.raises(WrongBytes, match="chunk 1"):
        check_same(broken, stored)


def test_renewed_buffers_share_no_word_with_what_they_were() -> None:
    buffers = filled(1, 4096, seed=1)
    before = buffers[0].copy()
    renew(buffers)
    assert not np.any(buffers[0].view(np.uint64) == before.view(np.uint64))


def test_kv_like_data_is_gaussian_per_channel() -> None:
    words = kv_like(1, 1 << 20, seed=1)[0].view(np.uint16)
    channels = (words.astype(np.uint32) << 16).view(np.float32).reshape(-1, 128)
    scales = channels.std(axis=0)
    assert np.all(np.abs(channels.mean(axis=0)) < scales / 10)
    assert scales.max() > 4 * scales.min()


def test_what_was_read_is_in_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    warm(file)
    assert cached_bytes(file) == 1 << 20


def test_a_ratio_is_of_neighbours_and_above_one_when_we_are_faster() -> None:
    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 8.0]) == 2.0


def test_the_table_says_whether_targets_are_met() -> None:
    targets = {"a": Target(0.9), "b": Target(2.0, at_most=True), "c": Target(1.0)}
    figures = {"a": 0.95, "b": 2.5, "c": None, "d": {"1": 3}}
    table = Report("test", figures, {}, targets).as_table()
    rows = {line.split()[0]: line for line in table.splitlines()[1:-1]}
    assert "met: >= 0.9" in rows["a"]
    assert "MISSED: <= 2" in rows["b"]
    assert rows["c"].split() == ["c", "-"]
    assert rows["d.1"].split() == ["d.1", "3"]
