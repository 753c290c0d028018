"""What a request is told to reuse, and the order that loads it."""

from types import SimpleNamespace
from typing import Any, cast

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtier.client import Held
from kvtier.connectors.vllm.lookups import Lookups
from kvtier.connectors.vllm.matching import Matching, run_of
from kvtier.connectors.vllm.orders import LoadOrder
from kvtier.connectors.vllm.tally import Tally
from kvtier.connectors.vllm.tracking import Tracked
from tests.connectors.vllm.fake_lookups import Clock, FakeLookups
from tests.connectors.vllm.making import block_table, parts, request, tracked

CHUNK = 8
WHOLE = parts()
BOTH = parts((None, 12))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    fake = SimpleNamespace(monotonic=made.monotonic)
    monkeypatch.setattr("kvtier.connectors.vllm.matching.time", fake)
    monkeypatch.setattr("kvtier.connectors.vllm.lookups.time", fake)
    return made


@pytest.fixture
def lookups(clock: Clock) -> FakeLookups:
    return FakeLookups(clock)


def matching(lookups: FakeLookups, *, of: Any = WHOLE, background: bool = False) -> Matching:
    return Matching(
        of, cast("Lookups", lookups), Tally(), wait_s=0.005, patience_s=1.0, background=background
    )


def ask(tokens: int, of: Any = WHOLE, **more: Any) -> Tracked:
    return tracked(request(tokens, **more), of)


# ── how far it reaches ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tokens", "held", "local", "in_line", "background"),
    [
        (40, 0, 0, 0, 0),
        (40, 3, 0, 24, 24),
        (40, 5, 0, 39, 40),  # the engine computes the last token itself
        (41, 5, 0, 40, 40),
        (40, 3, 4, 20, 20),  # from the middle of a chunk
        (40, 3, 24, 0, 0),
        (40, 3, 32, 0, 0),
        (40, 5, 36, 3, 4),
        (7, 0, 0, 0, 0),
    ],
)
def test_the_reach_beyond_what_the_engine_has(
    lookups: FakeLookups, tokens: int, held: int, local: int, in_line: int, background: int
) -> None:
    lookups.held = (Held(held, held),)
    assert matching(lookups).matched(ask(tokens), local) == in_line
    assert matching(lookups, background=True).matched(ask(tokens), local) == background


def test_what_all_parts_hold_is_a_hit(lookups: FakeLookups) -> None:
    lookups.held = (Held(4, 4), Held(2, 2))
    found = ask(40, BOTH)
    assert matching(lookups, of=BOTH).matched(found, 0) == 16
    assert [len(prefix) for prefix in lookups.asked[0].prefixes.values()] == [5, 5]
    assert [*lookups.asked[0].prefixes] == [part.digest for part in BOTH]


def test_a_prompt_shorter_than_a_chunk_is_not_asked_about(lookups: FakeLookups) -> None:
    found = matching(lookups)
    assert found.ask(ask(7)) is None
    assert found.matched(ask(7), 0) == 0
    assert not lookups.asked


def test_who_must_not_read_a_cache_is_not_given_anything(lookups: FakeLookups) -> None:
    lookups.held = (Held(5, 5),)
    assert matching(lookups).matched(ask(40, skip_reading_prefix_cache=True), 0) == 0
    barred = ask(40)
    barred.barred = True
    assert matching(lookups).matched(barred, 0) == 0
    assert not lookups.asked


def test_without_a_service_nothing_is_asked(lookups: FakeLookups) -> None:
    lookups.connected = False
    found = ask(40)
    assert matching(lookups).matched(found, 0) == 0
    assert not lookups.asked
    assert not found.barred  # it may be asked when the service is back


def test_tokens_that_came_since_are_asked_about_too(lookups: FakeLookups) -> None:
    made, found = matching(lookups), ask(12)
    made.matched(found, 0)
    cast("Any", found.request).all_token_ids.extend(range(20))
    lookups.held = (Held(4, 4),)
    assert made.matched(found, 0) == 31
    assert [len(each.prefixes[WHOLE[0].digest]) for each in lookups.asked] == [1, 4]


def test_a_stale_answer_is_not_acted_on(lookups: FakeLookups, clock: Clock) -> None:
    lookups.held = (Held(5, 5),)
    made, found = matching(lookups, background=True), ask(40)
    made.ask(found)
    clock.now_s += 0.5
    assert made.matched(found, 0) == 40
    clock.now_s += 0.6
    lookups.held = (Held(2, 2),)
    assert made.matched(found, 0) == 16
    assert len(lookups.asked) == 2


def test_what_is_secured_does_not_grow_stale(lookups: FakeLookups, clock: Clock) -> None:
    lookups.held = (Held(5, 5),)
    made, found = matching(lookups), ask(40)
    assert made.matched(found, 0) == 39
    clock.now_s += 100
    lookups.held = (Held(0, 0),)
    assert made.matched(found, 0) == 39
    assert len(lookups.asked) == 1


# ── waiting ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("background", [False, True])
def test_a_step_waits_no_longer_than_it_may(lookups: FakeLookups, background: bool) -> None:
    lookups.at_once = False
    made = matching(lookups, background=background)
    many = [ask(40, name=str(number)) for number in range(4)]
    assert [made.matched(each, 0) for each in many] == [None] * 4
    assert sum(sum(lookups.waits(number)) for number in range(4)) == pytest.approx(0.005)
    made.next_step()
    assert made.matched(many[0], 0) is None
    assert lookups.waits(0) == [0.005, 0.005]
    assert made.matched(many[1], 0) is None
    assert sum(lookups.waits(1)) == pytest.approx(0)
    assert made._tally.take() == {"lookups": 4, "ask_again": 6}


@pytest.mark.parametrize(("background", "found"), [(False, 39), (True, 40)])
def test_an_answer_that_came_meanwhile_is_taken_without_waiting(
    lookups: FakeLookups, background: bool, found: int
) -> None:
    lookups.at_once = False
    made, asking = matching(lookups, background=background), ask(40)
    assert made.matched(asking, 0) is None
    lookups.held = (Held(5, 5),)
    lookups.at_once = True
    lookups.answer()
    assert made.matched(asking, 0) == found
    assert len(lookups.asked) == 1


def test_who_has_waited_as_long_as_it_may_is_computed(lookups: FakeLookups, clock: Clock) -> None:
    lookups.at_once = False
    made, found = matching(lookups), ask(40)
    assert made.matched(found, 0) is None
    clock.now_s += 1.0
    made.next_step()
    assert made.matched(found, 0) == 0
    assert found.barred
    lookups.held = (Held(5, 5),)
    lookups.answer()
    assert made.matched(found, 0) == 0
    assert made._tally.take() == {"lookups": 1, "ask_again": 1, "late_lookups": 1}


def test_a_service_that_goes_away_is_not_waited_for(lookups: FakeLookups) -> None:
    lookups.at_once = False
    made, found = matching(lookups), ask(40)
    assert made.matched(found, 0) is None
    lookups.connected = False
    assert made.matched(found, 0) == 0


@pytest.mark.parametrize("background", [False, True])
def test_no_request_waits_longer_than_it_may_in_all(
    lookups: FakeLookups, clock: Clock, background: bool
) -> None:
    """Each step takes 1.5 s, each lookup 6 ms: each answer is stale when it is seen."""
    lookups.at_once = False
    lookups.held = (Held(5, 5),)
    made, found = matching(lookups, background=background), ask(40)
    for _ in range(3):
        if made.matched(found, 0) is not None:
            return
        lookups.answer()
        clock.now_s += 1.5
        made.next_step()
    pytest.fail("it still waits")


def test_time_in_the_engines_own_queue_does_not_count(lookups: FakeLookups, clock: Clock) -> None:
    """A request arrives long before the scheduler first looks at it."""
    lookups.held = (Held(5, 5),)
    made, found = matching(lookups), ask(40)
    made.ask(found)
    clock.now_s += 60
    lookups.at_once = False
    assert made.matched(found, 0) is None
    lookups.at_once = True
    lookups.answer()
    clock.now_s += 0.9
    assert made.matched(found, 0) == 39
    assert lookups.asked[-1].until_s > clock.now_s


def test_each_wait_has_its_own_patience(lookups: FakeLookups, clock: Clock) -> None:
    """A request that was preempted may wait again."""
    lookups.held = (Held(5, 5),)
    made, found = matching(lookups), ask(40)
    lookups.at_once = False
    assert made.matched(found, 0) is None
    clock.now_s += 0.9
    lookups.answer()
    lookups.at_once = True
    assert made.matched(found, 0) == 39
    made.forget(found)
    lookups.at_once = False
    clock.now_s += 5
    assert made.matched(found, 0) is None


# ── securing ──────────────────────────────────────────────────────────────────────────────────────


def test_in_line_only_what_is_secured_is_promised(lookups: FakeLookups) -> None:
    lookups.held = (Held(4, 1),)
    lookups.come = 3
    made, found = matching(lookups), ask(40)
    assert made.matched(found, 12) == 12
    assert lookups.firsts == [1]  # from the chunk where the engine's own cache ends
    assert found.in_ram == 1
    assert made.from_ram(found, 12) == 0
    assert matching(lookups, background=True).matched(ask(40), 12) == 20
    assert lookups.firsts == [1]


def test_nothing_is_secured_that_the_engine_has(lookups: FakeLookups) -> None:
    lookups.held = (Held(4, 1),)
    assert matching(lookups).matched(ask(40), 32) == 0
    assert not lookups.secured


def test_what_is_secured_is_asked_for_once(lookups: FakeLookups) -> None:
    """The scheduler asks in each step until it has room for the request."""
    lookups.held = (Held(5, 5),)
    made, found = matching(lookups), ask(40)
    assert [made.matched(found, local) for local in (8, 8, 16)] == [31, 31, 23]
    assert lookups.firsts == [1]
    assert len(lookups.open) == 1


def test_when_the_engine_has_forgotten_something_more_is_secured(lookups: FakeLookups) -> None:
    lookups.held = (Held(5, 5),)
    made, found = matching(lookups), ask(40)
    assert made.matched(found, 16) == 23
    assert made.matched(found, 4) == 35
    assert lookups.firsts == [2, 0]
    assert [secured.first for secured in lookups.open] == [0]


def test_securing_is_waited_for_in_later_steps_and_then_no_longer(
    lookups: FakeLookups, clock: Clock
) -> None:
    lookups.held = (Held(4, 1),)
    made, found = matching(lookups), ask(40)
    made.ask(found)
    lookups.at_once = False
    assert made.matched(found, 0) is None
    assert made.matched(found, 0) is None
    assert lookups.firsts == [0]
    clock.now_s += 2
    assert made.matched(found, 0) == 0
    assert found.barred
    lookups.bring()  # too late
    assert not lookups.open


@pytest.mark.parametrize("settle", ["forget", "ask", "new tokens"])
def test_a_question_that_is_settled_keeps_nothing(lookups: FakeLookups, settle: str) -> None:
    lookups.held = (Held(5, 5),)
    made, found = matching(lookups, background=False), ask(40)
    assert made.matched(found, 0) == 39
    (secured,) = lookups.open
    if settle == "forget":
        made.forget(found)
        made.forget(found)
    elif settle == "ask":
        made.ask(found)
    else:
        cast("Any", found.request).all_token_ids.append(1)
        made.matched(found, 0)
    assert not secured.open


@pytest.mark.parametrize(
    ("in_ram", "local", "external", "from_ram"),
    [(5, 0, 40, 40), (2, 0, 40, 16), (2, 8, 32, 8), (2, 24, 16, 0), (5, 4, 35, 35)],
)
def test_where_tokens_came_from(
    lookups: FakeLookups, in_ram: int, local: int, external: int, from_ram: int
) -> None:
    found = ask(40)
    found.in_ram, found.local = in_ram, local
    assert matching(lookups).from_ram(found, external) == from_ram


# ── the order ─────────────────────────────────────────────────────────────────────────────────────


@given(
    chunks=st.integers(1, 8),
    local=st.integers(0, 15),
    last=st.integers(0, 7),
    window=st.integers(8, 40),
)
def test_an_order_names_the_chunks_of_its_tokens_and_what_the_window_needs(
    chunks: int, local: int, last: int, window: int
) -> None:
    """All blocks of those chunks, also where the first begins before and the last ends after."""
    of = parts((None, window))
    stop = chunks * CHUNK - last
    start = min(4 * local, (stop - 1) // 4 * 4)
    found = tracked(request(chunks * CHUNK), of)
    found.local = start
    made = matching(cast("Any", None), of=of, background=True)
    found.key(chunks)
    table = block_table(tokens=chunks * CHUNK, groups=2)
    order: LoadOrder = made.load(found, table, stop - start)
    assert (order.start, order.stop, order.request, order.background) == (start, stop, "r", True)
    for group, part in enumerate(of):
        first = start // CHUNK
        if part.window is not None:
            first = max(first, max(0, stop - part.window + 1) // CHUNK)
        run = order.runs[part.digest]
        assert (run.first, run.first + len(run.prefix)) == (first, chunks)
        assert run.prefix == found.chains.run(part.digest, first, chunks)
        assert run.blocks == {group: tuple(table[group][2 * first : 2 * chunks])}


def test_a_table_that_does_not_reach_is_refused() -> None:
    found = ask(40)
    found.key(5)
    for table in ([[1, 2, 3]], [[]], [list(range(9))]):
        with pytest.raises(ValueError, match="blocks for chunks 0 to 5"):
            run_of(found, WHOLE[0], table, 0, 5)
