"""A client that lies in every field gets refusals, never other bytes, and harms nobody else."""

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from kvtier.proto import cache_pb2 as pb
from tests.sidecar import Sidecar
from tests.wire.own_client import TIMEOUT_S, OwnClient, piece_of, refusal, space_of

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT
MAX = 2**64 - 1
WRITE = pb.RESERVE_STATUS_WRITE
STORED = pb.COMMIT_STATUS_STORED
NOT_RESERVED = pb.COMMIT_STATUS_NOT_RESERVED


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    # On disk there would be a second copy to fall back on.
    with Sidecar(tmp_path_factory.mktemp("lies"), disk=False) as running:
        yield running


@pytest.fixture
def honest(sidecar: Sidecar) -> Iterator[OwnClient]:
    with OwnClient(sidecar.target, space_of("shared")) as opened:
        yield opened


@pytest.fixture(params=["shm", "inline"])
def liar(
    request: pytest.FixtureRequest, sidecar: Sidecar, honest: OwnClient
) -> Iterator[OwnClient]:
    """A client in the honest one's space. Afterwards the honest one still has its bytes, and the
    service no lease, slot or chunk too many."""
    seed = random.Random(request.node.name).randrange(1 << 11)
    kept = honest.keys(seed, 20)
    honest.store(kept)
    path = pb.DATA_PATH_SHM if request.param == "shm" else pb.DATA_PATH_INLINE
    with OwnClient(sidecar.target, space_of("shared"), path) as opened:
        yield opened
        assert honest.verify(kept) == 20
        assert opened.verify(kept) == 20
        after = opened.keys(seed + 1, 20)
        assert opened.store(after) == 20
        assert honest.verify(after) == 20
    stats = sidecar.until(
        lambda stats: not stats.leases and stats.sessions == 1, "the liar's leases are over"
    )
    [cpu] = stats.tiers
    assert cpu.used_bytes == cpu.chunks * honest.nbytes
    honest.stub.Evict(pb.EvictRequest(session_id=honest.id, whole_space=True), timeout=TIMEOUT_S)


def write(liar: OwnClient, lease: int, chunks: dict[int, bytes], offsets: list[int]) -> Any:
    """Write chunks of a reservation and commit them, on either path."""
    if liar.arena is None:
        return liar.put(liar.pieces(lease, chunks))
    for index, chunk in chunks.items():
        liar.fill(offsets[index], chunk)
    return liar.commit(lease, chunks)


# ── Keys ──


def test_one_key_many_times_in_one_request(liar: OwnClient) -> None:
    [key] = liar.keys(1, 1)
    answers = liar.reserve(1, [key] * 100)
    assert [answer.status for answer in answers[:2]] == [WRITE, pb.RESERVE_STATUS_BEING_WRITTEN]
    assert sum(answer.status == WRITE for answer in answers) == 1
    done = write(liar, 1, {0: liar.content(key)}, [answers[0].offset])
    assert done == [(0, STORED)]
    assert liar.lookup([key] * 100).held == 100
    if liar.arena is not None:
        assert len(liar.load(2, [key] * 100)[0]) == 100
        liar.release(2)
    assert liar.verify([key] * 100) == 100


def test_a_key_that_is_its_own_parent(liar: OwnClient) -> None:
    key = os.urandom(32)
    [answer] = liar.reserve(1, [key], parent=key)
    assert answer.status == pb.RESERVE_STATUS_PARENT_MISSING


def test_parents_in_a_circle(liar: OwnClient) -> None:
    a, b, c = (os.urandom(32) for _ in range(3))
    answers = liar.reserve(1, [a, b, c])
    assert [answer.status for answer in answers] == [WRITE] * 3
    [back] = liar.reserve(2, [a], parent=c)
    assert back.status == pb.RESERVE_STATUS_BEING_WRITTEN
    offsets = [answer.offset for answer in answers]
    write(liar, 1, {index: liar.content(key) for index, key in enumerate((a, b, c))}, offsets)
    assert liar.reserve(3, [a], parent=c)[0].status == pb.RESERVE_STATUS_EXISTS
    assert liar.verify([a, b, c]) == 3
    assert liar.stub.Evict(pb.EvictRequest(session_id=liar.id, keys=a)).chunks == 3


def test_the_root_is_no_chunk(liar: OwnClient, honest: OwnClient) -> None:
    """Else whoever stores it becomes the parent of every prompt of the space."""
    status, told = refusal(lambda: liar.reserve(1, [liar.root]))
    assert (status, told.split(":")[0]) == (INVALID, "keys")
    status, _ = refusal(lambda: liar.reserve(1, [*liar.keys(1, 1), liar.root]))
    assert status == INVALID
    liar.abort(1)
    assert honest.store(honest.keys(3000, 2)) == 2
    assert honest.verify(honest.keys(3000, 2)) == 2


def test_another_space_is_no_parent(liar: OwnClient, sidecar: Sidecar) -> None:
    with OwnClient(sidecar.target, space_of("other")) as other:
        keys = other.keys(1, 2)
        other.store(keys)
        for parent in (other.root, keys[0]):
            [answer] = liar.reserve(1, [os.urandom(32)], parent=parent)
            assert answer.status == pb.RESERVE_STATUS_PARENT_MISSING
        assert liar.lookup(keys).held == 0
        assert liar.verify(keys) == 0
        other.stub.Evict(pb.EvictRequest(session_id=other.id, whole_space=True))
    sidecar.until(lambda stats: stats.sessions == 2, "the other session is over")


def test_a_false_parent_changes_no_place(liar: OwnClient, honest: OwnClient) -> None:
    """A chunk keeps the parent it came with: what a later request says of it is not believed."""
    keys, other = honest.keys(2000, 3), honest.keys(2001, 1)
    honest.store(keys)
    honest.store(other)
    answers = liar.reserve(1, keys[1:], parent=other[0])
    assert {answer.status for answer in answers} == {pb.RESERVE_STATUS_EXISTS}
    liar.stub.Evict(pb.EvictRequest(session_id=liar.id, keys=other[0]), timeout=TIMEOUT_S)
    assert honest.verify(keys) == 3


# ── Leases ──


def test_leases_of_another_session_are_out_of_reach(liar: OwnClient, honest: OwnClient) -> None:
    keys = honest.keys(2100, 2)
    lease = honest.next_lease()
    offsets = [answer.offset for answer in honest.reserve(lease, keys)]
    reading = honest.next_lease()
    honest.load(reading, honest.keys(2100, 0))
    for each in (lease, reading):
        liar.abort(each)
        liar.release(each)
        if liar.arena is not None:
            assert liar.commit(each, [0, 1]) == [(0, NOT_RESERVED), (1, NOT_RESERVED)]
        status, _ = refusal(lambda each=each: liar.put(liar.pieces(each, {0: b"x" * 4096})))
        assert status == INVALID
    for key, offset in zip(keys, offsets, strict=True):
        honest.fill(offset, honest.content(key))
    assert honest.commit(lease, [0, 1]) == [(0, STORED), (1, STORED)]
    honest.release(reading)
    assert honest.verify(keys) == 2


def test_a_lease_of_one_kind_does_not_serve_as_the_other(liar: OwnClient) -> None:
    keys = liar.keys(1, 2)
    liar.store(keys[:1])
    liar.reserve(10, keys[1:], parent=keys[0])
    liar.release(10)
    assert liar.reserve(11, keys[1:], parent=keys[0])[0].status == pb.RESERVE_STATUS_BEING_WRITTEN
    if liar.arena is None:
        return
    liar.load(12, keys[:1])
    liar.abort(12)
    assert liar.commit(12, [0]) == [(0, NOT_RESERVED)]
    status, _ = refusal(lambda: liar.load(12, keys[:1]))
    assert status == INVALID


def test_an_ended_lease_is_over(liar: OwnClient) -> None:
    keys = liar.keys(1, 2)
    offsets = [answer.offset for answer in liar.reserve(1, keys)]
    chunks = {index: liar.content(key) for index, key in enumerate(keys)}
    assert write(liar, 1, chunks, offsets) == [(0, STORED), (1, STORED)]
    if liar.arena is not None:
        assert liar.commit(1, [0, 1]) == [(0, NOT_RESERVED), (1, NOT_RESERVED)]
    liar.abort(1)
    status, _ = refusal(lambda: liar.put(liar.pieces(1, {0: bytes(4096)})))
    assert status == INVALID
    assert liar.verify(keys) == 2


def test_commit_of_what_was_not_reserved(liar: OwnClient) -> None:
    keys = liar.keys(1, 3)
    liar.reserve(1, keys)
    if liar.arena is None:
        return
    indexes = [3, 2**31, 2**32 - 1, *range(100, 1100)]
    assert {status for _, status in liar.commit(1, indexes)} == {NOT_RESERVED}
    assert liar.lookup(keys).held == 0
    assert liar.commit(1, [0]) == [(0, NOT_RESERVED)]  # that commit ended the lease


def test_commit_of_one_chunk_many_times(liar: OwnClient) -> None:
    keys = liar.keys(1, 2)
    offsets = [answer.offset for answer in liar.reserve(1, keys)]
    if liar.arena is None:
        return
    for key, offset in zip(keys, offsets, strict=True):
        liar.fill(offset, liar.content(key))
    done = liar.commit(1, [0, 0, 1, 0, 1])
    assert [status for _, status in done] == [STORED, NOT_RESERVED, STORED] + [NOT_RESERVED] * 2
    assert liar.verify(keys) == 2


def test_commit_in_the_wrong_order_publishes_no_orphan(liar: OwnClient) -> None:
    keys = liar.keys(1, 3)
    offsets = [answer.offset for answer in liar.reserve(1, keys)]
    if liar.arena is None:
        return
    for key, offset in zip(keys, offsets, strict=True):
        liar.fill(offset, liar.content(key))
    missing = pb.COMMIT_STATUS_PARENT_MISSING
    assert liar.commit(1, [2, 1, 0]) == [(2, missing), (1, missing), (0, STORED)]
    assert liar.lookup(keys).held == 1
    assert liar.lookup(keys[1:]).held == 0


def test_without_the_arena_nothing_is_committed_unwritten(
    liar: OwnClient, sidecar: Sidecar
) -> None:
    """A slot has bytes of whoever had it before: a client that cannot see the arena must not be
    able to publish them to itself."""
    if liar.arena is not None:
        return
    with OwnClient(sidecar.target, space_of("secret", tenant="another")) as other:
        secret = other.keys(1, 50)
        other.store(secret)
        other.stub.Evict(pb.EvictRequest(session_id=other.id, whole_space=True))
        keys = liar.keys(1, 60)
        liar.reserve(1, keys)
        status, _ = refusal(lambda: liar.commit(1, range(60)))
        assert status == INVALID
        assert liar.get(keys)[0] == []
        liar.abort(1)
    sidecar.until(lambda stats: stats.sessions == 2, "the other session is over")


def test_a_lease_per_chunk(liar: OwnClient, honest: OwnClient) -> None:
    keys = [os.urandom(32) for _ in range(500)]
    for lease, key in enumerate(keys, start=1):
        assert liar.reserve(lease, [key])[0].status == WRITE
    assert honest.store(honest.keys(2200, 3)) == 3
    for lease in range(1, 501, 2):
        liar.abort(lease)
    assert {answer.status for answer in liar.reserve(1, keys[::2])} == {WRITE}
    assert honest.verify(honest.keys(2200, 3)) == 3


# ── Put ──


PIECES: dict[str, Callable[[OwnClient], list[pb.PutRequest]]] = {
    "beyond the chunk": lambda liar: [piece_of(0, bytes(liar.nbytes + 1))],
    "beyond the chunk, later": lambda liar: [piece_of(0, bytes(4000)), piece_of(0, bytes(97))],
    "after the chunk": lambda liar: [*list(liar.pieces(1, right(liar)))[1:], piece_of(0, b"x")],
    "empty": lambda liar: [piece_of(0, b"")],
    "of nothing": lambda liar: [pb.PutRequest()],
    "a second header": lambda liar: [liar.header(1)],
    "not reserved": lambda liar: [piece_of(3, bytes(10))],
    "a giant index": lambda liar: [piece_of(2**32 - 1, bytes(10))],
}  # fmt: skip


def right(liar: OwnClient) -> dict[int, bytes]:
    """The right bytes of the first chunk of the prompt that the tests of Put reserve."""
    return {0: liar.content(liar.keys(1, 1)[0])}


@pytest.mark.parametrize("lie", PIECES)
def test_a_false_piece_ends_the_put_and_publishes_nothing(liar: OwnClient, lie: str) -> None:
    keys = liar.keys(1, 3)
    liar.reserve(1, keys)
    second = {1: liar.content(keys[1])}
    messages = [*liar.pieces(1, second), *PIECES[lie](liar)]
    assert refusal(lambda: liar.put(messages))[0] == INVALID
    assert liar.lookup(keys).held == 0
    assert [answer.status for answer in liar.reserve(2, keys)] == [WRITE] * 3


def test_pieces_that_are_wrong_or_missing(liar: OwnClient) -> None:
    keys = liar.keys(1, 4)
    liar.reserve(1, keys)
    first, second, third, _ = (liar.content(key) for key in keys)
    messages = list(liar.pieces(1, {0: first, 1: second}))
    messages += [piece_of(2, third[2000:], 0), piece_of(2, third[:2000], 7)]  # in the wrong order
    messages += [piece_of(3, bytes(4095))]  # one byte short
    done = dict(liar.put(messages))
    assert done == {0: STORED, 1: STORED, 2: pb.COMMIT_STATUS_CORRUPT}
    assert liar.verify(keys) == 2


@pytest.mark.parametrize("digest", [0, 1, MAX])
def test_a_false_checksum(liar: OwnClient, digest: int) -> None:
    keys = liar.keys(1, 1)
    liar.reserve(1, keys)
    done = liar.put([liar.header(1), piece_of(0, bytes(4096), digest)])
    assert done == [(0, pb.COMMIT_STATUS_CORRUPT)]
    assert liar.lookup(keys).held == 0


def test_two_puts_of_one_lease_never_mix(liar: OwnClient) -> None:
    """The second is refused: it would write into what the first has verified already."""
    keys = liar.keys(1, 1)
    liar.reserve(1, keys)
    first_is_in, may_end = Gate(), Gate()

    def first() -> Iterator[pb.PutRequest]:
        yield from liar.pieces(1, {0: liar.content(keys[0])})
        first_is_in.open()
        may_end.wait()

    call = liar.stub.Put.future(first(), timeout=TIMEOUT_S)
    first_is_in.wait()
    status, _ = refusal(lambda: liar.put([liar.header(1), piece_of(0, b"x" * 10)]))
    may_end.open()
    call.exception(TIMEOUT_S)
    assert liar.verify(keys) <= 1
    assert status == INVALID


class Gate:
    """Closed until it is opened."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def open(self) -> None:
        os.close(self._write)

    def wait(self) -> None:
        os.read(self._read, 1)
        os.close(self._read)
