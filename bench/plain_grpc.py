"""A bare gRPC byte stream between two processes: what the inline path is measured against.

The server is a `grpc.aio` one in a process of its own and the client a synchronous one, as kvtier's
are. Messages are bytes that nobody encodes, decodes, checks or copies.
"""

import asyncio
import multiprocessing
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

_SERVICE = "kvtier.bench.Bytes"
_START_TIMEOUT_S = 30.0
_MAX_MESSAGE_BYTES = 8 << 20
_OPTIONS = (("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),)


class ByteStream:
    """The client's end."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._send: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(
            f"/{_SERVICE}/Send"
        )
        self._receive: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
            f"/{_SERVICE}/Receive"
        )

    def send(self, count: int, message: bytes) -> None:
        """Send the same message so many times; returns once the server has taken all."""
        self._send(message for _ in range(count))

    def receive(self, count: int, nbytes: int) -> None:
        """Receive so many messages of that size."""
        for _ in self._receive(f"{count} {nbytes}".encode()):
            pass


@contextmanager
def byte_stream() -> Iterator[ByteStream]:
    """A client of a fresh server on a unix socket; both end with the block."""
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        target = f"unix:{folder}/bytes.sock"
        ready = processes.Event()
        server = processes.Process(target=_run_server, args=(target, ready), daemon=True)
        server.start()
        try:
            if not ready.wait(_START_TIMEOUT_S):
                raise RuntimeError("the reference server did not start")
            assert Path(folder, "bytes.sock").is_socket()
            with grpc.insecure_channel(target, options=_OPTIONS) as channel:
                yield ByteStream(channel)
        finally:
            server.terminate()
            server.join()


def _run_server(target: str, ready: Any) -> None:
    asyncio.run(_serve(target, ready))


async def _serve(target: str, ready: Any) -> None:
    server = aio.server(options=_OPTIONS)
    handlers: dict[str, Any] = {
        "Send": grpc.stream_unary_rpc_method_handler(_take),
        "Receive": grpc.unary_stream_rpc_method_handler(_give),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(target)
    await server.start()
    ready.set()
    await server.wait_for_termination()


async def _take(requests: AsyncIterator[bytes], context: Any) -> bytes:
    async for _ in requests:
        pass
    return b""


async def _give(request: bytes, context: Any) -> AsyncIterator[bytes]:
    count, nbytes = map(int, request.split())
    message = bytes(nbytes)
    for _ in range(count):
        yield message
