"""Salts, images, embeddings and adapters in the keys of a request."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

np = pytest.importorskip("numpy")
safetensors = pytest.importorskip("safetensors.numpy")

from kvtier.connectors.vllm.extras import Extras  # noqa: E402

CHUNK = 8


def extra_keys(
    request: Any, start: int, end: int, first: int
) -> tuple[tuple[Any, ...] | None, int]:
    """vLLM's generate_block_hash_extra_keys, in small."""
    lora = request.lora_request
    found: list[Any] = [("lora", lora.lora_name, lora.lora_path)] if lora else []
    found += [
        ("mm", image.identifier, image.offset - start)
        for image in request.mm_features
        if image.offset < end and start < image.offset + image.length
    ]
    if not start and request.cache_salt:
        found.append(("cache_salt", request.cache_salt))
    if request.prompt_embeds is not None:
        found.append(("prompt_embeds", bytes(request.prompt_embeds[start:end])))
    return tuple(found) or None, first


def ask(**more: Any) -> Any:
    plain = {"lora_request": None, "cache_salt": None, "mm_features": [], "prompt_embeds": None}
    return SimpleNamespace(**{**plain, **more})


def image(identifier: str, offset: int, length: int = 4) -> Any:
    return SimpleNamespace(identifier=identifier, offset=offset, length=length)


def extras_of(request: Any, salt: bytes = b"", extras: Extras | None = None) -> list[bytes]:
    extra = (extras or Extras(extra_keys, CHUNK)).of(request, salt)
    return [extra(place) for place in range(4)]


def test_a_plain_prompt_has_none() -> None:
    assert extras_of(ask()) == [b""] * 4


@pytest.mark.parametrize("salt", ["s", "s" * 10_000_000, "\ud800", "\udfff\ud800", "\x00", "🙂"])
def test_a_salt_is_in_the_first_chunk(salt: str) -> None:
    found = extras_of(ask(cache_salt=salt))
    assert [len(each) for each in found] == [32, 0, 0, 0]
    assert found == extras_of(ask(cache_salt=salt))
    assert found != extras_of(ask(cache_salt=salt + "\ud801"))


def test_an_images_place_counts() -> None:
    requests = [
        ask(mm_features=[image("a", 2)]),
        ask(mm_features=[image("a", 3)]),
        ask(mm_features=[image("b", 2)]),
        ask(mm_features=[image("a", 2), image("b", 12)]),
        ask(mm_features=[image("a", 2), image("b", 13)]),
        ask(mm_features=[image("a", 6)]),  # over two chunks
    ]
    found = [tuple(extras_of(request)) for request in requests]
    assert len({*found}) == len(found)
    assert [bool(each) for each in found[0]] == [True, False, False, False]
    assert [bool(each) for each in found[5]] == [True, True, False, False]


def test_embeddings_count_chunk_by_chunk() -> None:
    mine, theirs = bytes(32), bytes(20) + b"\1" + bytes(11)
    same = [
        a == b
        for a, b in zip(
            extras_of(ask(prompt_embeds=mine)), extras_of(ask(prompt_embeds=theirs)), strict=True
        )
    ]
    assert same == [True, True, False, True]


def test_a_salt_of_ours_is_in_every_chunk_of_every_request() -> None:
    for request in (ask(), ask(cache_salt="s"), ask(mm_features=[image("a", 2)])):
        plain, ours, other = (extras_of(request, salt) for salt in (b"", b"1", b"2"))
        assert all(a != b != c != a for a, b, c in zip(plain, ours, other, strict=True))


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    train(folder, 1)
    return folder


def train(folder: Path, fill: float, alpha: int = 16) -> None:
    tensors = {"q.lora_A": np.full((4, 64), fill, np.float32)}
    (folder / "adapter_model.safetensors").write_bytes(safetensors.save(tensors))
    (folder / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')


def lora(path: object, name: str = "x", number: int = 1) -> Any:
    return ask(
        lora_request=SimpleNamespace(lora_name=name, lora_path=str(path), lora_int_id=number)
    )


def test_an_adapter_is_in_every_chunk_and_known_to_other_engines(adapter: Path) -> None:
    found = extras_of(lora(adapter))
    assert all(found)
    assert found == extras_of(lora(adapter))
    assert found != extras_of(lora(adapter, name="y"))


def test_an_adapter_with_another_scale_is_another_one(adapter: Path) -> None:
    before = extras_of(lora(adapter))
    train(adapter, 1, alpha=32)
    assert extras_of(lora(adapter)) != before


def test_an_adapter_of_another_number_is_read_anew(adapter: Path) -> None:
    extras = Extras(extra_keys, CHUNK)
    before = extras_of(lora(adapter), extras=extras)
    train(adapter, 2)
    assert extras_of(lora(adapter, number=2), extras=extras) != before
    assert extras_of(lora(adapter, number=2), extras=extras) == extras_of(lora(adapter))


def test_kv_of_an_adapter_in_memory_is_not_given_out_as_that_of_its_new_files(
    adapter: Path,
) -> None:
    running = Extras(extra_keys, CHUNK)
    extras_of(lora(adapter), extras=running)  # the engine has loaded it
    train(adapter, 2)
    started_after = Extras(extra_keys, CHUNK)
    mine = extras_of(lora(adapter), extras=running)
    assert mine != extras_of(lora(adapter), extras=started_after)


def test_once_its_files_have_changed_an_adapter_is_known_to_one_engine_only(adapter: Path) -> None:
    running = Extras(extra_keys, CHUNK)
    before = extras_of(lora(adapter), extras=running)
    train(adapter, 2)
    now = extras_of(lora(adapter), extras=running)
    assert now not in (before, extras_of(lora(adapter)))


def test_an_adapter_loaded_in_place_is_known_to_one_engine_only(adapter: Path) -> None:
    extras = Extras(extra_keys, CHUNK)
    before = extras_of(lora(adapter), extras=extras)
    train(adapter, 2)
    again = lora(adapter)
    again.lora_request.load_inplace = True
    replaced = extras_of(again, extras=extras)
    assert replaced not in (before, extras_of(lora(adapter)))
    assert extras_of(lora(adapter), extras=extras) == replaced
    assert extras_of(again, extras=Extras(extra_keys, CHUNK)) != replaced


def test_an_adapter_without_files_is_known_to_one_engine_only(tmp_path: Path) -> None:
    mine, theirs = Extras(extra_keys, CHUNK), Extras(extra_keys, CHUNK)
    nowhere = tmp_path / "nowhere"
    found = extras_of(lora(nowhere), extras=mine)
    assert found == extras_of(lora(nowhere), extras=mine)
    assert found != extras_of(lora(nowhere), extras=theirs)
    assert found != extras_of(lora(nowhere, number=2), extras=mine)


def test_an_adapters_files_are_read_once(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extras = Extras(extra_keys, CHUNK)
    before = extras_of(lora(adapter), extras=extras)
    monkeypatch.setattr("kvtier.fingerprint.of_path", lambda path: pytest.fail("read again"))
    assert extras_of(lora(adapter), extras=extras) == before
