"""The tokens that a client offers with its keys, so that a stored chunk can be used in part."""

from collections.abc import Sequence

from kvtier.chunks import Prefix
from kvtier.proto import cache_pb2 as pb


def offered(prefix: Prefix, most_bytes: int, *, whole: bool = False) -> pb.Tokens | None:
    """The tokens of a prefix, of its leading chunks where all are more than `most_bytes`; with
    `whole`, of full chunks alone. None where the prefix does not know them, or there are none."""
    text = prefix.text
    if text is None:
        return None
    width = 4 * prefix.chunk_tokens
    count = _fitting(text.extras, width, most_bytes)
    if whole:
        count = min(count, len(prefix))
    ids = text.tokens[: count * width]
    if not ids:
        return None
    extras = text.extras[:count]
    return pb.Tokens(ids=ids, extras=extras if any(extras) else (), parent=prefix.parent)


def _fitting(extras: Sequence[bytes], width: int, most_bytes: int) -> int:
    """How many leading chunks of `width` bytes and their extras are within `most_bytes`."""
    nbytes = 0
    for count, extra in enumerate(extras):
        nbytes += width + len(extra)
        if nbytes > most_bytes:
            return count
    return len(extras)
