"""Between wire messages and checked values. What comes is bounded here before it is believed.

The enums of `service/answers.py` have the numbers of their wire counterparts, so a value is cast.
"""

import struct
from collections.abc import Sequence
from typing import cast

from kvtier.chunks import KEY_BYTES, MAX_EXTRA_BYTES, ChunkKey
from kvtier.encodings import EXACT
from kvtier.errors import InvalidRequest
from kvtier.metrics import Counters
from kvtier.proto import cache_pb2 as pb
from kvtier.service.hints import Hints, Told, understood
from kvtier.service.overlaps import MAX_TOKEN_BYTES, Offered
from kvtier.service.pins import Pin, Pinned, Terms
from kvtier.spaces import Layout, Space

MAX_CLIENT_NAME_BYTES = 256
_KEY = struct.Struct(f"{KEY_BYTES}s")


def keys_of(packed: bytes, limit: int) -> list[ChunkKey]:
    """The keys of a request. Raises InvalidRequest when they are malformed or too many."""
    count, rest = divmod(len(packed), KEY_BYTES)
    if rest:
        raise InvalidRequest(f"keys: {len(packed)} bytes given, a key has {KEY_BYTES}")
    if count > limit:
        raise InvalidRequest(
            f"keys: {count} given, at most {limit} in one request (limits.keys_per_request)"
        )
    return cast("list[ChunkKey]", [key for (key,) in _KEY.iter_unpack(packed)])


def parent_of(parent: bytes) -> ChunkKey:
    """The parent key of a reservation. Raises InvalidRequest when it is not one."""
    if len(parent) != KEY_BYTES:
        raise InvalidRequest(
            f"parent: {len(parent)} bytes given; send the {KEY_BYTES} bytes of the key before the "
            "first one, or the space digest"
        )
    return ChunkKey(parent)


def offered_of(
    tokens: pb.Tokens, parent: bytes, most_chunks: int, chunk_tokens: int
) -> Offered | None:
    """The tokens that a request offers, of at most so many chunks, of the last one perhaps only the
    first; None where it offers none. Raises InvalidRequest when they are malformed or too many."""
    if not tokens.ids:
        return None
    width = 4 * chunk_tokens
    nbytes = len(tokens.ids) + sum(map(len, tokens.extras))
    if len(tokens.ids) % 4 or len(tokens.ids) > most_chunks * width:
        raise InvalidRequest(
            f"tokens.ids: {len(tokens.ids)} bytes given; send 4 for each token of at most"
            f" {most_chunks} chunks of {chunk_tokens} tokens"
        )
    begun = -(-len(tokens.ids) // width)
    if len(tokens.extras) not in (0, begun):
        raise InvalidRequest(
            f"tokens.extras: {len(tokens.extras)} given for {begun} chunks; send none, or one each"
        )
    if nbytes > MAX_TOKEN_BYTES or any(len(extra) > MAX_EXTRA_BYTES for extra in tokens.extras):
        raise InvalidRequest(
            f"tokens: {nbytes} bytes given, at most {MAX_TOKEN_BYTES} (SessionOpened."
            f"max_token_bytes), {MAX_EXTRA_BYTES} in one extra"
        )
    return Offered(tokens.ids, list(tokens.extras), parent_of(parent))


def space_of(message: pb.Space) -> Space:
    """The space of a session. Raises InvalidRequest naming the field that is out of range."""
    layout = message.layout
    return Space(
        model=message.model,
        weights=message.weights,
        rope=message.rope,
        tenant=message.tenant,
        format_version=message.format_version,
        layout=Layout(
            dtype=layout.dtype,
            layers=layout.layers,
            planes=layout.planes,
            heads=layout.heads,
            head_dim=layout.head_dim,
            tokens=layout.tokens,
            axes=layout.axes,
            rank=layout.rank,
            ranks=layout.ranks,
            encoding=layout.encoding or EXACT,
        ),
    )


def client_of(name: str) -> str:
    """The client's name, for logs. Raises InvalidRequest when it is too long."""
    nbytes = len(name.encode())
    if nbytes > MAX_CLIENT_NAME_BYTES:
        raise InvalidRequest(f"client: {nbytes} bytes given, at most {MAX_CLIENT_NAME_BYTES}")
    return name


def deadline_of(deadline_ms: int) -> float | None:
    """A request's own deadline in seconds; None where it set none."""
    return deadline_ms / 1000 if deadline_ms else None


def hints_of(message: pb.Hints, counters: Counters) -> Hints:
    """What a request tells. What is out of range is clamped, and counted."""
    told = Told(
        message.expected_next_use_s,
        message.session_end,
        message.stop_reason,
        message.priority,
    )
    return understood(message.request, told, counters)


def terms_of(request: pb.PinRequest) -> Terms:
    """For how long a pin is asked for."""
    return Terms(request.ttl_s, request.end_with_session)


def pinned_to(pinned: Pinned) -> pb.PinResponse:
    """What came of asking for a pin, for the wire."""
    return pb.PinResponse(
        pin_id=pinned.pin.id if pinned.pin is not None else 0,
        chunks=pinned.chunks,
        stop=pinned.stop.value,  # type: ignore[arg-type]
        ttl_s=pinned.ttl_s,
    )


def pins_to(listed: Sequence[tuple[Pin, float]]) -> pb.ListPinsResponse:
    """Pins with the seconds that they have left, for the wire."""
    return pb.ListPinsResponse(
        pins=[
            pb.PinInfo(
                pin_id=pin.id,
                space_digest=pin.branch.digest,
                chunks=len(pin.replicas),
                nbytes=pin.nbytes,
                left_s=left_s,
                end_with_session=pin.session is not None,
            )
            for pin, left_s in listed
        ]
    )
