"""Several vLLMs on one service, and what vLLM shows of it: spaces, refusals, metrics, events."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.client import KeyState
from kvtier.spaces import Space
from tests.engines.vllm_process import (
    Engine,
    EngineFailed,
    Engines,
    Prompt,
    Reference,
    connected_to,
    emptied,
    storing,
)
from tests.sidecar import Sidecar, until

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_two_at_once_on_prompts_that_overlap(
    first: Engine, second: Engine, sidecar: Sidecar, reference: Reference
) -> None:
    common = reference.prompt(200, 600)
    tails = [reference.prompt(seed, 200).tokens for seed in range(201, 204)]
    prompts = [common, *(Prompt(common.tokens[:512] + tail) for tail in tails)]
    first.tell_generate(prompts)
    second.tell_generate(list(reversed(prompts)))
    answers = [first.generated(), second.generated()[::-1]]
    sidecar.until_idle()
    for each in answers:
        reference.check(prompts, each)
    for engine in (first, second):
        found = emptied(engine).generate(prompts)
        assert [answer.cached for answer in found] == [512] * 4
        reference.check(prompts, found)


def test_an_engine_killed_while_it_stores(
    engines: Engines, model: Path, first: Engine, sidecar: Sidecar, reference: Reference
) -> None:
    prompts = [reference.prompt(seed, 600) for seed in (210, 211)]
    with Engine(engines, model, **connected_to(sidecar.target)) as victim:
        victim.ask("wait_connected")
        before = sidecar.stats().counters["reserved_chunks"]
        victim.tell_generate(prompts)
        sidecar.until(lambda stats: stats.counters["reserved_chunks"] > before, "it stores")
        victim.kill()
    sidecar.until(lambda stats: stats.leases == 0, "its leases end with it")
    reference.check(prompts, first.generate(prompts))
    sidecar.until_idle()
    answers = emptied(first).generate(prompts)
    assert [answer.cached for answer in answers] == [512] * 2
    reference.check(prompts, answers)


def test_other_weights_of_the_same_model_share_nothing(
    engines: Engines,
    model: Path,
    first: Engine,
    sidecar: Sidecar,
    reference: Reference,
    tmp_path: Path,
) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    prompt = reference.prompt(220, 600)
    with storing(sidecar, 2):
        first.one(prompt)
    shutil.copytree(model, tmp_path / "model")
    [file] = (tmp_path / "model").glob("*.safetensors")
    weights = safetensors.load_file(file)
    weights["model.layers.3.self_attn.v_proj.weight"] *= 1.5
    safetensors.save_file(weights, file, {"format": "pt"})
    with Engine(engines, tmp_path / "model", **connected_to(sidecar.target)) as other:
        [space] = [Space.from_json(json.dumps(each).encode()) for each in other.ask("spaces")]
        client = sidecar.client(space)
        explained = client.explain(client.prefix(prompt.tokens), prompt.tokens)
        assert [each.state for each in explained] == [KeyState.OTHER_SPACE] * 2
        assert [each.fields for each in explained] == [("weights",)] * 2
        with storing(sidecar, 2):
            answer = emptied(other).one(prompt)
    assert answer.cached == 0
    assert answer.distance(reference.answers([prompt])[0]) > 1e-3
    reference.check([prompt], [emptied(first).one(prompt)])


# ── Settings ──


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_tokens": 200}, "chunk_tokens: 200 is not a multiple of vLLM's block size 128"),
        ({"chunks": 256}, r"kv_connector_extra_config\.chunks: unknown; known are chunk_tokens"),
        ({"load": "later"}, r"kv_connector_extra_config\.load: 'later' given; allowed is"),
    ],
)
def test_refused_settings(
    engines: Engines, model: Path, sidecar: Sidecar, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineFailed, match=message):
        Engine(engines, model, **connected_to(sidecar.target, **settings))


@pytest.fixture(scope="module")
def third(engines: Engines, model: Path, sidecar: Sidecar) -> Iterator[Engine]:
    """It stores prompts only, publishes events, and was started with vLLM's own policy for loads
    that fail."""
    settings = connected_to(sidecar.target, policy="fail", offload="prompt")
    events = {"enable_kv_cache_events": True, "publisher": "null"}
    with Engine(engines, model, kv_events_config=events, **settings) as engine:
        yield engine


def test_a_policy_that_ends_requests_is_warned_of(third: Engine, first: Engine) -> None:
    assert '"kv_load_failure_policy": "recompute" in --kv-transfer-config' in third.log
    assert "kv_load_failure_policy is" not in first.log


def test_prompts_are_stored_or_output_too(
    first: Engine, second: Engine, third: Engine, sidecar: Sidecar, reference: Reference
) -> None:
    prompts = [reference.prompt(230, 500), reference.prompt(231, 250)]
    with storing(sidecar, 1):
        answers = emptied(third).generate(prompts[:1], 20)
    with storing(sidecar, 2):  # the second one's tokens are output
        answers += first.generate(prompts[1:], 270)
    followed = [
        Prompt(prompt.tokens + tuple(answer.tokens))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    again = second.generate(followed)
    assert [answer.cached for answer in again] == [256, 512]
    reference.check(prompts[:1], answers[:1])
    reference.check(prompts[1:], answers[1:])
    reference.check(followed, again)


def test_stored_chunks_are_reported_as_events(
    third: Engine, sidecar: Sidecar, reference: Reference
) -> None:
    prompt = reference.prompt(232, 512)
    emptied(third).ask("watch")
    with storing(sidecar, 2):
        third.one(prompt)
    third.one(reference.prompt(233, 10))  # a later step reports what was stored
    events = [each for each in third.ask("take_events") if each.get("medium") == "KVTIER"]
    assert [event["kind"] for event in events] == ["BlockStored"] * 2
    assert [event["token_ids"] for event in events] == [
        list(prompt.tokens[:256]),
        list(prompt.tokens[256:]),
    ]
    assert {event["block_size"] for event in events} == {256}
    assert events[1]["parent_block_hash"] == events[0]["block_hashes"][0]


def test_after_a_reset_of_the_connector_an_engine_is_on_its_own(
    second: Engine, third: Engine, sidecar: Sidecar, reference: Reference
) -> None:
    prompt, later = reference.prompt(234, 300), reference.prompt(235, 300)
    with storing(sidecar, 1):
        emptied(third).one(prompt)
    assert third.ask("reset", connector=True)
    with storing(sidecar, 2):
        answers = third.generate([prompt, later])
    assert [answer.cached for answer in answers] == [0, 0]
    own = emptied(third).generate([prompt, later])
    with storing(sidecar, 1):  # the later one's, for everyone
        others = second.generate([prompt, later])
    assert [answer.cached for answer in own + others] == [256, 256, 256, 0]
    for each in (answers, own, others):
        reference.check([prompt, later], each)


# ── Processes ──


def test_an_engine_in_a_process_of_its_own(
    engines: Engines, model: Path, first: Engine, sidecar: Sidecar, reference: Reference
) -> None:
    prompts = [reference.prompt(seed, 600) for seed in (250, 251)]
    with storing(sidecar, 2):
        first.one(prompts[0])
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    settings = connected_to(sidecar.target)
    sessions = sidecar.stats().sessions
    with Engine(engines, model, environment=environment, **settings) as engine:
        sidecar.until(lambda stats: stats.sessions >= sessions + 2, "it is connected")
        with storing(sidecar, 2):
            answers = engine.generate(prompts)
        reference.check(prompts, answers)
        until(lambda: engine.ask("reset") and engine.one(prompts[1]).cached == 512, "a hit")
        assert engine.metrics()["vllm:kvtier_offloaded_chunks"] == 2
    assert [answer.cached for answer in answers] == [512, 0]
