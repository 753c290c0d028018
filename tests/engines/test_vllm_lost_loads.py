"""Chunks that vanish after the service has said that it holds them: vLLM computes them again.

Either the service does not hand them out, or they do not get into blocks although vLLM counts on
them. What is computed on top of such blocks is garbage: it must be neither in an answer nor stored.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.vllm_process import (
    Engine,
    Engines,
    Prompt,
    Reference,
    connected_to,
    emptied,
    storing,
)
from tests.sidecar import Sidecar

pytestmark = [pytest.mark.engine, pytest.mark.slow]

HELD = 768  # tokens of each prompt that are stored before: three chunks
SEEDS = itertools.count(50)


@pytest.fixture(scope="module")
def async_engine(engines: Engines, model: Path, sidecar: Sidecar) -> Iterator[Engine]:
    settings = connected_to(sidecar.target, load="async", lookup_wait_ms=0)
    with Engine(engines, model, num_gpu_blocks_override=80, **settings) as engine:
        yield engine


@pytest.fixture(params=["sync", "async"])
def losing(request: pytest.FixtureRequest, second_engine: Engine, async_engine: Engine) -> Engine:
    """An engine to lose chunks in, that loads in line with a step or in the background."""
    return emptied(second_engine if request.param == "sync" else async_engine)


@pytest.fixture(scope="module")
def held(first_engine: Engine, sidecar: Sidecar, reference: Reference) -> Prompt:
    prompt = reference.prompt(40, HELD)
    with storing(sidecar, 3):
        answer = emptied(first_engine).one(prompt)
    reference.check([prompt], [answer])
    return prompt


def test_nothing_is_lost(losing: Engine, reference: Reference, held: Prompt) -> None:
    answer = losing.one(held)
    assert HELD - 1 <= answer.cached <= HELD
    reference.check([held], [answer])
    assert losing.metrics()["vllm:kvtier_failed_loads"] == 0


@pytest.mark.parametrize("keep", [0, 2])
def test_a_request_alone(losing: Engine, reference: Reference, held: Prompt, keep: int) -> None:
    before = losing.metrics()
    with losing.wrong("lose", keep=keep):
        answer = losing.one(held)
    assert (losing.metrics() - before)["vllm:kvtier_failed_loads"] == 1
    again = losing.one(held)  # its blocks hold what was computed
    assert again.cached >= HELD - 128
    reference.check([held] * 2, [answer, again])


@pytest.mark.parametrize("loss", [("lose", 0), ("lose", 2), ("withhold", 1)], ids=str)
def test_requests_that_share_what_is_lost(
    losing: Engine,
    first: Engine,
    sidecar: Sidecar,
    reference: Reference,
    held: Prompt,
    loss: tuple[str, int],
) -> None:
    """Two that share it and one that does not, at once; each stores a chunk of its own."""
    prompts = [Prompt(held.tokens + reference.prompt(next(SEEDS), 260).tokens) for _ in range(2)]
    prompts.append(reference.prompt(next(SEEDS), 260))
    with storing(sidecar, 3), losing.wrong(loss[0], keep=loss[1]):
        answers = losing.generate(prompts)
    reference.check(prompts, answers)
    elsewhere = first.generate(prompts)
    assert [answer.cached for answer in elsewhere] == [HELD + 256] * 2 + [256]
    reference.check(prompts, elsewhere)
