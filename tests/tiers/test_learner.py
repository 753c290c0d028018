"""What GIX learns from counts, and how its tables outlive a restart."""

import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.tiers.policies import cohorts as cohorts_module
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


def test_a_class_that_was_seldom_seen_is_like_its_group_before_it_is_like_all() -> None:
    classes = FineClasses()
    often, rare = classes.new(0, 1), classes.new(0, 2)  # one turn kind
    other, as_rare = classes.new(1, 1), classes.new(1, 2)  # another
    learner = taught([(often, 2.0, 10**6), (rare, 2.0, 1)])
    learner.forgotten(other, 5000.0, 10**6)
    learner.forgotten(as_rare, 5000.0, 1)
    learner.learn()
    assert learner.reach[rare][0] > 0.9
    assert learner.reach[as_rare][0] < 0.1
    unknown = classes.new(2, 1)
    assert learner.reach[as_rare][0] < learner.reach[unknown][0] < learner.reach[rare][0]


def test_chunks_that_wait_count_against_reuse() -> None:
    fresh, waiting = taught([(0, 2.0, 1000)]), taught([(0, 2.0, 1000)])
    waiting.wait(0, 0.0, 10**6)
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


STEPS = st.lists(st.tuples(st.integers(0, 3), st.floats(-20, 100), st.integers(0, 50)), max_size=60)


@given(STEPS)
def test_no_chunk_is_lost_when_cohorts_merge(steps: list[tuple[int, float, int]]) -> None:
    """What is counted as waiting since a time is taken out again by that time alone."""
    cohorts, now_s, placed = Cohorts(), 0.0, []
    for kind, wait_s, chunks in steps:
        now_s += wait_s  # a tenant's clock may be behind another's
        cohorts.count(kind, now_s, chunks)
        placed.append((kind, now_s, chunks))
        if chunks % 3 == 0:
            cohorts.by_age(4, now_s)
    by_age = cohorts.by_age(4, now_s)
    for kind in range(4):
        assert by_age[kind].sum() == sum(
            chunks for placed_kind, _, chunks in placed if placed_kind == kind
        )
    for kind, since_s, chunks in placed:
        cohorts.count(kind, since_s, -chunks)
    assert not cohorts.by_age(4, now_s).any()


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(1, 50)), max_size=40), st.floats(0, 1e5))
def test_chunks_are_counted_at_their_age(waiting: list[tuple[float, int]], wait_s: float) -> None:
    cohorts = Cohorts()
    expected = np.zeros(BINS)
    waiting.sort()
    now_s = (waiting[-1][0] if waiting else 0.0) + wait_s
    for since_s, chunks in waiting:
        cohorts.count(0, since_s, chunks)
        expected[age_bin(now_s - since_s)] += chunks
    np.testing.assert_array_equal(cohorts.by_age(1, now_s)[0], expected)
    for age in range(1, 30):
        merged = cohorts.by_age(1, now_s + 1.3**age)
        assert merged.sum() == expected.sum()
        assert len(cohorts._lines[0]._counts if waiting else []) <= BINS


def test_cohorts_are_few_though_nobody_asks_for_ages() -> None:
    """What is stored without a request teaches nothing, so nothing is fitted."""
    cohorts = Cohorts()
    for second in range(5000):
        cohorts.count(0, float(second), 1)
    assert len(cohorts._lines[0]._counts) <= cohorts_module._MOST_APART
    for second in range(5000):
        cohorts.count(0, float(second), -1)
    assert not cohorts.by_age(1, 5000.0).any()


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


@pytest.mark.parametrize("classes", [FineClasses(), CoarseClasses()])
def test_groups_part_wider_groups_and_tell_new_from_seen(
    classes: FineClasses | CoarseClasses,
) -> None:
    levels = [*classes.groups, range(classes.count)]
    assert all(len(level) == classes.count for level in levels)
    for wider, narrower in pairwise(levels):
        assert len(set(zip(wider, narrower, strict=True))) == len(set(narrower))
    new = set(levels[0][: classes.seen_from])
    assert new.isdisjoint(levels[0][classes.seen_from :])


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 1e9))
def test_fine_classes_are_parts_of_the_coarse_ones(turn: int, number: int, gap_s: float) -> None:
    fine, coarse = FineClasses(), CoarseClasses()
    assert fine.groups[-1][fine.new(turn, number)] == coarse.new(turn, number)
    assert fine.groups[-1][fine.seen(turn, number, gap_s)] == coarse.seen(turn, number, gap_s)


# ── over a restart ────────────────────────────────────────────────────────────────────────────────


@given(COUNTS)
def test_what_was_learned_is_known_after_a_restart(reused: list[tuple[int, float, int]]) -> None:
    before, after = taught(reused), HazardLearner(FineClasses())
    before.wait(3, 0.0, 500)
    assert after.restore(before.dump())
    np.testing.assert_allclose(after._reused, before._reused, rtol=0.01)
    assert after._forgotten.sum() == pytest.approx(500, rel=0.01)


def test_what_is_seldom_said_of_a_class_counts_as_it_does_of_others() -> None:
    learner = HazardLearner(FineClasses())
    soon, other, seldom = 0, 1, 2
    learner.forgotten(soon, 5000.0, 10**6)
    learner.forgotten(other, 5000.0, 10**6)
    learner.reused(learner.labelled(soon, 1), 2.0, 10**6)
    learner.labelled(seldom, 1)
    learner.learn()
    assert learner.worth[ROWS + seldom][0] > 10 * learner.worth[seldom][0]


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
