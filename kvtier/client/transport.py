"""How a client's messages reach a service: over gRPC, or within the process
(`service/embedded.py`)."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from kvtier.errors import InvalidRequest, KvtierError
from kvtier.proto import cache_pb2 as pb
from kvtier.proto.cache_pb2_grpc import CacheStub
from kvtier.transfer.paths import inline

AnswerT_co = TypeVar("AnswerT_co", covariant=True)

# What a transport raises when the service is absent, slow, dead or talks nonsense. Whoever sends a
# message to a service must expect each of these, and nothing else. ValueError: a closed channel.
SERVICE_FAILURES = (
    grpc.RpcError,
    grpc.FutureTimeoutError,
    grpc.FutureCancelledError,
    KvtierError,
    OSError,  # TimeoutError is one
    ValueError,
)

_SERVICE = pb.DESCRIPTOR.services_by_name["Cache"].full_name
_MAX_MESSAGE_BYTES = 8 << 20
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a dead service's back-off must not outlive its channel
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
)


class Stream(Protocol[AnswerT_co]):
    """Messages from the service, until it ends the call or `cancel` does."""

    def __iter__(self) -> Iterator[AnswerT_co]: ...
    def __next__(self) -> AnswerT_co: ...
    def cancel(self) -> object: ...


class Pending(Protocol):
    """An answer that is still to come."""

    def result(self, timeout: float | None = None) -> Any:
        """The answer. Raises SERVICE_FAILURES."""
        ...

    def cancel(self) -> object: ...
    def add_done_callback(self, fn: Callable[[Any], object]) -> object: ...


class Transport(Protocol):
    """Calls methods of `kvtier.v1.Cache` by name. Every call may raise SERVICE_FAILURES."""

    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        """One request, one answer."""
        ...

    def post(self, method: str, request: Message, on_failure: Callable[[], None]) -> None:
        """One request whose answer nobody waits for."""
        ...

    def stream(self, method: str, request: Message, timeout_s: float | None) -> "Stream[Any]":
        """One request, many answers."""
        ...

    def upload(self, method: str, requests: Iterator[Any]) -> "Pending":
        """Many requests, taken by a thread of the transport, and one answer."""
        ...

    def close(self) -> None: ...


class GrpcTransport:
    """A channel to a service at "unix:///path" or "host:port"."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(grpc_target(target), options=_OPTIONS)
        self._stub = CacheStub(self._channel)
        # Messages with pieces of chunks are read and written by hand.
        read_get: Any = inline.read_get
        write_put: Any = inline.write_put
        self._stub.Get = self._channel.unary_stream(
            f"/{_SERVICE}/Get", pb.GetRequest.SerializeToString, read_get
        )
        self._stub.Put = self._channel.stream_unary(
            f"/{_SERVICE}/Put", write_put, pb.PutResponse.FromString
        )

    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        return getattr(self._stub, method)(request, timeout=timeout_s)

    def post(self, method: str, request: Message, on_failure: Callable[[], None]) -> None:
        future = getattr(self._stub, method).future(request, timeout=_POST_TIMEOUT_S)
        future.add_done_callback(lambda done: on_failure() if done.code() != _OK else None)

    def stream(self, method: str, request: Message, timeout_s: float | None) -> "Stream[Any]":
        stream: Stream[Any] = getattr(self._stub, method)(request, timeout=timeout_s)
        return stream

    def upload(self, method: str, requests: Iterator[Any]) -> "Pending":
        pending: Pending = getattr(self._stub, method).future(requests)
        return pending

    def close(self) -> None:
        self._channel.close()


_POST_TIMEOUT_S = 30.0
_OK = grpc.StatusCode.OK


def grpc_target(target: str) -> str:
    """The target in gRPC's words. Raises InvalidRequest when it is neither form."""
    if target.startswith("unix:///"):
        return "unix:" + target.removeprefix("unix://")
    host, colon, port = target.rpartition(":")
    if colon and host and port.isdigit() and "/" not in target:
        return f"dns:///{target}"
    raise InvalidRequest(f'target: {target!r} given; use "unix:///path/to.sock" or "host:port"')
