"""From wire messages to checked values. Everything is bounded here before it is believed.

The enums of `service/answers.py` have the numbers of their wire counterparts, so a value is cast.
"""

import struct
from typing import cast

from kvtier.chunks import KEY_BYTES, ChunkKey
from kvtier.errors import InvalidRequest
from kvtier.proto import cache_pb2 as pb
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
