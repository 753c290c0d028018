"""The cache inside the engine's process keeps every promise that the sidecar keeps."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvtier
from kvtier.client import Client
from kvtier.errors import ConfigError
from kvtier.service.embedded import EmbeddedCore, InProcessTransport
from tests.sidecar import HANG_S, content_of, load, offload, prompt_of, space_of, until

SPACE = space_of()
CHUNKS = 4096  # in an arena of 16 MiB


@pytest.fixture
def client() -> Iterator[Client]:
    with kvtier.open(SPACE, cpu="16MiB", deadline_s=HANG_S) as opened:
        yield opened


def test_a_reader_keeps_its_slots_when_its_session_is_given_up(client: Client) -> None:
    """As it is after three deadlines that passed, or in another thread."""
    prefix = client.prefix(prompt_of(1, 50))
    offload(client, prefix)
    with client.load(prefix) as loaded:
        chunks = list(loaded)
        session = client._connection.session
        assert session is not None
        client._connection.drop(session, "for the test")
        until(lambda: client.connected, "another session")
        client.evict(None)
        for seed in range(10, 10 + 2 * CHUNKS // 256):
            offload(client, client.prefix(prompt_of(seed, 256)))
        for chunk in chunks:
            assert bytes(chunk.data) == content_of(prefix[chunk.index], SPACE.layout.nbytes)


def test_a_writer_keeps_its_slots_when_its_session_is_given_up(client: Client) -> None:
    prefix, later = client.prefix(prompt_of(1, 50)), client.prefix(prompt_of(2, 256))
    with client.offload(prefix) as wanted:
        slot = next(iter(wanted))
        session = client._connection.session
        assert session is not None
        client._connection.drop(session, "for the test")
        until(lambda: client.connected, "another session")
        for seed in range(10, 10 + CHUNKS // 256):
            offload(client, client.prefix(prompt_of(seed, 256)))
        offload(client, later)
        slot.data[:] = b"\xee" * SPACE.layout.nbytes
        for seed in range(10, 10 + CHUNKS // 256):
            load(client, client.prefix(prompt_of(seed, 256)))
        assert load(client, later) == 256
    assert wanted.outcome.stored == []


def test_leases_of_a_session_that_was_given_up_come_back(client: Client) -> None:
    prefix = client.prefix(prompt_of(1, 50))
    offload(client, prefix)
    with client.load(prefix) as loaded:
        list(loaded)
        session = client._connection.session
        assert session is not None
        client._connection.drop(session, "for the test")

    def no_leases() -> bool:
        stats = client.stats()
        return stats is not None and stats.leases == 0

    until(no_leases, "the leases are over")
    assert load(client, prefix) == 50


def test_closing_during_a_load_raises_nothing(client: Client) -> None:
    prefix = client.prefix(prompt_of(1, 10))
    offload(client, prefix)
    with client.load(prefix) as loaded:
        client.close()
        assert list(loaded) == []


def test_closing_during_an_offload_raises_nothing(client: Client) -> None:
    prefix = client.prefix(prompt_of(1, 10))
    with client.offload(prefix) as wanted:
        for slot in wanted:
            slot.write(memoryview(bytes(SPACE.layout.nbytes)))
            client.close()
    assert set(wanted.outcome.refused) == set(range(10))


def test_closing_while_threads_use_it_raises_nothing_and_ends() -> None:
    """Whatever they were doing, they are told of a miss, and none waits for ever."""
    failures: list[BaseException] = []
    for _ in range(5):
        client = kvtier.open(SPACE, cpu="16MiB", deadline_s=HANG_S)
        prefix = client.prefix(prompt_of(1, 20))
        offload(client, prefix)
        started, stop = threading.Barrier(4), threading.Event()

        def use(client: Client, number: int, begun: threading.Barrier) -> None:
            try:
                begun.wait(HANG_S)
                for seed in range(number * 100, number * 100 + 100):
                    offload(client, client.prefix(prompt_of(seed, 20)))
                    load(client, client.prefix(prompt_of(1, 20)))
                    client.lookup(client.prefix(prompt_of(seed, 20)))
            except BaseException as error:  # noqa: BLE001 - it is what this test looks for
                failures.append(error)

        threads = [threading.Thread(target=use, args=(client, n, started)) for n in range(1, 4)]
        for thread in threads:
            thread.start()
        started.wait(HANG_S)
        client.close()
        stop.set()
        for thread in threads:
            thread.join(HANG_S)
            assert not thread.is_alive()
    assert failures == []


def test_an_error_of_the_service_is_a_miss(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = client.prefix(prompt_of(1, 10))
    offload(client, prefix)
    session = client._connection.session
    assert session is not None
    assert isinstance(session.transport, InProcessTransport)
    cache = session.transport._core._core.cache

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a mistake of ours")

    for name in ("lookup", "load", "reserve_in_pieces", "commit_in_pieces", "prefetch", "evict"):
        monkeypatch.setattr(cache, name, broken)
    assert client.lookup(prefix) == 0
    assert load(client, prefix) == 0
    until(lambda: client.connected, "another session")
    assert set(offload(client, client.prefix(prompt_of(2, 10))).refused) == set(range(10))
    assert client.prefetch(prefix) == 0
    assert client.evict(prefix) == 0
    monkeypatch.undo()
    until(lambda: load(client, prefix) == 10, "it works again")


def test_the_disk_is_free_again_when_the_arena_cannot_be_made(tmp_path: Path) -> None:
    disk = f"disk.directory={tmp_path / 'disk'}"
    with pytest.raises(ConfigError, match="cpu"):
        EmbeddedCore(["cpu.capacity=64TiB", disk])
    with kvtier.open(SPACE, cpu="16MiB", disk=str(tmp_path / "disk")) as client:
        prefix = client.prefix(prompt_of(1, 10))
        assert len(offload(client, prefix).stored) == 10


def test_nothing_is_left_in_memory_when_the_disk_is_taken(tmp_path: Path) -> None:
    memory, disk = f"cpu.directory={tmp_path}", f"disk.directory={tmp_path / 'disk'}"
    small = "cpu.capacity=16MiB"
    core = EmbeddedCore([small, memory, disk])
    with pytest.raises(ConfigError, match=r"disk\.directory"):
        EmbeddedCore([small, memory, disk])
    assert len(list(tmp_path.glob("kvtier-*.arena"))) == 1
    core.close()
    assert list(tmp_path.glob("kvtier-*")) == []


def test_what_is_on_disk_is_back_after_closing(tmp_path: Path) -> None:
    for already in (0, 300):
        with kvtier.open(SPACE, cpu="16MiB", disk=str(tmp_path / "disk")) as client:
            prefix = client.prefix(prompt_of(1, 300))
            assert load(client, prefix) == already
            assert len(offload(client, prefix).existing) == already
