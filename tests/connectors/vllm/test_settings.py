"""kv_connector_extra_config: every key, what it may be, and what is said of what it may not."""

import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtier.connectors.vllm.parts import Shard, parts_of
from kvtier.connectors.vllm.settings import LoadMode, Scope, Settings
from kvtier.errors import InvalidRequest
from tests.connectors.vllm.making import MODEL, layer

KEYS = {
    "target", "chunk_tokens", "load", "offload", "lookup_wait_ms", "deadline_ms", "tenant",
    "weights",
}  # fmt: skip


def test_defaults_are_those_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    found = Settings.parse({})
    assert found.target.startswith("unix:///run/user/7/")
    assert (found.chunk_tokens, found.load, found.offload) == (
        256, LoadMode.SYNC, Scope.PROMPT_AND_OUTPUT,
    )  # fmt: skip
    assert (found.lookup_wait_ms, found.deadline_ms) == (5, 1000)
    assert (found.tenant, found.weights) == ("", "")


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("target", "unix:///tmp/x.sock", "unix:///tmp/x.sock"),
        ("target", "localhost:7", "localhost:7"),
        ("chunk_tokens", 16, 16),
        ("chunk_tokens", 65_536, 65_536),
        ("load", "sync", LoadMode.SYNC),
        ("load", "async", LoadMode.ASYNC),
        ("offload", "prompt", Scope.PROMPT),
        ("offload", "prompt_and_output", Scope.PROMPT_AND_OUTPUT),
        ("lookup_wait_ms", 0, 0),
        ("lookup_wait_ms", 0.5, 0.5),
        ("deadline_ms", 60_000, 60_000),
        ("tenant", "a", "a"),
        ("tenant", "ä" * 2048, "ä" * 2048),
        ("weights", "v1", "v1"),
    ],
)
def test_each_key_is_read(key: str, value: Any, read: Any) -> None:
    assert getattr(Settings.parse({key: value}), key) == read


def test_an_unknown_key_is_named_with_those_that_are_known() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Settings.parse({"target": "unix:///x", "chunk_token": 256})
    said = str(caught.value)
    assert "kv_connector_extra_config.chunk_token:" in said
    assert all(key in said for key in KEYS)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("chunk_tokens", 0, "1 to 65536"),
        ("chunk_tokens", 65_537, "1 to 65536"),
        ("chunk_tokens", 256.0, "whole number"),
        ("chunk_tokens", "256", "whole number"),
        ("chunk_tokens", True, "whole number"),
        ("chunk_tokens", None, "whole number"),
        ("load", "later", '"sync", "async"'),
        ("load", "SYNC", '"sync", "async"'),
        ("load", ["sync"], '"sync", "async"'),
        ("offload", None, '"prompt", "prompt_and_output"'),
        ("lookup_wait_ms", -1, "0 to 1000"),
        ("lookup_wait_ms", 1001, "0 to 1000"),
        ("lookup_wait_ms", math.nan, "0 to 1000"),
        ("lookup_wait_ms", "5", "a number"),
        ("deadline_ms", 0, "1 to 60000"),
        ("deadline_ms", math.inf, "1 to 60000"),
        ("deadline_ms", False, "a number"),
        ("tenant", 7, "at most 4096 bytes"),
        ("tenant", "ä" * 2049, "at most 4096 bytes"),
        ("weights", b"v1", "at most 4096 bytes"),
        ("target", "tcp://x:1", "unix:///"),
        ("target", "/tmp/x.sock", "unix:///"),
        ("target", 5, "at most 4096 bytes"),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_what_is_allowed(
    key: str, value: Any, allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Settings.parse({key: value})
    said = str(caught.value)
    assert key in said
    assert str(value)[:200] in said
    assert allowed in said
    assert len(said) < 500


@given(st.integers())
def test_chunk_sizes_are_refused_exactly_out_of_range(value: int) -> None:
    if 1 <= value <= 65_536:
        assert Settings.parse({"chunk_tokens": value}).chunk_tokens == value
    else:
        with pytest.raises(InvalidRequest, match=str(value)):
            Settings.parse({"chunk_tokens": value})


@given(
    st.dictionaries(
        st.sampled_from(sorted(KEYS)) | st.text(),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
        max_size=3,
    )
)
def test_whatever_json_holds_is_read_or_refused(given_settings: dict[str, Any]) -> None:
    try:
        found = Settings.parse(given_settings)
    except InvalidRequest:
        return
    assert given_settings.keys() <= KEYS
    assert isinstance(found.load, LoadMode)


@pytest.mark.parametrize("key", ["tenant", "weights"])
def test_a_text_that_cannot_be_sent_is_refused_by_its_name(key: str) -> None:
    with pytest.raises(InvalidRequest, match=key):
        Settings.parse({key: "\ud800"})


def test_the_tenant_reaches_the_space() -> None:
    other = MODEL.__class__("Tiny", {}, "w", "", tenant="a")
    mine, theirs = (
        parts_of([layer()], model, Shard(), 8)[0].digest
        for model in (other, MODEL.__class__("Tiny", {}, "w", "", tenant="b"))
    )
    assert mine != theirs
