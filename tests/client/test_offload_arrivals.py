"""Chunks that a device writes while the loop goes on: none is committed before it has arrived.

The client is the real one; the service is a fake that looks at what is committed when it is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.client import Client, connect
from kvtier.client.offloading import NOT_ARRIVED, NOT_WRITTEN
from kvtier.kernels.device import Device, DeviceFault, Event, Region, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos, HostEvent, HostStream
from kvtier.proto import cache_pb2 as pb
from tests.contracts.device import buffer
from tests.faults.fake_service import FakeService
from tests.kernels.forgetful import Forgetful
from tests.sidecar import HANG_S, content_of, prompt_of, space_of, until

SPACE = space_of()
NBYTES = SPACE.layout.nbytes
CHUNKS = 5


class Witness(FakeService):
    """Keeps what the slots hold when they are committed. Reservations are of `step` chunks."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, SPACE)
        self.step = 2
        self.seen: dict[bytes, bytes] = {}

    def opened(self, path: "pb.DataPath.ValueType") -> pb.SessionOpened:
        inline = path == pb.DATA_PATH_INLINE
        opened = super().opened(path if inline else pb.DATA_PATH_SHM)
        opened.max_keys = self.step
        return opened

    def _commit(self, request: pb.CommitRequest) -> Any:
        keys = self._reserved[request.lease_id]
        for index in request.indexes:
            self.seen[keys[index]] = bytes(self.slot(keys[index]))
        return super()._commit(request)


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    with Witness(tmp_path) as service:
        yield service


class Writer:
    """An engine's chunks in memory of a device, and the stream that copies them out."""

    def __init__(self, client: Client, device: Device) -> None:
        self.prefix = client.prefix(prompt_of(1, CHUNKS))
        self.device = device
        self.stream = device.stream(Urgency.OFFLOADS)
        contents = [content_of(key, NBYTES) for key in self.prefix]
        self.source: Region = device.register(buffer(b"".join(contents)))

    def copy(self, slot: Any) -> Event:
        assert slot.span is not None
        span = self.source.span(slot.index * NBYTES, NBYTES)
        self.device.copy(self.stream, [(slot.span, span)])
        return self.stream.record()


def open_client(witness: Witness, device: Device | None, path: str = "shm") -> Client:
    client = connect(witness.target, SPACE, deadline_s=HANG_S, device=device, path=path)
    assert client.wait_ready(HANG_S)
    return client


def offload_late(witness: Witness, device: Device) -> bool:
    """Offload with arrivals; whether each chunk was right when it was committed."""
    client = open_client(witness, device)
    writer = Writer(client, device)
    with client.offload(writer.prefix) as offload:
        for slot in offload:
            slot.arrival = writer.copy(slot)
    assert offload.outcome.stored == list(range(CHUNKS))
    client.close()
    return witness.seen == {key: content_of(key, NBYTES) for key in writer.prefix}


@pytest.mark.parametrize("step", [1, 2, 64])
@pytest.mark.parametrize("seed", range(4))
def test_a_chunk_has_arrived_when_it_is_committed(witness: Witness, step: int, seed: int) -> None:
    witness.step = step
    device = HostDevice(Chaos(seed))
    assert offload_late(witness, device)
    device.close()


def test_each_arrival_is_waited_for(tmp_path: Path) -> None:
    """With one chunk in each batch, each wait that is removed shows."""
    for forget in range(CHUNKS):
        noticed = 0
        for seed in range(4):
            with Witness(tmp_path / f"{forget}-{seed}") as witness:
                witness.step = 1
                device = Forgetful(HostDevice(Chaos(seed)), forget)
                noticed += not offload_late(witness, device)
                assert device.waits == CHUNKS
                device.close()
        assert noticed, f"nothing noticed that wait {forget} was missing"


def test_the_loop_does_not_wait_for_an_arrival(witness: Witness) -> None:
    device = HostDevice(Chaos(0))
    witness.step = 64
    with open_client(witness, device) as client:
        writer = Writer(client, device)
        with client.offload(writer.prefix) as offload:
            for slot in offload:
                slot.arrival = writer.copy(slot)
                assert not any(witness.slot(writer.prefix[slot.index]))
                assert "Commit" not in witness.calls
    assert len(witness.seen) == CHUNKS
    device.close()


@pytest.mark.parametrize("step", [1, 2, 64])
@pytest.mark.parametrize("bad", range(CHUNKS))
def test_what_does_not_arrive_is_not_committed_and_nothing_after_it(
    witness: Witness, step: int, bad: int
) -> None:
    def fail() -> None:
        raise ValueError("on fire")

    witness.step = step
    device = HostDevice(Chaos(bad))
    with open_client(witness, device) as client:
        writer = Writer(client, device)
        offload = client.offload(writer.prefix)
        assert isinstance(writer.stream, HostStream)
        with pytest.raises(DeviceFault, match="on fire"), offload:  # noqa: PT012
            for slot in offload:
                if slot.index == bad:
                    writer.stream.queue(fail)
                slot.arrival = writer.copy(slot)
        good = writer.prefix.keys[:bad]
        assert witness.seen == {key: content_of(key, NBYTES) for key in good}
        assert offload.outcome.stored == list(range(bad))
        assert offload.outcome.refused == dict.fromkeys(range(bad, CHUNKS), NOT_ARRIVED)
        assert client.connected  # the service is well
        if bad % step == 0:  # nothing of its batch was good
            until(lambda: "Abort" in witness.calls, "the reservation is given back")
    device.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_slot_is_given_up_only_when_nobody_writes_into_it(witness: Witness, seed: int) -> None:
    """One chunk fails on a stream; the next is on another, which goes on."""

    def fail() -> None:
        raise ValueError("on fire")

    device = HostDevice(Chaos(seed))
    witness.step = 64
    with open_client(witness, device) as client:
        writer = Writer(client, device)
        streams = [device.stream(Urgency.OFFLOADS) for _ in range(2)]
        assert isinstance(streams[0], HostStream)
        streams[0].queue(fail)
        arrivals = []
        with pytest.raises(DeviceFault), client.offload(writer.prefix[:2]) as offload:  # noqa: PT012
            for slot in offload:
                writer.stream = streams[slot.index]
                slot.arrival = writer.copy(slot)
                arrivals.append(slot.arrival)
        assert isinstance(arrivals[1], HostEvent)
        assert arrivals[1].finished.is_set()
        assert witness.seen == {}
    device.close()


@pytest.mark.parametrize("how", ["break", "raise"])
def test_a_loop_that_is_left_commits_what_it_had_gone_on_from(witness: Witness, how: str) -> None:
    class Left(Exception):
        pass

    device = HostDevice(Chaos(1))
    witness.step = 64
    with open_client(witness, device) as client:
        writer = Writer(client, device)
        offload = client.offload(writer.prefix)
        try:
            with offload:
                for slot in offload:
                    slot.arrival = writer.copy(slot)
                    if slot.index == 2 and how == "break":
                        break
                    if slot.index == 2:
                        raise Left
        except Left:
            assert how == "raise"
        assert offload.outcome.stored == [0, 1]
        assert offload.outcome.refused == dict.fromkeys((2, 3, 4), NOT_WRITTEN)
        assert [*witness.seen.values()] == [content_of(key, NBYTES) for key in writer.prefix[:2]]
        writer.stream.synchronize()
    device.close()


def test_what_ended_the_loop_is_raised_and_not_the_fault(witness: Witness) -> None:
    def fail() -> None:
        raise ValueError("on fire")

    device = HostDevice(Chaos(1))
    witness.step = 64
    with open_client(witness, device) as client:
        writer = Writer(client, device)
        assert isinstance(writer.stream, HostStream)
        writer.stream.queue(fail)
        with pytest.raises(KeyboardInterrupt), client.offload(writer.prefix) as offload:  # noqa: PT012
            for slot in offload:
                slot.arrival = writer.copy(slot)
                if slot.index == 1:
                    raise KeyboardInterrupt
        assert offload.outcome.stored == []
        assert witness.seen == {}
    device.close()


def test_chunks_that_are_written_at_once_may_come_between(witness: Witness) -> None:
    device = HostDevice(Chaos(3))
    witness.step = 64
    with open_client(witness, device) as client:
        writer = Writer(client, device)
        with client.offload(writer.prefix) as offload:
            for slot in offload:
                if slot.index % 2:
                    slot.write(memoryview(content_of(writer.prefix[slot.index], NBYTES)))
                else:
                    slot.arrival = writer.copy(slot)
        assert offload.outcome.stored == list(range(CHUNKS))
        assert witness.seen == {key: content_of(key, NBYTES) for key in writer.prefix}
    device.close()


def test_over_inline_an_arrival_is_waited_for_at_once(witness: Witness) -> None:
    """Its buffer is sent when the loop goes on."""
    device = HostDevice(Chaos(3))
    memory = device.stream(Urgency.LOADS)
    with open_client(witness, None, "inline") as client:
        prefix = client.prefix(prompt_of(1, CHUNKS))
        with client.offload(prefix) as offload:
            for slot in offload:
                window = device.register(slot.data)
                source = device.register(buffer(content_of(prefix[slot.index], NBYTES)))
                device.copy(memory, [(window.span(0, NBYTES), source.span(0, NBYTES))])
                slot.arrival = memory.record()
        assert offload.outcome.stored == list(range(CHUNKS))
        for key in prefix:
            assert witness.slot(key) == content_of(key, NBYTES)
    device.close()
