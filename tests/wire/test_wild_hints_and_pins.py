"""Hints and pins as a client of the proto alone sends them, lies included."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.proto import cache_pb2 as pb
from tests.sidecar import Sidecar
from tests.wire.own_client import TIMEOUT_S, OwnClient, space_of

WEEK_S = 7 * 86_400.0


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with Sidecar(tmp_path_factory.mktemp("w")) as running:
        yield running


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[OwnClient]:
    with OwnClient(sidecar.target, path=pb.DATA_PATH_INLINE) as opened:
        yield opened


def counted(sidecar: Sidecar, name: str) -> int:
    return sidecar.stats().counters[name]


def pin(client: OwnClient, keys: list[bytes], ttl_s: float = 60.0) -> pb.PinResponse:
    request = pb.PinRequest(session_id=client.id, keys=b"".join(keys), ttl_s=ttl_s)
    return client.stub.Pin(request, timeout=TIMEOUT_S)


def pins(client: OwnClient) -> list[pb.PinInfo]:
    request = pb.ListPinsRequest(session_id=client.id)
    return list(client.stub.ListPins(request, timeout=TIMEOUT_S).pins)


def unpin(client: OwnClient, pin_id: int) -> None:
    request = pb.UnpinRequest(session_id=client.id, pin_id=pin_id)
    client.stub.Unpin(request, timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    ("hints", "clamped"),
    [
        (pb.Hints(request=2**64 - 1, expected_next_use_s=30, priority=2), 0),
        (pb.Hints(expected_next_use_s=-1), 1),
        (pb.Hints(expected_next_use_s=math.nan, priority=-3), 2),
        (pb.Hints(expected_next_use_s=math.inf, priority=2**31 - 1), 2),
        (pb.Hints.FromString(b"\x20\x63\x18\x01"), 0),  # a stop reason that nobody knows
    ],
    ids=str,
)
def test_no_hint_is_refused_and_what_is_out_of_range_is_counted(
    sidecar: Sidecar, client: OwnClient, hints: pb.Hints, clamped: int
) -> None:
    keys = client.keys(1, 3)
    client.store(keys)
    packed, stub = b"".join(keys), client.stub
    before = counted(sidecar, "clamped_hints")
    looked_up = stub.Lookup(
        pb.LookupRequest(session_id=client.id, keys=packed, hints=hints), timeout=TIMEOUT_S
    )
    assert looked_up.held == 3
    got = stub.Get(pb.GetRequest(session_id=client.id, keys=packed, hints=hints), timeout=TIMEOUT_S)
    assert [*got][-1].end.chunks == 3
    reserved = stub.Reserve(
        pb.ReserveRequest(
            session_id=client.id,
            lease_id=client.next_lease(),
            keys=packed,
            parent=client.root,
            hints=hints,
        ),
        timeout=TIMEOUT_S,
    )
    assert {chunk.status for chunk in reserved.chunks} == {pb.RESERVE_STATUS_EXISTS}
    assert counted(sidecar, "clamped_hints") == before + 3 * clamped


@pytest.mark.parametrize("ttl_s", [math.nan, -1.0, 0.0, 1e300, math.inf])
def test_a_time_to_live_out_of_range_is_clamped_and_the_answer_says_to_what(
    sidecar: Sidecar, client: OwnClient, ttl_s: float
) -> None:
    keys = client.keys(2, 2)
    client.store(keys)
    before = counted(sidecar, "clamped_hints")
    answer = pin(client, keys, ttl_s)
    assert (answer.chunks, answer.stop) == (2, pb.PIN_STOP_COMPLETE)
    assert answer.ttl_s == (WEEK_S if ttl_s > 1 else 1.0)
    assert counted(sidecar, "clamped_hints") == before + 1
    unpin(client, answer.pin_id)


def test_pins_are_listed_until_they_are_ended_and_by_their_tenant_alone(
    sidecar: Sidecar, client: OwnClient
) -> None:
    keys = client.keys(3, 2)
    client.store(keys)
    answer = pin(client, [*keys, bytes(32)])
    assert (answer.chunks, answer.stop, answer.ttl_s) == (2, pb.PIN_STOP_MISS, 60)
    other_space = space_of("another model")
    stranger = space_of(tenant="stranger")
    with (
        OwnClient(sidecar.target, other_space, pb.DATA_PATH_INLINE) as ours,
        OwnClient(sidecar.target, stranger, pb.DATA_PATH_INLINE) as theirs,
    ):
        [listed] = pins(ours)
        assert (listed.pin_id, listed.space_digest) == (answer.pin_id, client.root)
        assert (listed.chunks, listed.nbytes) == (2, 2 * client.nbytes)
        assert 0 < listed.left_s <= 60
        assert pins(theirs) == []
        unpin(theirs, answer.pin_id)
        assert len(pins(client)) == 1
        unpin(ours, answer.pin_id)
    assert pins(client) == []
    unpin(client, answer.pin_id)


def test_nothing_held_is_no_pin(client: OwnClient) -> None:
    answer = pin(client, client.keys(4, 2))
    assert (answer.pin_id, answer.chunks, answer.stop) == (0, 0, pb.PIN_STOP_MISS)


def test_bytes_that_are_no_hints_are_refused(client: OwnClient) -> None:
    """A float of three bytes, where the message has one of four."""
    broken = b"\x1a\x04\x15" + struct.pack("<f", 1.0)[:3]
    call: Any = client.channel.unary_unary(
        "/kvtier.v1.Cache/Lookup", None, pb.LookupResponse.FromString
    )
    with pytest.raises(Exception, match="not of the protocol"):
        call(b"\x0a\x10" + client.id + broken, timeout=TIMEOUT_S)


def test_pins_beyond_the_bound_leave_others_their_room(tmp_path: Path) -> None:
    with Sidecar(tmp_path, "tenants.pin_percent=1", disk=False) as small:
        bound = 16 * 1024 * 1024 // 100 // 4096
        with OwnClient(small.target, path=pb.DATA_PATH_INLINE) as greedy:
            keys = greedy.keys(1, bound + 10)
            greedy.store(keys)
            answer = pin(greedy, keys)
            assert (answer.chunks, answer.stop) == (bound, pb.PIN_STOP_TENANT_BYTES)
            assert counted(small, "pins_cut") == 1
