"""Chunks out of the engine's blocks and back, whatever the layout of its memory."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

torch = pytest.importorskip("torch")

from kvtier.connectors.vllm.copies import HostCopies, Landed, copies_for  # noqa: E402
from kvtier.connectors.vllm.paged import Pages, tensor_over  # noqa: E402
from kvtier.connectors.vllm.parts import Part, Shard, parts_of  # noqa: E402
from kvtier.errors import InvalidRequest  # noqa: E402
from tests.connectors.vllm.making import MODEL, layer  # noqa: E402
from tests.connectors.vllm.paged_engines import LAYOUTS, Case, Engine, cases, noise  # noqa: E402


def gathered(engine: Engine, blocks: Mapping[int, Sequence[int]]) -> bytearray:
    data = bytearray(engine.pages.nbytes)
    HostCopies().gather(engine.pages, memoryview(data), blocks, None)
    return data


@settings(max_examples=60)
@given(case=cases(), data=st.data(), read_only=st.booleans())
def test_a_chunk_comes_back_token_for_token_and_touches_nothing_else(
    case: Case, data: st.DataObject, read_only: bool
) -> None:
    theirs, mine = Engine(case, 1), Engine(case, 50)
    source, target = theirs.some_blocks(data), mine.some_blocks(data)
    chunk = gathered(theirs, source)
    together = math.lcm(*(tokens for _, tokens in mine.part.groups))
    skip = data.draw(st.integers(0, case.chunk // together)) * together
    target = {  # blocks that the engine does not keep
        group: [0 if data.draw(st.integers(0, 5)) == 0 else block for block in blocks]
        for group, blocks in target.items()
    }
    before = mine.everything()
    memory = memoryview(bytes(chunk) if read_only else chunk)
    HostCopies().scatter(mine.pages, [Landed(memory, target, skip)], None)
    after = mine.everything()
    for name, group in mine.part.layers:
        tokens = case.block_tokens[group]
        for place, block in enumerate(target[group]):
            if block and place * tokens >= skip:
                expected = theirs.tokens(name, group, [source[group][place]])
                assert torch.equal(after.pop((name, block)), expected)
    assert all(torch.equal(kept, before[place]) for place, kept in after.items())


@settings(max_examples=30)
@given(case=cases(), data=st.data())
def test_a_chunk_is_layers_heads_tokens_content(case: Case, data: st.DataObject) -> None:
    engine = Engine(case, 1)
    blocks = engine.some_blocks(data)
    chunk = gathered(engine, blocks)
    found = torch.frombuffer(chunk, dtype=torch.uint8).view(
        len(engine.part.layers), case.heads, case.chunk, -1
    )
    for place, (name, group) in enumerate(engine.part.layers):
        tokens = engine.tokens(name, group, blocks[group])
        assert torch.equal(found[place].transpose(0, 1), tokens)


@settings(max_examples=30)
@given(case=cases(), data=st.data())
def test_the_layout_of_memory_does_not_show_in_a_chunk(case: Case, data: st.DataObject) -> None:
    """What an engine of another layout stored is the same token for token."""
    first = Engine(case, 1)
    rows = max(case.kernel_blocks)
    other = data.draw(st.sampled_from(LAYOUTS if rows == 1 else LAYOUTS[:2]))
    second = Engine(Case(**{**vars(case), "layout": other}), 2)
    assert first.part.digest == second.part.digest
    source, target = first.some_blocks(data), second.some_blocks(data)
    chunk = gathered(first, source)
    HostCopies().scatter(second.pages, [Landed(memoryview(chunk), target, 0)], None)
    assert gathered(second, target) == chunk


def test_blocks_of_another_size_have_another_space() -> None:
    """vLLM's CPU backend keeps all keys of a block before all its values, and packs keys by what
    the CPU can do (cpu_attn.py): blocks can only be moved as they are."""
    small = Engine(Case("LBHNC", "float32", 20, 2, 3, (2,), (1,), (0,), 12), 1)
    large = Engine(Case("LBHNC", "float32", 20, 2, 3, (6,), (1,), (0,), 12), 2)
    assert small.part.digest != large.part.digest


PLAIN = Case("LBHNC", "float32", 9, 2, 2, (4,), (1,), (0,), 8)


@pytest.mark.parametrize("blocks", [[], [1], [1, 2, 3]])
@pytest.mark.parametrize("way", ["gather", "scatter"])
def test_a_chunk_of_too_few_or_too_many_blocks_is_refused(blocks: list[int], way: str) -> None:
    engine = Engine(PLAIN, 1)
    before = engine.everything()
    data = bytearray(engine.pages.nbytes)
    copies, view = HostCopies(), memoryview(data)
    call = {
        "gather": lambda: copies.gather(engine.pages, view, {0: blocks}, None),
        "scatter": lambda: copies.scatter(engine.pages, [Landed(view, {0: blocks}, 0)], None),
    }[way]
    with pytest.raises(ValueError, match=f"{len(blocks)} blocks"):
        call()
    assert not any(data)
    assert all(torch.equal(kept, before[at]) for at, kept in engine.everything().items())


def test_several_chunks_are_scattered_at_once() -> None:
    engine = Engine(PLAIN, 1)
    chunks = [noise(engine.pages.nbytes, seed).numpy().tobytes() for seed in (5, 6)]
    landed = [
        Landed(memoryview(chunks[0]), {0: [1, 2]}, 0),
        Landed(memoryview(chunks[1]), {0: [3, 4]}, 4),
    ]
    kept = engine.tokens("model.layers.0.attn", 0, [3]).clone()
    HostCopies().scatter(engine.pages, landed, None)
    assert gathered(engine, {0: [1, 2]}) == chunks[0]
    assert torch.equal(engine.tokens("model.layers.0.attn", 0, [3]), kept)
    HostCopies().scatter(engine.pages, [], None)


def test_read_only_memory_is_read_without_a_warning() -> None:
    data = bytes(range(64))
    tensor = tensor_over(memoryview(data))
    assert tensor.tolist() == list(range(64))
    assert tensor_over(memoryview(data).toreadonly()[8:16]).tolist() == list(range(8, 16))


def test_a_device_without_streams_of_its_own_is_copied_from_directly() -> None:
    assert isinstance(copies_for(torch.device("cpu")), HostCopies)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda caches: {}, "no KV cache"),
        (lambda caches: {name: cache[:-1] for name, cache in caches.items()}, "shape"),
        (lambda caches: {name: cache[:, :1] for name, cache in caches.items()}, "shape"),
        (lambda caches: {name: cache[..., :1] for name, cache in caches.items()}, "shape"),
        (lambda caches: {name: cache[:, :, :3] for name, cache in caches.items()}, "shape"),
        (lambda caches: {name: cache[:0] for name, cache in caches.items()}, "shape"),
    ],
    ids=["none", "blocks", "heads", "content", "tokens", "empty"],
)
def test_a_cache_that_is_not_what_the_part_says_is_refused_by_layer(change: Any, says: str) -> None:
    engine = Engine(PLAIN, 1)
    with pytest.raises(InvalidRequest, match=f"(?s){says}.*") as caught:
        Pages(engine.part, change(engine.caches), [PLAIN.blocks])
    assert "model.layers.0.attn" in str(caught.value)


def test_bytes_are_taken_as_the_dtype_of_the_part() -> None:
    packed: Part
    (packed,) = parts_of(
        [layer(quantised=True, content_bytes=16, dtype="float32")], MODEL, Shard(), 8
    )
    cache = noise(9 * 2 * 4 * 16, 1).view(torch.float32).view(9, 2, 4, 4)
    pages = Pages(packed, {"model.layers.0.attn": cache}, [9])
    data = bytearray(pages.nbytes)
    HostCopies().gather(pages, memoryview(data), {0: [3, 5]}, None)
    assert bytes(data[:16]) == cache[3, 0, 0].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("dtype", "tokens", "dim", "word"),
    [
        ("float32", 128, 64, torch.int64),
        ("bfloat16", 4, 1, torch.int32),
        ("float16", 16, 2, torch.int64),
        ("float8_e4m3fn", 4, 3, torch.int16),
        ("float64", 3, 1, torch.int64),
    ],
)
def test_blocks_are_moved_as_the_widest_integers(
    dtype: str, tokens: int, dim: int, word: Any
) -> None:
    engine = Engine(Case("LBHNC", dtype, 9, 2, dim, (tokens,), (1,), (0, 0), 2 * tokens), 1)
    paged, flat = engine.pages.views(engine.pages.new_chunk(), {0: [3, 5]})
    assert {view.dtype for view in paged + flat} == {word}


def test_what_torch_would_give_to_its_threads_is_moved_head_by_head() -> None:
    engine = Engine(Case("LBHNC", "float32", 9, 3, 64, (256,), (1,), (0,), 256), 1)
    paged, flat = engine.pages.views(engine.pages.new_chunk(), {0: [3]})
    assert [view.shape for view in paged] == [view.shape for view in flat] == [(256, 64)] * 3
