"""vLLM with a KV cache that is too small for its requests: they are preempted, blocks are used
again at once, and answers and stored chunks stay right."""

from pathlib import Path

import pytest

from tests.engines.vllm_process import Engine, Engines, Reference, connected_to, emptied
from tests.sidecar import Sidecar

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Four prompts fill 16 blocks, and each needs one more once it has answered a little.
LENGTH, TOKENS = 500, 24
TINY = {"max_model_len": 2048, "num_gpu_blocks_override": 18}


@pytest.mark.parametrize("load", ["sync", "async"])
def test_preempted_requests(
    engines: Engines, model: Path, first: Engine, sidecar: Sidecar, reference: Reference, load: str
) -> None:
    prompts = [reference.prompt(seed, LENGTH) for seed in range(30, 34)]
    with Engine(engines, model, **TINY, **connected_to(sidecar.target, load=load)) as engine:
        answers = emptied(engine).generate(prompts, TOKENS)
        assert engine.metrics()["vllm:num_preemptions"] > 0
        reference.check(prompts, answers)
        answers = emptied(engine).generate(prompts, TOKENS)
        reference.check(prompts, answers)
    sidecar.until_idle()
    elsewhere = first.generate(prompts, TOKENS)
    assert {answer.cached for answer in elsewhere} <= {0, 256}  # some may have been given up
    assert any(answer.cached for answer in elsewhere)
    reference.check(prompts, elsewhere)
