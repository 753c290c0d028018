"""The kinds of setting a configuration has: how each is read, checked, documented and written.

A parser takes what the source gave (text from an environment or a flag, a typed value from TOML)
and raises `ValueError` with the reason, empty where "what is allowed" says enough.
"""

import ipaddress
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
UNITS = {"b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*)", re.IGNORECASE)
SIZE_ALLOWED = "a number of B, KiB, MiB, GiB or TiB"
MAX_SOCKET_PATH = 107  # bytes; what the kernel's socket address holds
SOCKET_PATH = re.compile(r"/[^\x00-\x20\x7f%?#]+")  # gRPC reads the target as a URI
DEVICE = re.compile(r"host|cuda:[0-9]{1,3}")
MAX_SHOWN = 80

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the schema, all but its name and type."""

    doc: str
    allowed: str
    parse: Callable[[object], object]
    write: Callable[[Any], str]

    def comment(self) -> list[str]:
        """The documentation as lines of TOML comment."""
        return [f"# {line}" for line in textwrap.wrap(f"{self.doc} Allowed: {self.allowed}.", 96)]


def size(doc: str, low: int, high: int) -> Setting:
    """A number of bytes, written with a binary unit."""

    def parse(raw: object) -> int:
        return _within(read_bytes(raw) if isinstance(raw, str) else _integer(raw), low, high)

    allowed = f"{SIZE_ALLOWED}, from {exact_bytes(low)} to {exact_bytes(high)}"
    return Setting(doc, allowed, parse, lambda value: toml_string(exact_bytes(value)))


def whole(doc: str, low: int, high: int) -> Setting:
    """A whole number."""

    def parse(raw: object) -> int:
        return _within(_integer(raw), low, high)

    return Setting(doc, f"a whole number from {low} to {high}", parse, str)


def seconds(doc: str, low: int, high: int) -> Setting:
    """A duration in seconds, fractions included."""

    def parse(raw: object) -> float:
        return float(_within(_number(raw), low, high))

    return Setting(doc, f"a number of seconds from {low} to {high}", parse, repr)


def choice(doc: str, values: Sequence[str]) -> Setting:
    """One of a few words."""

    def parse(raw: object) -> str:
        if raw not in values:
            raise ValueError
        return str(raw)

    return Setting(doc, " or ".join(toml_string(value) for value in values), parse, toml_string)


def device_name(doc: str) -> Setting:
    """A device by its name; "" stands for none."""

    def parse(raw: object) -> str:
        text = _text(raw)
        if text and not DEVICE.fullmatch(text):
            raise ValueError
        return text

    return Setting(doc, '"cuda:N" with the number of a GPU, "host" or ""', parse, toml_string)


def folder(doc: str, *, optional: bool = False) -> Setting:
    """An absolute path, or one below a home folder; with `optional`, "" stands for none."""

    def parse(raw: object) -> Path | None:
        text = _text(raw)
        if optional and not text:
            return None
        try:
            path = Path(text).expanduser()
        except RuntimeError:
            raise ValueError("whose home is not known") from None
        if "\0" in text or not path.is_absolute():
            raise ValueError("not an absolute path")
        return path

    allowed = 'an absolute path, or one below "~"' + (', or "" for none' if optional else "")
    return Setting(doc, allowed, parse, lambda path: toml_string(str(path or "")))


def address(doc: str) -> Setting:
    """Where to listen: a unix socket or a loopback port, and nothing that another host reaches."""

    def parse(raw: object) -> str:
        text = _text(raw)
        if text.startswith("unix:"):
            _check_socket(text)
        else:
            _check_loopback(text)
        return text

    allowed = '"unix:///absolute/path", or "host:port" with 127.0.0.0/8, [::1] or localhost'
    return Setting(doc, allowed, parse, toml_string)


def read_bytes(text: str) -> int:
    """The size that `text` names, to the nearest byte; `ValueError` when it names none."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError("not a size")
    unit = match[2].lower() or "b"
    if unit not in UNITS:
        raise ValueError(f"unknown unit {match[2]}")
    return round(Decimal(match[1]) * UNITS[unit])


def exact_bytes(value: int) -> str:
    """A size in the largest unit that divides it, so that reading it gives the same number."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if value and value % unit == 0:
            return f"{value // unit}{name}"
    return f"{value}B"


def shown(value: object) -> str:
    """A value as an error message shows it: quoted, and never longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def toml_string(value: str) -> str:
    """A TOML basic string. JSON's escapes are TOML's, but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _within(value: Number, low: int, high: int) -> Number:
    if not low <= value <= high:
        raise ValueError("out of range")
    return value


def _integer(raw: object) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    # Text is bounded before it is converted; 19 digits are more than any limit here.
    if isinstance(raw, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", raw):
        return int(raw)
    raise ValueError("not a whole number")


def _number(raw: object) -> float:
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return raw
    try:
        return float(_text(raw))
    except ValueError:
        raise ValueError("not a number") from None


def _text(raw: object) -> str:
    """A string that a TOML file can hold: an undecodable environment value is not one."""
    if not isinstance(raw, str):
        raise ValueError("not a string")
    try:
        raw.encode()
    except UnicodeEncodeError:
        raise ValueError("not UTF-8 text") from None
    return raw


def _check_socket(target: str) -> None:
    path = target.removeprefix("unix://")
    if not SOCKET_PATH.fullmatch(path):
        raise ValueError("not an absolute path without spaces, %, ? or #")
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise ValueError(f"a socket's path has at most {MAX_SOCKET_PATH} bytes")


def _check_loopback(target: str) -> None:
    host, colon, port = target.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("no port from 0 to 65535")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError("an IPv6 address stands in brackets")
    if not _is_loopback(host.removeprefix("[").removesuffix("]")):
        raise ValueError(
            "not a loopback address: a wider bind needs TLS and credentials, which this version"
            " does not have"
        )


def _is_loopback(host: str) -> bool:
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"  # any other name could resolve to anything
    return literal in ipaddress.ip_network("127.0.0.0/8") or literal == ipaddress.ip_address("::1")
