"""Models whose KV has other shapes: several groups of layers, windows, a latent cache, none."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.tiny_models import VOCABULARY
from tests.engines.vllm_process import (
    Child,
    Engine,
    EngineFailed,
    Engines,
    Prompt,
    Reference,
    connected_to,
    emptied,
    storing,
)
from tests.sidecar import Sidecar

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LENGTHS = [700, 1500, 3000]
CHUNKS = sum(length // 256 for length in LENGTHS)
SETTINGS = {"max_model_len": 4096, "num_gpu_blocks_override": 1200, "skip_tokenizer_init": True}
TEXT = random.Random(1).choices(range(3, VOCABULARY), k=3500)


def saved(engines: Engines, kind: str, folder: Path) -> Path:
    with Child(engines) as child:
        child.ask("save_model", kind=kind, folder=str(folder))
    return folder


# ── Sliding windows of 512 tokens beside full attention ──


@pytest.fixture(scope="module")
def windows(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(engines, "windows", tmp_path_factory.mktemp("windows"))


@pytest.fixture(scope="module")
def right(engines: Engines, windows: Path) -> Iterator[Reference]:
    with Engine(engines, windows, **SETTINGS) as engine:
        yield Reference(engine, TEXT)


@pytest.fixture(scope="module")
def prompts(engines: Engines, windows: Path, sidecar: Sidecar, right: Reference) -> list[Prompt]:
    """Prompts that an engine has stored: of both kinds of layers all chunks."""
    prompts = [right.prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    with Engine(engines, windows, **SETTINGS, **connected_to(sidecar.target)) as engine:
        emptied(engine)
        with storing(sidecar, 2 * CHUNKS):
            answers = [engine.one(prompt) for prompt in prompts]
        assert [answer.cached for answer in answers] == [0] * 3
        right.check(prompts, answers)
    return prompts


@pytest.fixture(scope="module", params=["async", "sync"])
def other(
    request: pytest.FixtureRequest,
    engines: Engines,
    windows: Path,
    sidecar: Sidecar,
    prompts: list[Prompt],
) -> Iterator[Engine]:
    """Another engine; whatever is set, the loads of several groups are in the background."""
    settings = connected_to(sidecar.target, load=request.param)
    with Engine(engines, windows, **SETTINGS, **settings) as engine:
        yield engine


def test_windows_are_reused(other: Engine, right: Reference, prompts: list[Prompt]) -> None:
    emptied(other)
    answers = [other.one(prompt) for prompt in prompts]
    assert [answer.cached for answer in answers] == [512, 1280, 2816]
    right.check(prompts, answers)
    assert other.metrics()["vllm:kvtier_failed_loads"] == 0
    emptied(other)
    right.check(prompts, other.generate(prompts))


def test_windows_beside_what_the_engine_has(
    other: Engine, right: Reference, prompts: list[Prompt]
) -> None:
    emptied(other)
    asked = [Prompt(prompts[2].tokens[:length]) for length in (700, 1024, 1700, 3000)]
    answers = [other.one(prompt) for prompt in asked]
    # Of a whole prompt all but the last token: that one looks one further back than the next.
    assert [answer.cached for answer in answers] == [512, 1023, 1536, 2816]
    right.check(asked, answers)


@pytest.mark.parametrize("part", [0, 1, None])
@pytest.mark.parametrize("keep", [0, 1])
def test_windows_that_are_lost_are_computed(
    other: Engine, right: Reference, prompts: list[Prompt], keep: int, part: int | None
) -> None:
    before = emptied(other).metrics()
    with other.wrong("lose", keep=keep, part=part):
        answers = other.generate(prompts)
    right.check(prompts, answers)
    assert (other.metrics() - before)["vllm:kvtier_failed_loads"] > 0
    right.check(prompts, [other.one(prompt) for prompt in prompts])


def test_windows_in_a_cache_that_is_too_small(
    engines: Engines, windows: Path, sidecar: Sidecar, right: Reference, prompts: list[Prompt]
) -> None:
    """Blocks are used again at once, while they are being offloaded."""
    asked = [*prompts, *(right.prompt(10 + seed, 1500) for seed in range(3))]
    settings = {**SETTINGS, **connected_to(sidecar.target)}
    with Engine(engines, windows, **{**settings, "num_gpu_blocks_override": 180}) as engine:
        emptied(engine)
        right.check(asked, engine.generate(asked, max_tokens=30))
    sidecar.until_idle()
    with Engine(engines, windows, **settings) as engine:
        emptied(engine)
        right.check(asked, engine.generate(asked, max_tokens=30))


# ── Others ──


def test_a_state_space_model_is_refused(engines: Engines, tmp_path: Path, sidecar: Sidecar) -> None:
    folder = saved(engines, "state space", tmp_path)
    with pytest.raises(EngineFailed, match=r"layer \S+ is MambaSpec; .* without it"):
        Engine(engines, folder, **SETTINGS, **connected_to(sidecar.target))


def test_a_latent_cache_is_reused(engines: Engines, tmp_path: Path, sidecar: Sidecar) -> None:
    folder = saved(engines, "latent", tmp_path)
    with Engine(engines, folder, **SETTINGS) as alone:
        right = Reference(alone, TEXT)
        prompts = [right.prompt(0, 700), right.prompt(1, 1024)]
        settings = {**SETTINGS, **connected_to(sidecar.target)}
        with Engine(engines, folder, **settings) as engine, storing(sidecar, 6):
            cold = emptied(engine).generate(prompts)
        with Engine(engines, folder, **settings) as engine:
            warm = emptied(engine).generate(prompts)
            emptied(engine)
            with engine.wrong("lose", keep=1):
                lost = engine.generate(prompts)
        assert [answer.cached for answer in cold + warm] == [0, 0, 512, 1023]
        for answers in (cold, warm, lost):
            right.check(prompts, answers)
