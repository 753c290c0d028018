"""The curve by RPC, and as a client reads it."""

import asyncio
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest

from kvtier.chunks import ChunkKey
from kvtier.client.stats import HitCurve, read_curves
from kvtier.client.transport import Transport
from kvtier.config import load
from kvtier.proto import cache_pb2 as pb
from kvtier.service import curves as service_curves
from kvtier.service.curves import curves_of
from kvtier.service.servicer import Servicer
from kvtier.tiers.curve_family import sampled_family
from kvtier.tiers.curve_tenants import Curves

CONTEXT: Any = None  # as in process: the servicer asks nothing of it
MIB = 1 << 20


class Answering:
    """A transport that gives one answer."""

    def __init__(self, response: pb.CurveResponse) -> None:
        self._sent = response.SerializeToString()

    def call(self, method: str, request: object, timeout_s: float) -> pb.CurveResponse:
        assert method == "Curve"
        return pb.CurveResponse.FromString(self._sent)


def key(word: object) -> ChunkKey:
    return ChunkKey(sha256(repr(word).encode()).digest())


async def read(curves: Curves) -> list[HitCurve]:
    nothing: Any = None  # neither a cache nor its past is asked
    response = await Servicer(nothing, nothing, curves).Curve(pb.CurveRequest(), CONTEXT)
    return read_curves(cast("Transport", Answering(response)), 1.0)


async def test_what_was_replayed_is_what_the_client_reads() -> None:
    capacities = {"cpu": 8 * MIB, "disk": 16 * MIB}
    curves = Curves(capacities, partial(sampled_family, "lru"), lambda work: None)
    for question in range(160):
        curves.asked("red", MIB, [key(question % 16)], float(question))
        curves.asked("blue", MIB, [key("same")], float(question))
    curves.settle()
    read_back = await read(curves)
    named = [(curve.tenant, curve.tier, curve.capacity_bytes) for curve in read_back]
    assert named[:2] == [(None, "cpu", 8 * MIB), (None, "disk", 16 * MIB)]
    assert set(named[2:]) == {
        (tenant, tier, capacities[tier]) for tenant in ("red", "blue") for tier in capacities
    }
    for ours, theirs in zip(curves.read(), read_back, strict=True):
        assert [(p.capacity_bytes, p.hit_percent) for p in ours.points] == [
            (p.capacity_bytes, p.hit_percent) for p in theirs.points
        ]
        assert (ours.rate, ours.requests) == (theirs.rate, theirs.requests)
        assert (ours.sampled_chunks, ours.seen_bytes) == (theirs.sampled_chunks, theirs.seen_bytes)


@pytest.mark.parametrize("disk", [True, False])
async def test_the_curves_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: bool
) -> None:
    monkeypatch.setattr(service_curves, "_PAUSE_S", 0.0)
    directory = f"disk.directory={tmp_path if disk else ''}"
    curves = curves_of(load(None, {}, ["cpu.capacity=1GiB", directory, "disk.capacity=4GiB"]))
    gib = 1 << 30
    expected = [("cpu", gib), ("disk", 5 * gib)] if disk else [("cpu", gib)]
    assert [(each.tier, each.capacity_bytes) for each in curves.read()] == expected
    curves.asked("", MIB, [key(1), key(2)], 0.0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert [each.requests for each in curves.read()] == [1] * len(expected)
