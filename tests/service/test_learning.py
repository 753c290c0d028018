"""When policies learn, and that no file can hurt them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.service.learning import FILE, MOST_BYTES, Learning, pack, unpack
from kvtier.tiers.policies.classes import BINS, FineClasses
from kvtier.tiers.policies.learner import LABELS
from kvtier.tiers.policies.tables import encode
from tests.loops import turn


class Pupil:
    """A learner that says when it learns."""

    def __init__(self, table: bytes = b"") -> None:
        self.due = False
        self.learned = 0
        self.table = table

    def learn(self) -> None:
        self.learned += 1
        self.due = False

    def dump(self) -> bytes:
        return self.table

    def restore(self, encoded: bytes) -> bool:
        if encoded != b"understood":
            return False
        self.table = encoded
        return True


async def test_learning_waits_until_the_answer_is_given(tmp_path: Path) -> None:
    idle, eager = Pupil(), Pupil()
    learning = Learning({"CPU.gix": idle, "DISK.gix": eager}, tmp_path)
    learning.asked()
    await turn()
    assert (idle.learned, eager.learned) == (0, 0)
    eager.due = True
    learning.asked()
    learning.asked()
    assert eager.learned == 0
    await turn()
    assert (idle.learned, eager.learned) == (0, 1)


def test_the_largest_tables_there_can_be_fit_in_the_file() -> None:
    """Every class met with every label, in RAM and on disk, and no two counts alike; nobody says
    anything of what is in VRAM."""
    random, classes = np.random.default_rng(1), FineClasses().count

    def table(labels: int) -> bytes:
        counts = np.exp(random.normal(3, 3, (2, labels * classes, BINS)))
        return encode(list(counts), classes)

    tables = {"CPU.gix": table(LABELS), "DISK.gix": table(LABELS), "GPU.gix": table(1)}
    packed = pack(tables)
    assert len(packed) <= MOST_BYTES
    assert unpack(packed) == tables


async def test_what_was_learned_outlives_the_service(tmp_path: Path) -> None:
    before = Learning({"CPU.gix": Pupil(b"understood"), "DISK.gix": Pupil(b"odd")}, tmp_path)
    await before.close()
    cpu, disk = Pupil(), Pupil(b"mine")
    Learning({"CPU.gix": cpu, "DISK.gix": disk}, tmp_path).restore()
    assert cpu.table == b"understood"
    assert disk.table == b"mine", "a table that is not understood changes nothing"
    other = Pupil()
    Learning({"CPU.lru": other}, tmp_path).restore()
    assert other.table == b""


async def test_it_is_kept_now_and_then(tmp_path: Path) -> None:
    now_s = [0.0]
    pupil = Pupil(b"understood")
    learning = Learning({"CPU.gix": pupil}, tmp_path, lambda: now_s[0])
    for at_s, kept in ((59.0, False), (61.0, True)):
        now_s[0] = at_s
        pupil.due = True
        learning.asked()
        await turn()
        assert (learning._saving is not None) is kept
    await learning.close()
    assert unpack((tmp_path / FILE).read_bytes()) == {"CPU.gix": b"understood"}


async def test_a_disk_that_takes_nothing_costs_nothing_else(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    learning = Learning({"CPU.gix": Pupil()}, gone)
    learning.restore()
    await learning.close()
    assert not gone.exists()


@pytest.mark.parametrize("content", [b"", b"short", b"kvtier learned 1" + bytes(20)])
def test_an_odd_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    pupil = Pupil(b"mine")
    Learning({"CPU.gix": pupil}, tmp_path).restore()
    assert pupil.table == b"mine"


@given(st.dictionaries(st.text(max_size=20), st.binary(max_size=200), max_size=4), st.data())
def test_a_flipped_bit_is_noticed(tables: dict[str, bytes], data: st.DataObject) -> None:
    encoded = pack(tables)
    assert unpack(encoded) == tables
    at = data.draw(st.integers(0, 8 * len(encoded) - 1))
    torn = bytearray(encoded)
    torn[at // 8] ^= 1 << at % 8
    assert unpack(bytes(torn)) == {}
    assert unpack(encoded[: at // 8]) == {}
