"""Two engines that differ in anything share nothing, and each is told in what they differ (I2)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier import fingerprint
from kvtier.client import Client, KeyState
from kvtier.spaces import Layout, Space
from tests.sidecar import Sidecar, load, offload

LAYOUT = Layout(dtype="float16", layers=4, heads=2, head_dim=16, tokens=16, rank=0, ranks=2)
SPACE = Space("llama", LAYOUT, weights="sha256:aa", rope="theta=10000", tenant="blue")
TOKENS = list(range(160))

CHANGES: dict[str, Space] = {
    "model": replace(SPACE, model="llama-2"),
    "weights": replace(SPACE, weights="sha256:ab"),
    "rope": replace(SPACE, rope="theta=500000"),
    "layout.dtype": replace(SPACE, layout=replace(LAYOUT, dtype="bfloat16")),
    "layout.layers": replace(SPACE, layout=replace(LAYOUT, layers=5)),
    "layout.heads": replace(SPACE, layout=replace(LAYOUT, heads=4)),
    "layout.head_dim": replace(SPACE, layout=replace(LAYOUT, head_dim=32)),
    "layout.planes": replace(SPACE, layout=replace(LAYOUT, planes=1)),
    "layout.tokens": replace(SPACE, layout=replace(LAYOUT, tokens=8)),
    "layout.axes": replace(SPACE, layout=replace(LAYOUT, axes="plane,layer,head,token,dim")),
    "layout.rank": replace(SPACE, layout=replace(LAYOUT, rank=1)),
    "layout.ranks": replace(SPACE, layout=replace(LAYOUT, ranks=4)),
    "layout.encoding": replace(SPACE, layout=replace(LAYOUT, encoding="kivi-int4-g32")),
}


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with Sidecar(tmp_path_factory.mktemp("spaces")) as running:
        yield running


@pytest.fixture(scope="module")
def first(sidecar: Sidecar) -> Client:
    """An engine that has stored a prompt."""
    client = sidecar.client(SPACE)
    assert len(offload(client, client.prefix(TOKENS)).stored) == 10
    return client


def finds_nothing(client: Client) -> None:
    """Neither the prompt nor any chunk of it, asked for in every way."""
    prefix = client.prefix(TOKENS)
    assert client.lookup(prefix) == load(client, prefix) == client.prefetch(prefix) == 0
    assert all(client.lookup(prefix[n : n + 1]) == 0 for n in range(len(prefix)))
    assert client.evict(prefix) == client.evict(None) == 0


@pytest.mark.parametrize("field", CHANGES)
def test_a_space_that_differs_in_one_field(sidecar: Sidecar, first: Client, field: str) -> None:
    other = sidecar.client(CHANGES[field])
    finds_nothing(other)
    prefix = other.prefix(TOKENS)
    for explained in other.explain(prefix, TOKENS):
        assert explained.state is KeyState.OTHER_SPACE
        assert explained.fields == (field,)
        assert field in explained.detail
    without_tokens = other.explain(prefix)
    assert {each.state for each in without_tokens} == {KeyState.NEVER_STORED}
    assert len(offload(other, prefix).stored) == len(prefix)
    assert load(other, prefix) == len(prefix)
    assert load(first, first.prefix(TOKENS)) == 10
    other.close()


def test_the_keys_of_another_space_are_of_no_use(sidecar: Sidecar, first: Client) -> None:
    """Also to a client that knows them."""
    other = sidecar.client(CHANGES["weights"])
    theirs = first.prefix(TOKENS)
    assert other.lookup(theirs) == load(other, theirs) == other.evict(theirs) == 0
    assert set(offload(other, theirs).refused) == set(range(10))
    assert load(first, theirs) == 10


def test_another_tenant_is_told_of_no_content(sidecar: Sidecar, first: Client) -> None:
    other = sidecar.client(replace(SPACE, tenant="red"))
    finds_nothing(other)
    held = other.explain(other.prefix(TOKENS), TOKENS)
    unheard = [token + 1 for token in TOKENS]
    never = other.explain(other.prefix(unheard), unheard)
    assert {each.fields for each in held} == {("tenant",)}
    assert [(each.state, each.detail, each.fields) for each in held] == [
        (each.state, each.detail, each.fields) for each in never
    ], "whether the other tenant holds a prompt must not be told"
    assert load(first, first.prefix(TOKENS)) == 10


@pytest.mark.parametrize("position", [0, 15, 16, 80, 159])
def test_a_changed_token_ends_the_hit_before_its_chunk(
    sidecar: Sidecar, first: Client, position: int
) -> None:
    alone = sidecar.client(replace(SPACE, model="alone"))
    tokens = [1000 * (1 + position) + token for token in TOKENS]
    for client in (alone, sidecar.client(replace(SPACE, model="alone too"))):
        offload(client, client.prefix(tokens))
    changed = [*tokens[:position], 7_000_000, *tokens[position + 1 :]]
    prefix = alone.prefix(changed)
    assert alone.lookup(prefix) == load(alone, prefix) == position // 16
    explained = alone.explain(prefix, changed)
    missed = explained[position // 16 :]
    assert {each.state for each in missed} == {KeyState.NEVER_STORED}
    assert {each.fields for each in missed} == {()}
    if position >= 16:
        assert f"part from this one in chunk {position // 16}" in missed[0].detail


def test_a_tenant_of_another_model_explains_nothing(sidecar: Sidecar, first: Client) -> None:
    other = sidecar.client(replace(SPACE, tenant="green", model="unrelated"))
    explained = other.explain(other.prefix(TOKENS), TOKENS)
    assert {each.state for each in explained} == {KeyState.NEVER_STORED}


def test_what_else_decides_the_kv_is_part_of_the_key(first: Client) -> None:
    assert first.lookup(first.prefix(TOKENS, b"lora-1")) == 0
    per_chunk = [b""] * 5 + [b"image"] + [b""] * 4
    assert first.lookup(first.prefix(TOKENS, per_chunk)) == 5


def test_other_weight_files_are_another_space(sidecar: Sidecar, tmp_path: Path) -> None:
    """From the files on: one byte of one weight changed, and nothing is shared."""
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    header = b'{"w":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'
    clients = []
    for last in (0, 1):
        content = len(header).to_bytes(8, "little") + header + bytes(63) + bytes([last])
        weights.write_bytes(content)
        clients.append(sidecar.client(replace(SPACE, weights=fingerprint.of_path(tmp_path))))
    before, after = clients
    assert len(offload(before, before.prefix(TOKENS)).stored) == 10
    assert load(before, before.prefix(TOKENS)) == 10
    finds_nothing(after)
    [explained, *_] = after.explain(after.prefix(TOKENS), TOKENS)
    assert explained.fields == ("weights",)


@pytest.mark.slow
def test_spaces_stay_apart_on_disk(tmp_path: Path) -> None:
    spaces = [SPACE, *list(CHANGES.values())]
    with Sidecar(tmp_path) as sidecar:
        for number, space in enumerate(spaces):
            client = sidecar.client(space)
            prefix = client.prefix([token + number for token in TOKENS])
            assert len(offload(client, prefix).stored) == len(prefix)
            client.close()
        assert sidecar.terminate() == 0
        sidecar.start()
        for number, space in enumerate(spaces):
            client = sidecar.client(space)
            for others in range(len(spaces)):
                prefix = client.prefix([token + others for token in TOKENS])
                assert load(client, prefix) == (len(prefix) if others == number else 0)
            client.close()
