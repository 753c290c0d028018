"""Lossless codecs of the disk tier, by name and by the number that is on disk."""

from kvtier.errors import ConfigError
from kvtier.kernels.codecs.base import Codec, CodecError
from kvtier.kernels.codecs.byteplane import BytePlaneCodec
from kvtier.kernels.codecs.raw import RawCodec

__all__ = ["Codec", "CodecError", "codec_by_id", "codec_by_name", "codec_names"]

_CODECS: tuple[type[Codec], ...] = (RawCodec, BytePlaneCodec)


def codec_names() -> list[str]:
    """The names that `codec_by_name` takes."""
    return [codec.name for codec in _CODECS]


def codec_by_name(name: str) -> Codec:
    """A new codec of that name. Raises ConfigError that lists the known ones."""
    for codec in _CODECS:
        if codec.name == name:
            return codec()
    raise ConfigError(f"codec: {name!r} is not one of {codec_names()}")


def codec_by_id() -> dict[int, Codec]:
    """A new codec of every kind, by the number that names it on disk."""
    return {codec.id: codec() for codec in _CODECS}
