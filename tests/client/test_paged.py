"""Chunks go into an engine's blocks and out of them: exactly, in order, with no wait missing."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.client.paged_loading import goes_through_staging, parts_of
from kvtier.kernels.compiled import HostKernels
from kvtier.kernels.device import Device, Place, Span, Stream
from kvtier.kernels.host import Chaos, HostDevice, Kernels
from kvtier.kernels.paged import PagedCache, Places
from kvtier.spaces import Layout
from tests.client.paged_world import (
    ALWAYS,
    LAYERS,
    MIXED,
    NEVER,
    STYLES,
    Case,
    CountedKernels,
    Style,
    World,
    bytes_of,
    device_of,
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = draw(st.integers(1, 10))
    return Case(
        style=draw(st.sampled_from(STYLES)),
        places=tuple(draw(st.lists(st.sampled_from(list(Place)), max_size=6))),
        tokens=tokens,
        block_tokens=draw(st.integers(1, 6)),
        spare_blocks=draw(st.integers(1, 3)),
        first_token=draw(st.integers(0, tokens - 1)),
        by_layer=draw(st.booleans()),
        least_copy_bytes=draw(st.sampled_from([ALWAYS, ALWAYS, NEVER])),
        buffers=draw(st.integers(4, 8)),
        seed=draw(st.integers(0, 2**32)),
    )


ORDERS = st.one_of(st.none(), st.integers(0, 2**32))


@settings(max_examples=200, deadline=None)
@given(case=cases(), chaos=ORDERS)
def test_blocks_get_what_the_chunks_hold_and_nothing_else(
    kernels: HostKernels, case: Case, chaos: int | None
) -> None:
    with device_of(kernels, chaos) as device:
        world = World(case, device)
        with world.load() as load:
            assert load.chunks == len(case.places)
            for layer in range(LAYERS):
                world.stream.wait(load.ready(layer))
            seen = world.see()
            assert load.finish() == len(case.places)
        world.stream.synchronize()
        expected = world.expected(len(case.places)).tobytes()
        assert bytes_of(seen).tobytes() == bytes_of(world.blocks).tobytes() == expected


@settings(max_examples=100, deadline=None)
@given(case=cases(), chaos=ORDERS, cut=st.integers(1, 5), first_ends_first=st.booleans())
def test_loads_that_overlap_do_not_touch_each_other(
    kernels: HostKernels, case: Case, chaos: int | None, cut: int, first_ends_first: bool
) -> None:
    with device_of(kernels, chaos) as device:
        world = World(case, device)
        loads = [world.load(0, cut), world.load(cut)]
        for load in loads if first_ends_first else reversed(loads):
            assert load.finish() == load.chunks
        world.stream.synchronize()
        expected = world.expected(len(case.places))
        assert bytes_of(world.blocks).tobytes() == expected.tobytes()


@settings(max_examples=100, deadline=None)
@given(case=cases(), chaos=ORDERS, data=st.data())
def test_slots_get_what_the_blocks_hold(
    kernels: HostKernels, case: Case, chaos: int | None, data: st.DataObject
) -> None:
    chunks = range(len(case.places))
    wanted = sorted(data.draw(st.sets(st.sampled_from(chunks)))) if chunks else []
    with device_of(kernels, chaos) as device:
        world = World(replace(case, places=(Place.HOST,) * len(chunks)), device)
        world.shelf.wanted = wanted
        outcome = world.offload()
        assert outcome.stored == wanted
        assert world.shelf.stored == {index: world.gathered(index) for index in wanted}
        world.stream.synchronize()
        assert bytes_of(world.blocks).tobytes() == world.before.tobytes()


# ── order, and what is waited for ─────────────────────────────────────────────────────────────────


def test_a_load_begins_without_waiting_for_the_device(kernels: HostKernels) -> None:
    for by_layer in (False, True):
        counted = CountedKernels(kernels)
        with device_of(counted, 1) as device:
            world = World(Case(places=MIXED, by_layer=by_layer), device)
            load = world.load()
            assert load.chunks == len(MIXED)
            assert not counted.runs  # with chaos, nothing is done before somebody waits
            load.finish()
            assert counted.runs


@pytest.mark.parametrize(
    "style",
    [STYLES[0], STYLES[5], STYLES[7], STYLES[8]],
    ids=lambda style: f"{style.axes} {style.chunk_axes} {style.encoding}",
)
@pytest.mark.parametrize("least_copy_bytes", [ALWAYS, NEVER])
def test_layers_are_ready_in_order_for_all_chunks(
    kernels: HostKernels, style: Style, least_copy_bytes: int
) -> None:
    case = Case(style, MIXED, by_layer=True, least_copy_bytes=least_copy_bytes)
    rest_untouched = 0
    for seed in range(20):
        with device_of(kernels, seed) as device:
            world = World(case, device)
            load = world.load()
            for layer in range(LAYERS):
                load.ready(layer).synchronize()
                now = bytes_of(world.blocks)
                assert world.has_layers(now, layer + 1)
                layers_so_far = range(layer + 1)
                rest_untouched += (
                    now.tobytes() == world.expected(len(MIXED), layers_so_far).tobytes()
                )
            load.finish()
    # Whenever chaos does what is waited for and no more, the rest is as it was before.
    assert rest_untouched >= 20 + 10


def load_goes_right(device: Device, case: Case) -> bool:
    """Load; whether the engine sees each layer in time and all bytes in the end, although slots are
    others' once the lease is released."""
    world = World(case, device)
    load = world.load()
    seen = []
    for layer in range(LAYERS):
        if case.by_layer or not layer:
            world.stream.wait(load.ready(layer))
        seen.append(world.see())
    if case.seed % 2:  # the engine may be done before or after
        world.stream.synchronize()
    load.finish()
    if not case.seed % 2:
        world.stream.synchronize()
    right = all(
        world.has_layers(bytes_of(each), layer + 1 if case.by_layer else LAYERS)
        for layer, each in enumerate(seen)
    )
    return right and bytes_of(seen[-1]).tobytes() == world.expected(len(case.places)).tobytes()


def offload_goes_right(device: Device, case: Case) -> bool:
    """Offload some; whether what was stored is right, although blocks are reused at once and a slot
    is read as soon as it counts as written."""
    world = World(case, device)
    world.shelf.wanted = [0, 1, 2, 4]
    right = world.offload().stored == [0, 1, 2, 4]
    wanted = {index: world.gathered(index) for index in world.shelf.wanted}
    return right and world.shelf.stored == wanted


SEEDS = range(24)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("least_copy_bytes", [ALWAYS, NEVER])
def test_each_wait_of_a_load_is_needed(
    kernels: HostKernels, by_layer: bool, least_copy_bytes: int
) -> None:
    case = Case(places=MIXED, by_layer=by_layer, least_copy_bytes=least_copy_bytes)
    with device_of(kernels, 0, forget=-1) as device:
        assert load_goes_right(device, case)
        waits = device.waits
    for forget in range(-1, waits):
        noticed = 0
        for seed in SEEDS:
            with device_of(kernels, seed, forget) as device:
                noticed += not load_goes_right(device, replace(case, seed=seed))
        assert (noticed > 0) == (forget >= 0), f"wait {forget} of {waits}: noticed {noticed} times"


def test_each_wait_of_an_offload_is_needed(kernels: HostKernels) -> None:
    with device_of(kernels, 0, forget=-1) as device:
        assert offload_goes_right(device, Case(places=MIXED))
        waits = device.waits
    for forget in range(-1, waits):
        noticed = 0
        for seed in SEEDS:
            counted = CountedKernels(kernels)
            with device_of(counted, seed, forget) as device:
                noticed += not offload_goes_right(device, Case(places=MIXED, seed=seed))
                runs = counted.runs
            noticed += counted.runs > runs  # a block was read after the offload had returned
        assert (noticed > 0) == (forget >= 0), f"wait {forget} of {waits}: noticed {noticed} times"


# ── the rule of staging ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("chunk_axes", "by_layer", "pieces"),
    [
        ("layer,plane,head,token,dim", False, [(0, 576)]),
        ("plane,layer,head,token,dim", False, [(0, 576)]),
        ("layer,plane,head,token,dim", True, [(0, 192), (192, 192), (384, 192)]),
        ("plane,layer,head,token,dim", True, [(0, 576)] * 3),
    ],
)
def test_what_is_contiguous_is_staged_if_it_is_large(
    chunk_axes: str, by_layer: bool, pieces: list[tuple[int, int]]
) -> None:
    layout = Layout("float16", LAYERS, 2, 6, 4, 2, chunk_axes)
    cache = PagedCache(((1000, 2000),) * LAYERS, 9, 4, 2, 12, 96, 24, 12)
    parts = parts_of(cache, layout, by_layer=by_layer)
    assert [(part.offset, part.layout.nbytes) for part in parts] == pieces
    contiguous = [part.layers is None for part in parts]
    assert contiguous == [chunk_axes.startswith("layer") or not by_layer] * len(parts)
    for part in parts:
        staged = part.layers is None
        nbytes = part.layout.nbytes
        assert goes_through_staging(part, Place.HOST, nbytes) is staged
        assert not goes_through_staging(part, Place.HOST, nbytes + 1)
        assert not goes_through_staging(part, Place.DEVICE, nbytes)


def test_a_layer_of_a_quantised_chunk_is_a_chunk() -> None:
    layout = Layout("float16", LAYERS, 2, 6, 4, 2, encoding="kivi-int8")
    cache = PagedCache(((1000, 2000),) * LAYERS, 9, 4, 2, 12, 96, 24, 12)
    layer = layout.nbytes // LAYERS
    parts = parts_of(cache, layout, by_layer=True)
    assert [(part.offset, part.nbytes) for part in parts] == [
        (0, layer),
        (layer, layer),
        (2 * layer, layer),
    ]
    assert all(part.layers is None and part.layout.nbytes == layer for part in parts)


class Copying(HostDevice):
    """Notes how many bytes each copy has, where the first of a call goes and comes from."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(Chaos(1), kernels)
        self.copied: list[list[int]] = []
        self.begins: set[int] = set()
        self.sources: list[int] = []

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        self.copied.append([target.nbytes for target, _ in pairs])
        self.begins.add(pairs[0][0].address)
        self.sources.append(pairs[0][1].address)
        super().copy(stream, pairs)


def test_layers_of_several_chunks_share_a_buffer(kernels: HostKernels) -> None:
    device = Copying(kernels)
    world = World(Case(places=MIXED, by_layer=True), device)
    world.load().finish()
    layer = world.layout.nbytes // LAYERS
    _, *copies = device.copied  # the first is the engine's own
    assert copies == [[layer] * 3, [layer] * 2] * LAYERS
    assert len(device.begins) == 1 + 2  # both buffers are used
    device.close()


def test_the_chunks_of_an_offload_follow_each_other_without_the_host(kernels: HostKernels) -> None:
    """All is queued before anything is done, and one chunk is gathered while another leaves."""
    counted = CountedKernels(kernels)
    device = Copying(counted)
    world = World(Case(places=(Place.HOST,) * 5), device)
    with world.shelf.offload(world.prefix, None) as offload:
        places = Places.of(world.cache, world.layout, world.tables)
        world.paged._offloads.fill(offload, places, world.stream.record())
        assert len(offload.coming) == 5
        assert counted.runs == 0
    assert counted.runs == 5
    one, other = device.sources[0], device.sources[1]
    assert one != other
    assert device.sources == [one, other, one, other, one]
    device.close()
