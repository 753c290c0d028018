"""The client: `connect` to a service, then look up, load and offload prefixes.

Fail-open: whatever the service is or does, an operation returns within its deadline with less than
was asked for. It raises InvalidRequest for its caller's own mistakes only.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType
from typing import Any, Self

from google.protobuf.message import Message

from kvtier.chunks import Prefix, chain, new_request, pack_tokens, with_text
from kvtier.client.buffers import Buffers, Workplace
from kvtier.client.connection import Connection
from kvtier.client.hints import Hints, to_hints
from kvtier.client.loading import Loaded, Manner
from kvtier.client.offloading import Offload
from kvtier.client.pinning import Pinned, listed_pins, pinned_of
from kvtier.client.session import Session, pack_keys
from kvtier.client.stats import ServiceStats, read_stats
from kvtier.client.transport import SERVICE_FAILURES, GrpcTransport, Transport, grpc_target
from kvtier.errors import InvalidRequest
from kvtier.kernels.copying import Copier
from kvtier.kernels.device import Device
from kvtier.proto import cache_pb2 as pb
from kvtier.spaces import Space

DEFAULT_DEADLINE_S = 1.0
_KEEP_BUFFERS_BYTES = 256 << 20


class Path(Enum):
    """How payload bytes travel. SHM needs the service on this host; INLINE works anywhere."""

    SHM = "shm"
    INLINE = "inline"


_WIRE_PATHS = {Path.SHM: pb.DATA_PATH_SHM, Path.INLINE: pb.DATA_PATH_INLINE}


class KeyState(Enum):
    """Where a key stands, in `Explained`."""

    UNKNOWN = 0
    RAM = 1
    DISK = 2
    BEING_WRITTEN = 3
    NEVER_STORED = 4
    EVICTED = 5
    CORRUPT = 6
    EXPIRED = 7
    OTHER_SPACE = 8
    VRAM = 9
    REFUSED = 10
    QUOTA = 11
    LOST_IN_CRASH = 12


@dataclass(frozen=True, slots=True)
class Held:
    """How many leading chunks of a prefix the service holds, and how many of those are in RAM or
    VRAM."""

    chunks: int
    in_ram: int


@dataclass(frozen=True, slots=True)
class Explained:
    """Why a key is or is not a hit; `fields` names the space fields that differ."""

    state: KeyState
    detail: str
    fields: tuple[str, ...]


class Client:
    """One engine's view of the cache, in one space. Its methods may be called from any thread."""

    def __init__(
        self,
        connection: Connection,
        space: Space,
        deadline_s: float,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.space = space
        self.deadline_s = deadline_s
        self._connection = connection
        self._on_close = on_close
        self._digest = space.digest
        self._workplace = Workplace(Buffers(_KEEP_BUFFERS_BYTES), Copier())

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the service is connected; False when time ran out. Nothing needs this call:
        until then every operation is a miss."""
        return self._connection.wait_ready(timeout_s)

    @property
    def connected(self) -> bool:
        """Whether a session is open. While it is not, operations are misses that cost nothing."""
        return self._connection.session is not None

    def prefix(
        self,
        token_ids: Iterable[int],
        extra: bytes | Sequence[bytes] = b"",
        *,
        same_request: Prefix | None = None,
    ) -> Prefix:
        """The keys of a prompt's full chunks.

        `token_ids` is the prompt from its first token. `extra` is what else decides the KV: one
        value for all chunks, or one per chunk. Make one prefix for each request of the engine, and
        name it as `same_request` where another one is made for the same: what is looked up, loaded
        and offloaded for one request counts as one use. Raises InvalidRequest for ids that do not
        fit in 32 bits.
        """
        packed = pack_tokens(token_ids)
        keys = chain(self._digest, packed, self.space.layout.tokens, extra)
        request = same_request.request if same_request is not None else new_request()
        return replace(with_text(keys, packed, extra), request=request)

    def lookup(
        self, prefix: Prefix, deadline_s: float | None = None, *, hints: Hints | None = None
    ) -> int:
        """How many leading chunks of the prefix the service holds. Leases and moves nothing."""
        found = self.locate(prefix, deadline_s, hints=hints)
        return found.chunks if found is not None else 0

    def locate(
        self, prefix: Prefix, deadline_s: float | None = None, *, hints: Hints | None = None
    ) -> Held | None:
        """As `lookup`, with how much of it is in RAM; None when the service cannot be asked."""
        response: pb.LookupResponse | None = self._ask(
            "Lookup",
            lambda session: pb.LookupRequest(
                session_id=session.id,
                keys=pack_keys(prefix.keys[: session.max_keys]),
                hints=to_hints(prefix, hints),
            ),
            deadline_s,
        )
        if response is None:
            return None
        held = min(response.held, len(prefix))
        return Held(held, min(response.in_ram, held))

    def load(
        self,
        prefix: Prefix,
        deadline_s: float | None = None,
        *,
        in_vram: bool = False,
        partial: bool = False,
        hints: Hints | None = None,
    ) -> Loaded:
        """Bring the longest leading run of chunks that is held.

        With `in_vram`, a client with a device takes chunks that are in VRAM where they are. With
        `partial`, the last chunk may be another one that the prompt leaves half-way: its first
        `tokens` tokens are the prompt's. Only where a token's KV depends on nothing after it.

        >>> with client.load(prefix) as loaded:        # doctest: +SKIP
        ...     for chunk in loaded:                   # in order, as they land
        ...         chunk.read_into(my_buffer(chunk.index))
        """
        return Loaded(
            self._connection,
            self._workplace,
            prefix,
            deadline_s or self.deadline_s,
            Manner(in_vram, partial, hints),
        )

    def offload(
        self, prefix: Prefix, deadline_s: float | None = None, *, hints: Hints | None = None
    ) -> Offload:
        """Store the chunks of a prefix that the service does not hold yet.

        >>> with client.offload(prefix) as offload:    # doctest: +SKIP
        ...     for slot in offload:                   # only what is wanted
        ...         slot.write(my_chunk(slot.index))
        >>> offload.outcome.stored                     # doctest: +SKIP
        """
        return Offload(
            self._connection, self._workplace, prefix, deadline_s or self.deadline_s, hints
        )

    def prefetch(self, prefix: Prefix) -> int:
        """Start bringing chunks from disk to RAM; returns how many are there or on their way."""
        return self._prefetch(prefix, cancel=False)

    def cancel_prefetch(self, prefix: Prefix) -> int:
        """Give up what `prefetch`, `lookup` or `locate` started and nobody else wants; returns how
        many chunks were on their way."""
        return self._prefetch(prefix, cancel=True)

    def _prefetch(self, prefix: Prefix, *, cancel: bool) -> int:
        response: pb.PrefetchResponse | None = self._ask(
            "Prefetch",
            lambda session: pb.PrefetchRequest(
                session_id=session.id,
                keys=pack_keys(prefix.keys[: session.max_keys]),
                cancel=cancel,
            ),
        )
        return min(response.in_ram + response.promoting, len(prefix)) if response is not None else 0

    def pin(self, prefix: Prefix, ttl_s: float, *, end_with_session: bool = False) -> Pinned | None:
        """Keep the leading run of chunks that is held from being evicted, for `ttl_s` seconds (from
        1 to 7 days; `FIVE_MINUTES`, `ONE_HOUR`) or until this session ends. What a tenant may pin
        is bounded: the answer says how much was pinned, and why not more. None when the service
        cannot be asked."""
        response: pb.PinResponse | None = self._ask(
            "Pin",
            lambda session: pb.PinRequest(
                session_id=session.id,
                keys=pack_keys(prefix.keys[: session.max_keys]),
                ttl_s=ttl_s,
                end_with_session=end_with_session,
            ),
        )
        if response is None:
            return None
        return pinned_of(response, len(prefix), end_with_session=end_with_session)

    def unpin(self, pinned: Pinned) -> bool:
        """End a pin; False when the service cannot be asked. Ending one twice does nothing."""
        answer = self._ask(
            "Unpin",
            lambda session: pb.UnpinRequest(session_id=session.id, pin_id=pinned.id),
        )
        return answer is not None

    def pins(self) -> list[Pinned]:
        """The pins of this client's tenant, in all its spaces; none when the service cannot be
        asked."""
        response: pb.ListPinsResponse | None = self._ask(
            "ListPins", lambda session: pb.ListPinsRequest(session_id=session.id)
        )
        return listed_pins(response) if response is not None else []

    def evict(self, prefix: Prefix | None) -> int:
        """Remove chunks and all that continues them; None removes the whole space. Returns how many
        were removed."""
        response: pb.EvictResponse | None = self._ask(
            "Evict",
            lambda session: pb.EvictRequest(
                session_id=session.id,
                keys=pack_keys(prefix.keys) if prefix is not None else b"",
                whole_space=prefix is None,
            ),
        )
        return response.chunks if response is not None else 0

    def explain(
        self,
        prefix: Prefix,
        token_ids: Iterable[int] = (),
        extra: bytes | Sequence[bytes] = b"",
    ) -> list[Explained]:
        """Why each chunk is or is not a hit; empty when the service cannot be asked.

        With the prompt's tokens, the answer can also tell whether a space that differs holds it.
        """
        extras = [extra] if isinstance(extra, bytes) else list(extra)
        response: pb.ExplainResponse | None = self._ask(
            "Explain",
            lambda session: pb.ExplainRequest(
                session_id=session.id,
                keys=pack_keys(prefix.keys[: session.max_keys]),
                token_ids=pack_tokens(token_ids),
                extras=extras,
            ),
        )
        if response is None or len(response.keys) > len(prefix):
            return []
        return [
            Explained(_key_state(answer.state), answer.detail, tuple(answer.fields))
            for answer in response.keys
        ]

    def stats(self) -> ServiceStats | None:
        """What the service holds and has done; None when it cannot be asked."""
        session = self._connection.session
        if session is None:
            return None
        try:
            return read_stats(session.transport, self.deadline_s)
        except SERVICE_FAILURES as failure:
            self._connection.failed(session, "stats", failure)
            return None

    def close(self) -> None:
        """End the session. Operations after this are misses; closing twice does nothing."""
        self._connection.close()
        self._workplace.copier.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self,
        method: str,
        request: Callable[[Session], Message],
        deadline_s: float | None = None,
    ) -> Any | None:
        """One call on the open session; None when there is none or it fails."""
        session = self._connection.session
        if session is None:
            return None
        message = request(session)
        try:
            response = session.transport.call(method, message, deadline_s or self.deadline_s)
        except SERVICE_FAILURES as failure:
            self._connection.failed(session, method.lower(), failure)
            return None
        self._connection.succeeded()
        return response


def connect(
    target: str,
    space: Space,
    *,
    deadline_s: float = DEFAULT_DEADLINE_S,
    path: Path | str | None = None,
    name: str = "python",
    device: Device | None = None,
) -> Client:
    """A client of the service at "unix:///path/to.sock" or "host:port".

    Returns at once, whether or not a service is there; it is connected in the background, and again
    whenever it comes back. `deadline_s` is the most that an operation may take. `path` forces a
    data path; by default shm is used, and inline where the target is not a unix socket. `name`
    tells the client apart in the service's statistics. With a `device` on the service's host, which
    the caller closes after the client, it copies from and to the arena by itself, and reaches the
    VRAM tier where that is on the same one. Raises InvalidRequest for a malformed target or path.
    """
    grpc_target(target)
    _check_deadline(deadline_s)
    if path is None:
        path = Path.SHM if target.startswith("unix:") else Path.INLINE
    try:
        wire_path = _WIRE_PATHS[Path(path)]
    except ValueError:
        raise InvalidRequest(f'path: {path!r} given; use "shm" or "inline"') from None
    paths = [wire_path]
    if device is not None and wire_path == pb.DATA_PATH_SHM:
        paths.insert(0, pb.DATA_PATH_CUDA_IPC)
    connection = Connection(lambda: GrpcTransport(target), space, name, paths, device)
    return Client(connection, space, deadline_s)


def connect_through(
    make_transport: Callable[[], Transport],
    space: Space,
    deadline_s: float = DEFAULT_DEADLINE_S,
    path: "pb.DataPath.ValueType" = pb.DATA_PATH_SHM,
    name: str = "python",
    on_close: Callable[[], None] = lambda: None,
) -> Client:
    """A client over any transport; `on_close` is called once it is closed."""
    _check_deadline(deadline_s)
    connection = Connection(make_transport, space, name, [path])
    return Client(connection, space, deadline_s, on_close)


def _check_deadline(deadline_s: float) -> None:
    if deadline_s <= 0:
        raise InvalidRequest(f"deadline_s: {deadline_s} given, must be positive")


def _key_state(value: int) -> KeyState:
    try:
        return KeyState(value)
    except ValueError:
        return KeyState.UNKNOWN
