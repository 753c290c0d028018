"""The client's side of hints and pins: numbers of requests, wild values, a service that dies."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.chunks import chain, new_request
from kvtier.client import FIVE_MINUTES, ONE_HOUR, Hints, Pinned, StopReason
from kvtier.client.hints import to_hints
from kvtier.client.pinning import listed_pins, pinned_of
from kvtier.proto import cache_pb2 as pb
from tests.sidecar import Sidecar, load, offload, prompt_of, space_of

PREFIX = chain(bytes(32), bytes(4 * 16 * 8), 16)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with Sidecar(tmp_path_factory.mktemp("c"), "disk.write=second_touch") as running:
        yield running


@pytest.mark.parametrize("path", ["shm", "inline"])
def test_what_is_done_with_one_prefix_is_one_use(sidecar: Sidecar, path: str) -> None:
    """On the second use chunks are written to disk, here: that is how uses can be seen."""
    client = sidecar.client(space_of(path), path=path)
    tokens = prompt_of(1, 4)
    prefix = client.prefix(tokens)
    assert prefix.request != 0
    assert len(offload(client, prefix).stored) == 4
    assert client.lookup(prefix) == 4
    assert load(client, prefix) == 4
    assert load(client, client.prefix(tokens[:32], same_request=prefix)) == 2
    before = sidecar.stats().counters["disk_written_chunks"]
    again = client.prefix(tokens)
    assert again == prefix, "the number is not what a prefix is"
    assert again.request != prefix.request
    assert client.lookup(again[:2]) == 2  # chunks 2 and 3 are not used again
    written = sidecar.until(
        lambda stats: stats.counters["disk_written_chunks"] >= before + 2, "the second use"
    )
    assert written.counters["disk_written_chunks"] == before + 2


def test_slices_are_of_the_same_request() -> None:
    with_number = type(PREFIX)(PREFIX.keys, PREFIX.parent, 16, request=7)
    assert with_number[2:5].request == with_number[:0].request == 7
    assert with_number[2:5] == PREFIX[2:5]


def test_numbers_differ_and_are_never_the_one_of_nobody() -> None:
    numbers = {new_request() for _ in range(1000)}
    assert len(numbers) == 1000
    assert 0 not in numbers
    assert max(numbers) < 2**64


@given(
    next_use_s=st.floats(),
    priority=st.integers(),
    session_end=st.booleans(),
    stop_reason=st.sampled_from(StopReason),
)
def test_no_hint_is_too_wild_to_be_sent(
    next_use_s: float, priority: int, session_end: bool, stop_reason: StopReason
) -> None:
    hints = Hints(next_use_s, session_end, stop_reason, priority)
    sent = pb.Hints.FromString(to_hints(PREFIX, hints).SerializeToString())
    assert (sent.session_end, sent.stop_reason) == (session_end, stop_reason.value)
    assert (sent.priority > 0, sent.priority < 0) == (priority > 0, priority < 0)
    assert math.isnan(sent.expected_next_use_s) == math.isnan(next_use_s)


def test_hints_go_with_every_call(sidecar: Sidecar) -> None:
    client = sidecar.client(space_of("hints"))
    prefix = client.prefix(prompt_of(1, 2))
    wild = Hints(expected_next_use_s=-1.0, priority=99)
    before = sidecar.stats().counters["clamped_hints"]
    with client.offload(prefix, hints=wild) as wanted:
        assert len([slot.index for slot in wanted]) == 2
    assert client.lookup(prefix, hints=wild) == 2
    with client.load(prefix, hints=wild) as loaded:
        assert len([chunk.index for chunk in loaded]) == 2
    assert sidecar.stats().counters["clamped_hints"] == before + 6


def test_a_pin_is_made_listed_and_ended(sidecar: Sidecar) -> None:
    client = sidecar.client(space_of("pins"))
    prefix = client.prefix(prompt_of(1, 4))
    offload(client, prefix[:3])
    pinned = client.pin(prefix, FIVE_MINUTES)
    assert pinned is not None
    assert (pinned.chunks, pinned.left_s, pinned.refused) == (
        3,
        300.0,
        "the next chunk is not held",
    )
    session_long = client.pin(prefix[:2], ONE_HOUR, end_with_session=True)
    assert session_long is not None
    assert session_long.refused == ""
    listed = {each.id: each for each in client.pins()}
    assert listed.keys() == {pinned.id, session_long.id}
    assert listed[session_long.id].end_with_session
    assert 0 < listed[pinned.id].left_s <= FIVE_MINUTES
    assert client.unpin(pinned)
    assert client.unpin(pinned)
    assert [each.id for each in client.pins()] == [session_long.id]
    other = sidecar.client(space_of("pins"))
    client.close()
    sidecar.until(lambda stats: not other.pins(), "the session's end")


def test_without_a_service_nothing_is_pinned_and_nothing_raised(tmp_path: Path) -> None:
    with Sidecar(tmp_path) as mortal:
        client = mortal.client()
        prefix = client.prefix(prompt_of(1, 2))
        offload(client, prefix)
        pinned = client.pin(prefix, ONE_HOUR)
        assert pinned is not None
        mortal.kill()
        assert client.pin(prefix, ONE_HOUR) is None
        assert client.pins() == []
        assert not client.unpin(pinned)


@given(
    chunks=st.integers(0, 2**32 - 1),
    seconds=st.floats(),
    stop=st.integers(0, 9),
    pin=st.integers(0, 9),
)
def test_what_a_service_tells_of_pins_is_bounded(
    chunks: int, seconds: float, stop: int, pin: int
) -> None:
    answer = pb.PinResponse(pin_id=pin, chunks=chunks, ttl_s=seconds)
    answer.stop = stop  # type: ignore[assignment]
    pinned = pinned_of(answer, 8, end_with_session=False)
    assert pinned.chunks <= 8
    assert 0 <= pinned.left_s <= 7 * 86_400
    info = pb.PinInfo(pin_id=pin, chunks=chunks, left_s=seconds)
    [listed] = listed_pins(pb.ListPinsResponse(pins=[info]))
    assert listed == Pinned(pin, chunks, pinned.left_s, end_with_session=False)
