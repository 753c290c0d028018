"""A bare gRPC stream between two processes: what the inline path is measured against.

The server is a `grpc.aio` one in a process of its own and the client a synchronous one, as kvtier's
are. Bytes go from a populated buffer to a populated buffer in protobuf's own one-field message,
`google.protobuf.BytesValue`; nobody checks, keeps or orders them.
"""

import asyncio
import multiprocessing
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import BytesValue
from grpc import aio

from kvtier.bench.payload import Buffer, blank

_SERVICE = "kvtier.bench.Bytes"
_START_TIMEOUT_S = 30.0
_MAX_MESSAGE_BYTES = 8 << 20
_OPTIONS = (("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),)


class ByteStream:
    """The client's end."""

    def __init__(self, channel: grpc.Channel, message_bytes: int) -> None:
        self._message_bytes = message_bytes
        self._send = channel.stream_unary(
            f"/{_SERVICE}/Send", BytesValue.SerializeToString, BytesValue.FromString
        )
        self._receive = channel.unary_stream(
            f"/{_SERVICE}/Receive", BytesValue.SerializeToString, BytesValue.FromString
        )

    def send(self, sources: list[Buffer]) -> None:
        """Send the buffers' bytes; returns once the server has put all into a buffer of its own."""
        self._send(
            BytesValue(value=bytes(part))
            for source in sources
            for part in _parts(source, self._message_bytes)
        )

    def receive(self, targets: list[Buffer]) -> None:
        """Fill the buffers with bytes from a buffer of the server."""
        count = len(targets) * targets[0].nbytes
        messages = self._receive(BytesValue(value=str(count).encode()))
        for target in targets:
            for part in _parts(target, self._message_bytes):
                part[:] = next(messages).value


def _parts(buffer: Buffer, message_bytes: int) -> Iterator[memoryview]:
    view = buffer.data
    for start in range(0, buffer.nbytes, message_bytes):
        yield view[start : start + message_bytes]


@contextmanager
def byte_stream(message_bytes: int, buffer_bytes: int) -> Iterator[ByteStream]:
    """A client of a fresh server on a unix socket, whose buffer is as large as one of the client's;
    both end with the block."""
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        target = f"unix:{folder}/bytes.sock"
        ready = processes.Event()
        server = processes.Process(
            target=_run_server, args=(target, ready, message_bytes, buffer_bytes), daemon=True
        )
        server.start()
        try:
            if not ready.wait(_START_TIMEOUT_S):
                raise RuntimeError("the reference server did not start")
            assert Path(folder, "bytes.sock").is_socket()
            with grpc.insecure_channel(target, options=_OPTIONS) as channel:
                yield ByteStream(channel, message_bytes)
        finally:
            server.terminate()
            server.join()


def _run_server(target: str, ready: Any, message_bytes: int, buffer_bytes: int) -> None:
    asyncio.run(_serve(target, ready, Buffers(message_bytes, buffer_bytes)))


class Buffers:
    """The server's end: one populated buffer, written and read round and round."""

    def __init__(self, message_bytes: int, buffer_bytes: int) -> None:
        self._message_bytes = message_bytes
        (self._buffer,) = blank(1, buffer_bytes)

    def _round_and_round(self) -> Iterator[memoryview]:
        while True:
            yield from _parts(self._buffer, self._message_bytes)

    async def take(self, requests: AsyncIterator[BytesValue], context: Any) -> BytesValue:
        parts = self._round_and_round()
        async for request in requests:
            next(parts)[:] = request.value
        return BytesValue()

    async def give(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        left = int(request.value)
        parts = self._round_and_round()
        while left > 0:
            part = next(parts)
            left -= len(part)
            yield BytesValue(value=bytes(part))


async def _serve(target: str, ready: Any, buffers: Buffers) -> None:
    server = aio.server(options=_OPTIONS)
    coders = (BytesValue.FromString, BytesValue.SerializeToString)
    handlers: dict[str, Any] = {
        "Send": grpc.stream_unary_rpc_method_handler(buffers.take, *coders),
        "Receive": grpc.unary_stream_rpc_method_handler(buffers.give, *coders),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(target)
    await server.start()
    ready.set()
    await server.wait_for_termination()
