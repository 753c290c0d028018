"""What must agree before the bytes of a chunk may be shared: the space, and the layout within it.

A space's digest is the root of every key chain, so two engines that differ in any field below never
see each other's chunks.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Self

from kvtier.encodings import ENCODINGS, EXACT, QUANTISED_DTYPES, Record, Scheme
from kvtier.errors import InvalidRequest

# Version of the chunk contents and of the digest below. Raised when either changes its meaning.
FORMAT_VERSION = 1

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
MAX_CHUNK_BYTES = 1 << 30
MAX_TEXT_BYTES = 4096
_DOMAIN = b"kvtier.space.v1"
_AXES = ("layer", "plane", "head", "token", "dim")
CANONICAL_AXES = ",".join(_AXES)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the bytes of a chunk are: a contiguous array with the given axes, outermost first.

    `planes` is 2 for separate keys and values, 1 for a latent cache (MLA). `heads` counts KV heads
    of this rank. `encoding` is "exact", or what the array is quantised to (`kvtier.encodings`):
    that needs keys and values of a float type, and has an order of its own, so that `axes` stays
    the canonical one. Raises InvalidRequest when a field is out of range.
    """

    dtype: str
    layers: int
    heads: int
    head_dim: int
    tokens: int = 256
    planes: int = 2
    axes: str = CANONICAL_AXES
    rank: int = 0
    ranks: int = 1
    encoding: str = EXACT

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise InvalidRequest(
                f"layout.dtype: {self.dtype[:200]!r} is not one of {sorted(ITEM_BYTES)}"
            )
        limits = {"layers": 4096, "heads": 4096, "head_dim": 65_536, "tokens": 65_536, "planes": 8}
        for name, most in limits.items():
            _check_range(f"layout.{name}", getattr(self, name), 1, most)
        _check_range("layout.ranks", self.ranks, 1, 65_536)
        _check_range("layout.rank", self.rank, 0, self.ranks - 1)
        if sorted(self.axes.split(",")) != sorted(_AXES):
            raise InvalidRequest(
                f"layout.axes: {self.axes[:200]!r} must name each of {CANONICAL_AXES} once"
            )
        if self.encoding not in ENCODINGS:
            raise InvalidRequest(
                f"layout.encoding: {self.encoding[:200]!r} is not one of {list(ENCODINGS)}"
            )
        if self.encoding != EXACT:
            self._check_can_be_quantised()
        _check_range("layout: the chunk's bytes", self.nbytes, 1, MAX_CHUNK_BYTES)

    def _check_can_be_quantised(self) -> None:
        for name, allowed in (
            ("dtype", QUANTISED_DTYPES),
            ("planes", (2,)),
            ("axes", (CANONICAL_AXES,)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidRequest(
                    f"layout.{name}: {value!r} given, layout.encoding {self.encoding!r} takes "
                    f"{' or '.join(map(repr, allowed))}; or keep such chunks {EXACT!r}"
                )

    @property
    def itemsize(self) -> int:
        """Bytes of one element, as it is before any encoding."""
        return ITEM_BYTES[self.dtype]

    @property
    def scheme(self) -> Scheme | None:
        """How chunks are quantised; None where they are exact."""
        return None if self.encoding == EXACT else Scheme(self.encoding)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of each axis of the elements, in the order of `axes`."""
        size = {
            "layer": self.layers,
            "plane": self.planes,
            "head": self.heads,
            "token": self.tokens,
            "dim": self.head_dim,
        }
        return tuple(size[name] for name in self.axes.split(","))

    @property
    def nbytes(self) -> int:
        """Bytes of one chunk, as it is encoded."""
        scheme = self.scheme
        if scheme is None:
            return math.prod(self.shape) * self.itemsize
        record = Record.of(
            scheme, tokens=self.tokens, head_dim=self.head_dim, itemsize=self.itemsize
        )
        return self.layers * self.heads * record.nbytes

    def named_fields(self) -> dict[str, str | int]:
        """Every field by its name. An exact layout does not mention its encoding: it is the layout
        of services that knew no other, under the same digest."""
        named = asdict(self)
        if self.encoding == EXACT:
            del named["encoding"]
        return named


class _Hashed:
    """Keeps a digest that is asked for with every chunk."""

    __slots__ = ("_digest",)
    _digest: bytes


@dataclass(frozen=True, slots=True)
class Space(_Hashed):
    """Everything that must agree before bytes may be shared.

    `model` is the engine's name for the model, `weights` the fingerprint of its files (see
    `kvtier.fingerprint`), `rope` the rotary parameters in the engine's own words, `tenant` a salt
    that keeps tenants apart. Raises InvalidRequest when a text is longer than 4096 bytes.
    """

    model: str
    layout: Layout
    weights: str = ""
    rope: str = ""
    tenant: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("model", "weights", "rope", "tenant"):
            value = getattr(self, name)
            nbytes = len(value.encode(errors="replace"))
            if nbytes > MAX_TEXT_BYTES:
                raise InvalidRequest(
                    f"space.{name}: {nbytes} bytes given, at most {MAX_TEXT_BYTES}; "
                    "send a hash of it"
                )
        if not self.model:
            raise InvalidRequest("space.model: empty; name the model whose KV this is")
        if self.format_version != FORMAT_VERSION:
            raise InvalidRequest(
                f"space.format_version: {self.format_version} given, "
                f"this build speaks {FORMAT_VERSION}"
            )

    def named_fields(self) -> dict[str, str]:
        """Every field that decides the digest, flat, by its dotted name."""
        flat = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "layout"}
        layout = self.layout.named_fields()
        flat.update({f"layout.{name}": str(value) for name, value in layout.items()})
        return flat

    @property
    def digest(self) -> bytes:
        """32 bytes: SHA-256 over the named fields in sorted order, each length-prefixed."""
        if not hasattr(self, "_digest"):
            object.__setattr__(self, "_digest", self._hash())
        return self._digest

    def _hash(self) -> bytes:
        hasher = hashlib.sha256(_DOMAIN)
        for name, value in sorted(self.named_fields().items()):
            for text in (name.encode(), value.encode(errors="surrogatepass")):
                hasher.update(len(text).to_bytes(4, "little"))
                hasher.update(text)
        return hasher.digest()

    def differing_fields(self, other: "Space") -> list[str]:
        """Names of the fields in which two spaces differ."""
        mine, theirs = self.named_fields(), other.named_fields()
        return [name for name in mine | theirs if mine.get(name) != theirs.get(name)]

    def to_json(self) -> bytes:
        """The space as JSON, for the disk tier's metadata."""
        document = asdict(self) | {"layout": self.layout.named_fields()}
        return json.dumps(document, sort_keys=True).encode()

    @classmethod
    def from_json(cls, encoded: bytes) -> Self:
        """The space that `to_json` wrote. Raises InvalidRequest for anything else."""
        try:
            document = json.loads(encoded)
            layout = Layout(**document.pop("layout"))
            return cls(layout=layout, **document)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"space: not a space descriptor: {error}") from None


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequest(f"{name}: {value} given, allowed is {least} to {most}")
