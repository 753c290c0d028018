"""The settings of the vLLM connector: `kv_connector_extra_config`, checked."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Self

from kvtier.client.transport import grpc_target
from kvtier.errors import InvalidRequest
from kvtier.sections import default_listen
from kvtier.spaces import MAX_TEXT_BYTES

_RANGES = {
    "chunk_tokens": (1, 65_536),
    "lookup_wait_ms": (0, 1_000),
    "deadline_ms": (1, 60_000),
}


class LoadMode(Enum):
    """When a hit is copied into the engine's blocks: in the step that first runs the request, or
    beside the steps of other requests."""

    SYNC = "sync"
    ASYNC = "async"


class Scope(Enum):
    """Which tokens' KV is offloaded."""

    PROMPT = "prompt"
    PROMPT_AND_OUTPUT = "prompt_and_output"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator may choose.

    `lookup_wait_ms` is the most that one step of the scheduler waits for the service;
    `deadline_ms` the most that a request waits in all until its prefix is in RAM, and the most that
    one load may take. `weights` names weights that cannot be read as files.
    """

    target: str = field(default_factory=lambda: default_listen(os.environ))
    chunk_tokens: int = 256
    load: LoadMode = LoadMode.SYNC
    offload: Scope = Scope.PROMPT_AND_OUTPUT
    lookup_wait_ms: float = 5.0
    deadline_ms: float = 1_000.0
    tenant: str = ""
    weights: str = ""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """Settings out of the extra config. Raises InvalidRequest for a key that is unknown or a
        value that is not allowed, naming both."""
        known = {each.name for each in fields(cls)}
        for name in given:
            if name not in known:
                allowed = ", ".join(sorted(known))
                raise InvalidRequest(
                    f"kv_connector_extra_config.{name}: unknown; known are {allowed}"
                )
        return cls(**{name: _read(name, value) for name, value in given.items()})


def _read(name: str, value: Any) -> Any:
    if name == "load":
        return _choice(name, value, LoadMode)
    if name == "offload":
        return _choice(name, value, Scope)
    if name in _RANGES:
        return _number(name, value)
    if not isinstance(value, str) or not _is_sendable(value):
        raise _refused(name, value, f"a text of at most {MAX_TEXT_BYTES} bytes of UTF-8")
    if name == "target":
        grpc_target(value)
    return value


def _is_sendable(text: str) -> bool:
    try:
        return len(text.encode()) <= MAX_TEXT_BYTES
    except UnicodeEncodeError:
        return False


def _choice(name: str, value: Any, kind: type[Enum]) -> Enum:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(f'"{each.value}"' for each in kind)
        raise _refused(name, value, f"one of {allowed}") from None


def _number(name: str, value: Any) -> float:
    low, high = _RANGES[name]
    kinds = int if name == "chunk_tokens" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        whole = "a whole number" if kinds is int else "a number"
        raise _refused(name, value, f"{whole} from {low} to {high}")
    return value


def _refused(name: str, value: Any, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"kv_connector_extra_config.{name}: {str(value)[:200]!r} given; allowed is {allowed}"
    )
