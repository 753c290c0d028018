"""What GIX learns from counts, and how its tables outlive a restart."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.tiers.policies.classes import BINS, CoarseClasses, FineClasses, age_bin, age_edges
from kvtier.tiers.policies.cohorts import Cohorts
from kvtier.tiers.policies.learner import LABELS, HazardLearner
from kvtier.tiers.policies.tables import decode, encode

ROWS = FineClasses.count
COUNTS = st.lists(
    st.tuples(st.integers(0, ROWS - 1), st.floats(0, 2e5), st.integers(1, 10**6)), max_size=20
)


def taught(reused: list[tuple[int, float, int]]) -> HazardLearner:
    learner = HazardLearner(FineClasses())
    for kind, age_s, chunks in reused:
        learner.reused(kind, age_s, chunks)
    return learner


@given(COUNTS, COUNTS)
def test_worth_is_finite_and_a_chance_is_one(
    reused: list[tuple[int, float, int]], forgotten: list[tuple[int, float, int]]
) -> None:
    learner = taught(reused)
    for kind, age_s, chunks in forgotten:
        learner.forgotten(kind, age_s, chunks)
    learner.learn()
    worth, reach = np.array(learner.worth), np.array(learner.reach)
    assert np.isfinite(worth).all()
    assert (worth >= 0).all()
    assert ((reach >= 0) & (reach <= 1)).all()
    assert (np.diff(reach, axis=1) <= 1e-12).all(), "the chance shrinks with age"


def test_what_comes_back_soon_is_worth_more_than_what_comes_back_late() -> None:
    learner = taught([(0, 2.0, 10**6), (1, 2000.0, 10**6)])
    learner.learn()
    assert learner.worth[0][0] > 10 * learner.worth[1][0]
    assert learner.worth[1][age_bin(2000.0)] > learner.worth[1][0], "its time has come"


def test_a_class_that_was_never_seen_is_like_all_others_of_its_sort() -> None:
    seen = FineClasses.seen_from
    learner = taught([(seen, 2.0, 10**6)])
    learner.forgotten(0, 5000.0, 10**6)
    learner.learn()
    assert learner.worth[seen + 1][0] > 10 * learner.worth[1][0]


def test_chunks_that_wait_count_against_reuse() -> None:
    fresh, waiting = taught([(0, 2.0, 1000)]), taught([(0, 2.0, 1000)])
    waiting.cohort(0, 0.0).count += 10**6
    waiting.request(4000.0)
    for learner in (fresh, waiting):
        learner.learn()
    assert waiting.reach[0][0] < fresh.reach[0][0] / 10


def test_old_counts_fade() -> None:
    learner = taught([(0, 2.0, 1000)])
    for _ in range(256):
        learner.request(1.0)
    learner.learn()
    assert learner._reused.sum() == pytest.approx(980)


def test_it_learns_often_while_it_knows_little_and_never_more_often_than_it_must() -> None:
    learner = HazardLearner(FineClasses())
    fits = 0
    for _ in range(100_000):
        learner.request(0.0)
        if learner.due:
            learner.learn()
            fits += 1
    assert fits < 100_000 / 256 + 150
    learner = HazardLearner(FineClasses())
    for _ in range(8):
        assert not learner.due
        learner.request(0.0)
    assert learner.due


# ── cohorts ───────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100), st.integers(0, 50)), max_size=60))
def test_no_chunk_is_lost_when_cohorts_merge(steps: list[tuple[int, float, int]]) -> None:
    cohorts, now_s, placed = Cohorts(), 0.0, []
    for kind, wait_s, chunks in steps:
        now_s += wait_s
        cohort = cohorts.open(kind, now_s)
        cohort.count += chunks
        placed.append((cohort, kind, chunks))
        if chunks % 3 == 0:
            cohorts.by_age(4, now_s)
    by_age = cohorts.by_age(4, now_s)
    for kind in range(4):
        assert by_age[kind].sum() == sum(
            chunks for _, placed_kind, chunks in placed if placed_kind == kind
        )
    assert all(len(members) <= BINS for members in cohorts._cohorts.values())
    for cohort, _, chunks in placed:
        cohort.current().count -= chunks
    assert not cohorts.by_age(4, now_s).any()


# ── bins and classes ──────────────────────────────────────────────────────────────────────────────


@given(st.floats(0, 1e9))
def test_an_age_is_between_the_edges_of_its_bin(age_s: float) -> None:
    edges, found = age_edges(), age_bin(age_s)
    slack = 1e-9 * (age_s + 1)
    assert edges[found] <= age_s + slack
    assert found == BINS - 1 or age_s < edges[found + 1] + slack


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 1e9))
@pytest.mark.parametrize("classes", [FineClasses(), CoarseClasses()])
def test_every_chunk_has_a_class(
    classes: FineClasses | CoarseClasses, turn: int, number: int, gap_s: float
) -> None:
    assert 0 <= classes.new(turn, number) < classes.seen_from
    assert classes.seen_from <= classes.seen(turn, number, gap_s) < classes.count


# ── over a restart ────────────────────────────────────────────────────────────────────────────────


@given(COUNTS)
def test_what_was_learned_is_known_after_a_restart(reused: list[tuple[int, float, int]]) -> None:
    before, after = taught(reused), HazardLearner(FineClasses())
    before.cohort(3, 0.0).count += 500
    assert after.restore(before.dump())
    np.testing.assert_allclose(after._reused, before._reused, rtol=0.01)
    assert after._forgotten.sum() == pytest.approx(500, rel=0.01)


def test_labels_are_handed_on() -> None:
    before, after = taught([]), HazardLearner(FineClasses())
    kind = before.labelled(5, 2)
    before.reused(kind, 1.0, 64)
    assert after.restore(before.dump())
    assert after._reused[kind].sum() == 64
    assert len(after.worth) == len(after._reused)


def test_a_full_table_is_a_few_kib() -> None:
    learner = taught(
        [(kind, 2.0 ** (age / 3), 1000 * age + kind) for kind in range(ROWS) for age in range(40)]
    )
    assert len(learner.dump()) < 8 * 1024


@given(st.binary(max_size=300))
def test_noise_is_refused_and_changes_nothing(noise: bytes) -> None:
    learner = taught([(1, 1.0, 7)])
    table = learner._reused.copy()
    assert not learner.restore(noise)
    assert not learner.restore(learner.dump()[: len(noise)])
    np.testing.assert_array_equal(learner._reused, table)


@given(st.integers(0, 400), st.integers(1, 255))
def test_one_spoilt_byte_is_seen(place: int, change: int) -> None:
    encoded = bytearray(taught([(1, 1.0, 7), (2, 60.0, 900)]).dump())
    encoded[place % len(encoded)] ^= change
    assert not HazardLearner(FineClasses()).restore(bytes(encoded))


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -1.0, 1e30])
def test_counts_that_nobody_counted_are_refused(count: float) -> None:
    table = np.zeros((ROWS, BINS))
    table[0, 0] = count
    assert not HazardLearner(FineClasses()).restore(encode([table, table], ROWS))


def test_tables_of_others_are_refused() -> None:
    learner = HazardLearner(FineClasses())
    assert not learner.restore(HazardLearner(CoarseClasses()).dump())
    too_many = np.zeros(((LABELS + 1) * ROWS, BINS))
    assert not learner.restore(encode([too_many, too_many], ROWS))
    assert not learner.restore(encode([np.zeros((ROWS, BINS))], ROWS))


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(1 << 24), 9)
    header = struct.pack("<4sBBHBHI", b"kvtG", 1, BINS, ROWS, 2, ROWS, zlib.crc32(bomb))
    assert decode(header + bomb, 2, ROWS, LABELS) is None
