"""An engine of two ranks: each worker is a process of its own, with its own share of the KV."""

import random
from pathlib import Path

import pytest

from kvtier.client import connect
from kvtier.spaces import Layout, Space
from tests.engines.tiny_models import VOCABULARY
from tests.engines.vllm_process import Child, Engine, Engines, Prompt, connected_to, storing
from tests.sidecar import HANG_S, Sidecar

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TWO_RANKS = {
    "distributed_executor_backend": "mp",
    "environment": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    "max_model_len": 4096,
    "skip_tokenizer_init": True,
    "tensor_parallel_size": 2,
}
TEXT = random.Random(2).choices(range(3, VOCABULARY), k=2000)
PROMPTS = [Prompt(tuple(TEXT[:700])), Prompt(tuple(TEXT[500:2000]))]
CHUNKS = 700 // 256 + 1500 // 256


def test_a_hit_is_one_of_all_ranks(engines: Engines, tmp_path: Path, sidecar: Sidecar) -> None:
    with Child(engines) as child:
        child.ask("save_model", kind="plain", folder=str(tmp_path))
    settings = {**TWO_RANKS, **connected_to(sidecar.target)}
    with Engine(engines, tmp_path, **settings) as engine:
        with storing(sidecar, 2 * CHUNKS):
            cold = [engine.one(prompt) for prompt in PROMPTS]
        spaces = [space_of(each) for each in engine.ask("spaces")]
    assert [answer.cached for answer in cold] == [0, 0]
    assert sorted(space.layout.rank for space in spaces) == [0, 1]

    with connect(sidecar.target, spaces[1]) as client:  # one rank loses the second prompt's end
        assert client.wait_ready(HANG_S)
        lost = client.prefix(PROMPTS[1].tokens)[3:]
        assert client.evict(lost) == len(lost)
    with Engine(engines, tmp_path, **settings) as engine:
        warm = [engine.one(prompt) for prompt in PROMPTS]
    assert [answer.cached for answer in warm] == [512, 3 * 256]
    assert all(a.distance(b) < 1e-3 for a, b in zip(cold, warm, strict=True))


def space_of(document: dict[str, object]) -> Space:
    layout = Layout(**document.pop("layout"))  # type: ignore[arg-type]
    return Space(layout=layout, **document)  # type: ignore[arg-type]
