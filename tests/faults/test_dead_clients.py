"""A client that dies, is cut off or stands still harms nobody, and what it leased comes back."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.client import ServiceStats
from kvtier.proto import cache_pb2 as pb
from tests.client_process import ClientProcess
from tests.sidecar import Sidecar
from tests.wire.own_client import TIMEOUT_S, OwnClient, space_of

WRITE = pb.RESERVE_STATUS_WRITE
STORED = pb.COMMIT_STATUS_STORED
SLOTS = 4096  # of 4 KiB each, in an arena of 16 MiB
BATCH = 256


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    with Sidecar(tmp_path, disk=False) as running:
        yield running


@pytest.fixture
def other(sidecar: Sidecar) -> Iterator[OwnClient]:
    """A client that stays, with chunks that must stay right."""
    with OwnClient(sidecar.target) as opened:
        keys = opened.keys(900, 50)
        opened.store(keys)
        yield opened
        assert opened.verify(keys) == 50 or evicted(opened, keys)


def evicted(client: OwnClient, keys: list[bytes]) -> bool:
    """Whether chunks are missing for the honest reason."""
    request = pb.ExplainRequest(session_id=client.id, keys=b"".join(keys))
    states = {each.state for each in client.stub.Explain(request, timeout=TIMEOUT_S).keys}
    return states <= {pb.KEY_STATE_RAM, pb.KEY_STATE_EVICTED}


def only_chunks_take_room(stats: ServiceStats) -> bool:
    """No lease is open, and no slot is in use but for a chunk."""
    [cpu] = stats.tiers
    return stats.leases == 0 and cpu.used_bytes == 4096 * cpu.chunks


def come_back(sidecar: Sidecar) -> None:
    sidecar.until(only_chunks_take_room, "the dead client's slots are back")


def fill_arena(client: OwnClient, seed: int, share: float = 1.0) -> None:
    """Store as many new chunks as the arena has slots, which reuses every slot that may be."""
    for batch in range(int(share * SLOTS) // BATCH):
        keys = client.keys(seed + batch, BATCH)
        client.store(keys)
        client.verify(keys)


# ── Killed ──


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_before_commit(sidecar: Sidecar, other: OwnClient, share: float) -> None:
    with ClientProcess(sidecar.target) as victim:
        keys = other.keys(1, 100)
        assert victim.ask("reserve", seed=1, chunks=100) == [WRITE] * 100
        victim.ask("fill", seed=1, share=share)
        assert other.lookup(keys).held == 0
        victim.kill()
    come_back(sidecar)
    assert other.lookup(keys).held == 0
    assert other.verify(keys) == 0
    assert other.store(keys) == 100
    assert other.verify(keys) == 100


@pytest.mark.slow
def test_killed_at_any_moment(sidecar: Sidecar, other: OwnClient) -> None:
    """What it committed is whole, what it did not commit is not there."""
    chance = random.Random(1)
    for seed in range(0, 5000, 1000):
        with ClientProcess(sidecar.target) as victim:
            victim.tell("store_for_ever", seed=seed, chunks=20)
            done = [victim.answer() for _ in range(chance.randrange(1, 40))]
            victim.kill()
        come_back(sidecar)
        for each in done:
            assert other.verify(other.keys(each, 20)) == 20
        for each in range(done[-1], done[-1] + 30):
            assert other.verify(other.keys(each, 20)) in (0, 20)


def test_killed_in_the_middle_of_a_put(sidecar: Sidecar, other: OwnClient) -> None:
    keys = other.keys(1, 3)
    with ClientProcess(sidecar.target, "inline") as victim:
        assert victim.ask("begin_put", seed=1, chunks=3)
        victim.kill()
    come_back(sidecar)
    assert other.verify(keys) <= 1  # the first had arrived whole
    assert other.store(keys) >= 2
    assert other.verify(keys) == 3


def test_killed_while_it_reads(sidecar: Sidecar, other: OwnClient) -> None:
    other.store(other.keys(1, 200))
    with ClientProcess(sidecar.target) as victim:
        assert victim.ask("load", seed=1, chunks=200) == 200
        assert sidecar.stats().leases == 1
        victim.kill()
    come_back(sidecar)
    fill_arena(other, 10)
    assert other.verify(other.keys(10 + SLOTS // BATCH - 1, BATCH)) == BATCH


def test_a_process_that_it_forked_keeps_nothing_leased(sidecar: Sidecar, other: OwnClient) -> None:
    other.store(other.keys(1, 10))
    with ClientProcess(sidecar.target) as victim:
        assert victim.ask("load", seed=1, chunks=10) == 10
        orphan = victim.ask("fork")
        try:
            victim.kill()
            come_back(sidecar)
        finally:
            os.kill(orphan, signal.SIGKILL)


# ── Cut off, but alive ──


def test_cut_off_readers_keep_their_slots_until_they_let_go(
    sidecar: Sidecar, other: OwnClient
) -> None:
    other.store(other.keys(1, 200))
    with ClientProcess(sidecar.target) as reader:
        assert reader.ask("load", seed=1, chunks=200) == 200
        reader.ask("disconnect")
        sidecar.until(lambda stats: stats.sessions == 1, "its session is over")
        other.stub.Evict(pb.EvictRequest(session_id=other.id, whole_space=True), timeout=TIMEOUT_S)
        fill_arena(other, 10, 1.5)
        assert reader.ask("check"), "a leased slot was reused"
        assert sidecar.stats().leases == 1
        reader.ask("let_tether_go")
        come_back(sidecar)


def test_cut_off_writers_scribble_on_nobody(sidecar: Sidecar, other: OwnClient) -> None:
    with ClientProcess(sidecar.target) as writer:
        assert writer.ask("reserve", seed=1, chunks=200) == [WRITE] * 200
        writer.ask("disconnect")
        sidecar.until(lambda stats: stats.sessions == 1, "its session is over")
        assert other.reserve(1, other.keys(1, 1))[0].status == pb.RESERVE_STATUS_BEING_WRITTEN
        fill_arena(other, 10)
        writer.ask("scribble", seed=1)
        for batch in range(SLOTS // BATCH):
            other.verify(other.keys(10 + batch, BATCH))
        writer.kill()
    come_back(sidecar)
    assert other.store(other.keys(1, 200)) == 200
    assert other.verify(other.keys(1, 200)) == 200


def test_cut_off_and_back(sidecar: Sidecar, other: OwnClient) -> None:
    """Its new session does not inherit the old one's leases, which end with the old tether."""
    with OwnClient(sidecar.target) as again:
        reserved = again.reserve(1, again.keys(1, 10))
        assert [answer.status for answer in reserved] == [WRITE] * 10
    come_back(sidecar)
    with OwnClient(sidecar.target) as again:
        assert again.store(again.keys(1, 10)) == 10
        assert other.verify(other.keys(1, 10)) == 10


# ── Standing still ──


def test_a_stopped_client_keeps_its_leases(sidecar: Sidecar, other: OwnClient) -> None:
    other.store(other.keys(1, 100))
    with ClientProcess(sidecar.target) as stopped:
        assert stopped.ask("load", seed=1, chunks=100) == 100
        assert stopped.ask("reserve", seed=2, chunks=100) == [WRITE] * 100
        stopped.ask("fill", seed=2, share=0.5)
        stopped.signal(signal.SIGSTOP)
        fill_arena(other, 10, 1.5)
        assert sidecar.stats().leases == 2
        assert other.reserve(1, other.keys(2, 1))[0].status == pb.RESERVE_STATUS_BEING_WRITTEN
        stopped.signal(signal.SIGCONT)
        assert stopped.ask("check"), "a leased slot was reused"
        stopped.ask("fill", seed=2, share=1.0)
        assert stopped.ask("commit", seed=2) == [STORED] * 100
        assert other.verify(other.keys(2, 100)) == 100


def test_many_sessions_cut_off_as_they_open(sidecar: Sidecar, other: OwnClient) -> None:
    """The end of a call finds its session whatever the call was doing."""
    request = pb.OpenSessionRequest(space=space_of("cut off"), paths=[pb.DATA_PATH_INLINE])
    for count in range(300):
        call = other.stub.OpenSession(request, timeout=TIMEOUT_S)
        if count % 3:
            next(call)
        call.cancel()
    sidecar.until(lambda stats: stats.sessions == 1, "all sessions are over")


def test_reads_cut_off_at_any_message(sidecar: Sidecar, other: OwnClient) -> None:
    keys = other.keys(1, 100)
    other.store(keys)
    for count in range(200):
        request = pb.GetRequest(session_id=other.id, keys=b"".join(keys))
        call = other.stub.Get(request, timeout=TIMEOUT_S)
        for _ in range(count % 7):
            next(call)
        call.cancel()
    come_back(sidecar)
    for lease in range(200):
        loading = other.stub.Load(
            pb.LoadRequest(session_id=other.id, lease_id=lease, keys=b"".join(keys))
        )
        if lease % 2:
            next(loading)
        loading.cancel()
        other.release(lease)
    come_back(sidecar)


def test_reservations_cut_off_before_their_answer(sidecar: Sidecar, other: OwnClient) -> None:
    """The abort that follows finds the reservation, in whatever order the two arrive."""
    for lease in range(1, 300):
        request = pb.ReserveRequest(
            session_id=other.id,
            lease_id=lease,
            keys=b"".join(other.keys(lease, 10)),
            parent=other.root,
        )
        call = other.stub.Reserve.future(request, timeout=TIMEOUT_S)
        call.cancel()
        other.abort(lease)
    come_back(sidecar)
