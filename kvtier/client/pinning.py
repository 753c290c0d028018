"""Prefixes that are kept from being evicted, as a client sees them."""

import math
from dataclasses import dataclass

from kvtier.proto import cache_pb2 as pb

FIVE_MINUTES = 300.0
ONE_HOUR = 3600.0
_MOST_TTL_S = 7 * 86_400.0

_REFUSALS: dict[int, str] = {
    pb.PIN_STOP_COMPLETE: "",
    pb.PIN_STOP_MISS: "the next chunk is not held",
    pb.PIN_STOP_TENANT_BYTES: "the tenant's pins may take no more (tenants.pin_percent)",
    pb.PIN_STOP_TENANT_PINS: "the tenant has too many pins, or pins of too many chunks",
    pb.PIN_STOP_ALL_BYTES: "the pins of all tenants may take no more",
}


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pin. `chunks` are the leading ones that it keeps: of the prefix that was given, or, where
    pins are listed, from the prompt's first chunk on. Where it keeps none there is no pin.
    `refused` says why it keeps no more, "" where nothing was refused."""

    id: int
    chunks: int
    left_s: float
    end_with_session: bool
    refused: str = ""


def pinned_of(response: pb.PinResponse, most: int, *, end_with_session: bool) -> Pinned:
    """What came of asking for a pin of a prefix of `most` chunks."""
    refused = _REFUSALS.get(response.stop, "the service gave no reason")
    chunks = min(response.chunks, most)
    return Pinned(response.pin_id, chunks, _seconds(response.ttl_s), end_with_session, refused)


def listed_pins(response: pb.ListPinsResponse) -> list[Pinned]:
    """The pins that the service names."""
    return [
        Pinned(pin.pin_id, pin.chunks, _seconds(pin.left_s), pin.end_with_session)
        for pin in response.pins
    ]


def _seconds(told: float) -> float:
    """A time to live as told, within what there can be."""
    return 0.0 if math.isnan(told) else min(max(told, 0.0), _MOST_TTL_S)
