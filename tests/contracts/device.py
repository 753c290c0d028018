"""What every device keeps."""

import mmap
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.kernels.device import (
    HANDLE_BYTES,
    Device,
    DeviceError,
    OutOfDeviceMemory,
    Place,
    Region,
    Urgency,
)

ROOT = Path(__file__).resolve().parent.parent.parent
NBYTES = 1 << 20
HANG_S = 60

# A process that opens what its arguments name, or exports what it wrote, and waits to be told to
# end. `python -c OTHER name handle|- seed`.
OTHER = """
import sys
from kvtier.kernels.devices import open_device
from tests.contracts.device import NBYTES, fill, pattern, read
name, handle, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = open_device(name)
if handle == "-":
    region = device.allocate(NBYTES)
    fill(device, region, pattern(seed))
    print(device.export(region).hex(), flush=True)
    sys.stdin.readline()
else:
    region = device.open(bytes.fromhex(handle), NBYTES)
    print(read(device, region) == pattern(seed), flush=True)
    fill(device, region, pattern(seed + 1))
device.close()
"""


def pattern(seed: int, nbytes: int = NBYTES) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def buffer(content: bytes) -> memoryview:
    """Host memory on pages of its own, as CUDA pins them."""
    memory = memoryview(mmap.mmap(-1, len(content)))
    memory[:] = content
    return memory


def fill(device: Device, region: Region, content: bytes) -> None:
    """Write a region, and wait."""
    source = device.register(buffer(content))
    stream = device.stream(Urgency.OFFLOADS)
    device.copy(stream, [(region.span(0, len(content)), source.span(0, len(content)))])
    stream.synchronize()
    device.release(source)


def read(device: Device, region: Region) -> bytes:
    """All bytes of a region, once no work is left that could change them."""
    memory = buffer(bytes(region.nbytes))
    target = device.register(memory)
    stream = device.stream(Urgency.LOADS)
    device.copy(stream, [(target.span(0, region.nbytes), region.span(0, region.nbytes))])
    stream.synchronize()
    device.release(target)
    return bytes(memory)


def other_process(device: Device, handle: str, seed: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, device.name, handle, str(seed)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def need_kernels(device: Device) -> None:
    """Skip the test where the device has no kernels, for want of a compiler."""
    if device.name == "host":
        compiled = pytest.importorskip("kvtier.kernels.compiled", exc_type=ImportError)
        try:
            compiled.HostKernels()
        except DeviceError as error:
            pytest.skip(str(error))


def gather_job(chunk: Region, cache: Region) -> bytes:
    """The job by which `kvtier_gather_1` copies a whole region, as one row (csrc/paged.cu)."""
    one = [1, 1 << 31, 31]
    shift = 31 + (cache.nbytes - 1).bit_length()
    row = [cache.nbytes, -(-(1 << shift) // cache.nbytes), shift]
    head = [cache.nbytes, 1, *row, *one, *one, *one, 1, 0, 0, 0, 0, 24]
    return struct.pack("<26q", *head, chunk.address, 0, 0, 1, cache.address, 0)


class DeviceInOneProcess:
    """Subclass it and open the device. A few MiB must fit, 2**50 bytes must not."""

    def open(self) -> Device:
        raise NotImplementedError

    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = self.open()
        yield device
        device.close()

    def test_it_says_what_its_figures_rest_on(self, device: Device) -> None:
        assert device.describe()["model"]

    @pytest.mark.parametrize("nbytes", [1, 4095, 4096, NBYTES + 1])
    def test_what_was_copied_in_is_copied_out(self, device: Device, nbytes: int) -> None:
        region = device.allocate(nbytes)
        assert (region.place, region.nbytes) == (Place.DEVICE, nbytes)
        fill(device, region, pattern(1, nbytes))
        assert read(device, region) == pattern(1, nbytes)

    def test_parts_are_copied_within_the_device(self, device: Device) -> None:
        one, other = device.allocate(NBYTES), device.allocate(NBYTES)
        fill(device, one, pattern(1))
        fill(device, other, pattern(2))
        stream = device.stream(Urgency.LOADS)
        device.copy(stream, [(other.span(7, 1000), one.span(500_000, 1000))])
        stream.synchronize()
        expected = bytearray(pattern(2))
        expected[7:1007] = pattern(1)[500_000:501_000]
        assert read(device, other) == expected
        assert read(device, one) == pattern(1)

    def test_a_batch_copies_every_pair(self, device: Device) -> None:
        piece, count = 4 << 10, NBYTES // (4 << 10)
        region = device.allocate(NBYTES)
        memory = buffer(pattern(1))
        host = device.register(memory)
        assert host.place is Place.HOST
        order = random.Random(0).sample(range(count), count)
        stream = device.stream(Urgency.LOADS)
        device.copy(
            stream,
            [
                (region.span(to * piece, piece), host.span(out_of * piece, piece))
                for to, out_of in enumerate(order)
            ],
        )
        device.copy(stream, [])
        stream.synchronize()
        assert read(device, region) == b"".join(
            pattern(1)[piece * each : piece * (each + 1)] for each in order
        )

    def test_sizes_that_differ_are_refused_and_nothing_is_copied(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        fill(device, region, pattern(1))
        stream = device.stream(Urgency.LOADS)
        wrong = [
            (region.span(0, 8), region.span(8, 8)),
            (region.span(16, 8), region.span(32, 9)),
        ]
        with pytest.raises(ValueError, match="copy: 9 bytes to a span of 8"):
            device.copy(stream, wrong)
        stream.synchronize()
        assert read(device, region) == pattern(1)

    def test_a_span_outside_its_region_is_refused(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        for offset, nbytes in ((-1, 1), (0, NBYTES + 1), (NBYTES, 1), (0, -1)):
            with pytest.raises(ValueError, match="span"):
                region.span(offset, nbytes)

    def test_memory_runs_out_and_what_there_is_stays_usable(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        with pytest.raises(OutOfDeviceMemory, match=str(1 << 50)):
            device.allocate(1 << 50)
        fill(device, region, pattern(3))
        assert read(device, region) == pattern(3)

    @pytest.mark.parametrize("nbytes", [0, -1])
    def test_memory_of_no_bytes_is_refused(self, device: Device, nbytes: int) -> None:
        with pytest.raises(ValueError, match="at least one"):
            device.allocate(nbytes)

    @pytest.mark.parametrize("nbytes", [0, -1])
    def test_no_bytes_of_a_handle_are_refused(self, device: Device, nbytes: int) -> None:
        with pytest.raises(ValueError, match="at least one"):
            device.open(device.export(device.allocate(NBYTES)), nbytes)

    def test_what_was_released_is_no_region_any_more(self, device: Device) -> None:
        region, kept = device.allocate(NBYTES), device.allocate(NBYTES)
        device.release(region)
        with pytest.raises(ValueError, match="released"):
            device.release(region)
        with pytest.raises(ValueError, match="released"):
            device.copy(device.stream(Urgency.LOADS), [(kept.span(0, 1), region.span(0, 1))])

    def test_read_only_memory_is_not_registered(self, device: Device) -> None:
        with pytest.raises(DeviceError, match="writable"):
            device.register(memoryview(bytes(4096)))
        with pytest.raises(DeviceError, match="contiguous"):
            device.register(buffer(bytes(4096))[::2])

    def test_registered_memory_is_used_in_place_and_held_until_released(
        self, device: Device
    ) -> None:
        mapping = mmap.mmap(-1, 4096)
        region = device.register(memoryview(mapping))
        with pytest.raises(DeviceError, match="register"):
            device.register(memoryview(mapping))
        mapping[:5] = b"later"
        assert read(device, region)[:5] == b"later"
        with pytest.raises(BufferError):
            mapping.close()
        device.release(region)
        mapping.close()

    def test_work_on_a_stream_is_done_in_order(self, device: Device) -> None:
        a, b, c = (device.allocate(NBYTES) for _ in range(3))
        fill(device, a, pattern(1))
        fill(device, c, pattern(2))
        whole = [each.span(0, NBYTES) for each in (a, b, c)]
        stream = device.stream(Urgency.OFFLOADS)
        device.copy(stream, [(whole[1], whole[0])])
        device.copy(stream, [(whole[0], whole[2])])
        device.copy(stream, [(whole[2], whole[1])])
        stream.synchronize()
        assert read(device, a) == pattern(2)
        assert read(device, b) == read(device, c) == pattern(1)

    def test_events_order_work_of_two_streams(self, device: Device) -> None:
        ring = [device.allocate(NBYTES) for _ in range(4)]
        fill(device, ring[0], pattern(1))
        streams = [device.stream(Urgency.LOADS), device.stream(Urgency.OFFLOADS)]
        event = streams[0].record()
        for step in range(1, 12):
            stream = streams[step % 2]
            stream.wait(event)
            device.copy(
                stream, [(ring[step % 4].span(0, NBYTES), ring[(step - 1) % 4].span(0, NBYTES))]
            )
            if step == 5:
                stream.wait(event)  # once more changes nothing
            event = stream.record()
        event.synchronize()
        assert event.done
        assert [read(device, each) for each in ring] == [pattern(1)] * 4

    def test_an_event_that_is_polled_is_done_in_the_end(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        memory = buffer(pattern(1))
        source = device.register(memory)
        stream = device.stream(Urgency.LOADS)
        early = stream.record()
        device.copy(stream, [(region.span(0, NBYTES), source.span(0, NBYTES))])
        late = stream.record()
        while not late.done:
            pass
        assert early.done
        memory[:] = bytes(NBYTES)
        assert read(device, region) == pattern(1)

    def test_a_stream_is_found_by_its_handle(self, device: Device) -> None:
        a, b = device.allocate(NBYTES), device.allocate(NBYTES)
        fill(device, a, pattern(1))
        stream = device.stream(Urgency.LOADS)
        same = device.stream_of(stream.handle)
        assert same.handle == stream.handle
        device.copy(stream, [(b.span(0, NBYTES), a.span(0, NBYTES))])
        device.copy(same, [(a.span(0, 100), b.span(200, 100))])
        same.record().synchronize()
        assert read(device, a)[:100] == pattern(1)[200:300]

    def test_adopted_memory_is_used_and_not_released(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        fill(device, region, pattern(1))
        part = device.adopt(region.address + 4096, 4096)
        assert read(device, part) == pattern(1)[4096:8192]
        fill(device, part, pattern(2, 4096))
        assert read(device, region)[4096:8192] == pattern(2, 4096)
        with pytest.raises(ValueError, match="adopted"):
            device.release(part)
        with pytest.raises(DeviceError, match="allocated"):
            device.export(part)

    def test_ones_own_memory_is_opened_too(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        opened = device.open(device.export(region), NBYTES)
        fill(device, opened, pattern(8))
        device.release(opened)
        assert read(device, region) == pattern(8)

    @pytest.mark.parametrize("nbytes", [0, HANDLE_BYTES - 1, HANDLE_BYTES + 1, 1 << 20])
    def test_a_handle_of_another_size_is_refused(self, device: Device, nbytes: int) -> None:
        with pytest.raises(DeviceError, match="64 bytes"):
            device.open(bytes(nbytes), 1)

    @pytest.mark.parametrize("seed", range(5))
    def test_what_is_no_handle_is_refused(self, device: Device, seed: int) -> None:
        with pytest.raises(DeviceError):
            device.open(pattern(seed, HANDLE_BYTES) if seed else bytes(HANDLE_BYTES), 1)

    def test_the_handle_of_released_memory_is_refused(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        handle = device.export(region)
        device.release(region)
        with pytest.raises(DeviceError):
            device.open(handle, NBYTES)

    def test_registered_memory_is_not_exported(self, device: Device) -> None:
        with pytest.raises(DeviceError, match="allocated"):
            device.export(device.register(buffer(bytes(4096))))

    @pytest.mark.parametrize(("threads", "job"), [(0, bytes(8)), (1, b""), (1, bytes(9))])
    def test_what_cannot_be_launched_is_refused(
        self, device: Device, threads: int, job: bytes
    ) -> None:
        with pytest.raises(ValueError, match="launch"):
            device.launch(device.stream(Urgency.LOADS), "gather", threads, job)

    def test_a_kernel_that_is_not_there_is_refused(self, device: Device) -> None:
        need_kernels(device)
        stream = device.stream(Urgency.LOADS)

        def launch_and_wait() -> None:
            device.launch(stream, "no_such_kernel", 1, bytes(8))
            stream.synchronize()

        with pytest.raises(DeviceError, match="no_such_kernel"):
            launch_and_wait()

    def test_closing_does_what_is_left_and_twice_is_once(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        source, target = buffer(pattern(1)), buffer(bytes(NBYTES))
        spans = [device.register(each).span(0, NBYTES) for each in (source, target)]
        streams = [device.stream(Urgency.LOADS), device.stream(Urgency.OFFLOADS)]
        device.copy(streams[0], [(region.span(0, NBYTES), spans[0])])
        streams[1].wait(streams[0].record())
        device.copy(streams[1], [(spans[1], region.span(0, NBYTES))])
        event = streams[1].record()
        device.close()
        device.close()
        assert target == source
        event.synchronize()
        assert event.done
        with pytest.raises(DeviceError, match="closed"):
            streams[0].record()


class DeviceContract(DeviceInOneProcess):
    """What also needs the real device: its kernels, and another process that opens it by name."""

    def test_a_kernel_is_run_between_the_work_around_it(self, device: Device) -> None:
        need_kernels(device)
        cache, chunk, copied = (device.allocate(NBYTES) for _ in range(3))
        source = device.register(buffer(pattern(1)))
        stream = device.stream(Urgency.LOADS)
        device.copy(stream, [(cache.span(0, NBYTES), source.span(0, NBYTES))])
        device.launch(stream, "kvtier_gather_1", 1000, gather_job(chunk, cache))
        device.copy(stream, [(copied.span(0, NBYTES), chunk.span(0, NBYTES))])
        stream.synchronize()
        assert read(device, copied) == pattern(1)

    def test_another_process_reads_and_writes_exported_memory(self, device: Device) -> None:
        region = device.allocate(NBYTES)
        fill(device, region, pattern(5))
        handle = device.export(region)
        assert len(handle) == HANDLE_BYTES
        with other_process(device, handle.hex(), 5) as other:
            out, _ = other.communicate(timeout=HANG_S)
        assert (other.returncode, out) == (0, "True\n")
        assert read(device, region) == pattern(6)

    def test_memory_of_another_process_is_opened_while_it_lives(self, device: Device) -> None:
        with other_process(device, "-", 7) as other:
            assert other.stdout is not None
            handle = bytes.fromhex(other.stdout.readline())
            region = device.open(handle, NBYTES)
            assert read(device, region) == pattern(7)
            device.release(region)
            with pytest.raises(DeviceError, match=str(1 << 40)):
                device.open(handle, 1 << 40)
            part = device.open(handle, 4096)
            assert part.nbytes == 4096
            assert read(device, part) == pattern(7)[:4096]
            device.release(part)
            other.communicate("end\n", timeout=HANG_S)
        with pytest.raises(DeviceError):
            device.open(handle, NBYTES)
