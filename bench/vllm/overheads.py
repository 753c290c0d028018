"""What kvtier costs and saves inside one vLLM process, against that process without it.

    python -m kvtier.bench.vllm.overheads --model DIR --out FILE

Runs in the engine's environment, with a sidecar of its own, and writes one JSON document.
Everything is interleaved in one process, and each figure is a ratio of medians:

    hit     time to first token of a prefix in RAM, to a bare copy of the same blocks within this
            process, and to vLLM's own prefix hit
    miss    time to first token of a prompt that nobody has seen, to the same without kvtier
    decode  tokens per second with offloading, to the same without
    step    what the scheduler's side adds to a step in which it has nothing to do, in microseconds
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtier.bench.sidecar import sidecar

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
}
_HIT_TOKENS = (1024, 4096)
_MISS_TOKENS = 1024
_DECODE_BATCH = 4
_DECODE_TOKENS = 512


class Engine:
    """vLLM in this process, with a connector that can be switched."""

    def __init__(self, model: Path, target: str) -> None:
        self._vllm: Any = importlib.import_module("vllm")  # after the environment is set
        self._llm = self._vllm.LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_num_batched_tokens=2048,
            max_model_len=8192,
            kv_transfer_config={
                "kv_connector": "ComparedConnector",
                "kv_connector_module_path": "kvtier.bench.vllm.compared",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"target": target},
            },
        )
        self.scheduler: Any = self._llm.llm_engine.engine_core.engine_core.scheduler
        self._seed = time.time_ns() % 1_000_000

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> tuple[float, list[int]]:
        """Seconds until all prompts have their output, and how many tokens each reused."""
        sampling = self._vllm.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        started_s = time.perf_counter()
        outputs = self._llm.generate(given, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started_s
        return seconds, [output.num_cached_tokens for output in outputs]

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def new_prompt(self, tokens: int) -> list[int]:
        """A prompt that no run has seen before."""
        self._seed += 1
        state, prompt = self._seed, []
        for _ in range(tokens):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            prompt.append(1000 + (state >> 33) % 40_000)
        return prompt


def hits(engine: Engine, tokens: int, rounds: int) -> dict[str, float]:
    """Time to first token of a prompt that is held, by who holds it."""
    from kvtier.bench.vllm.compared import Mode, switch  # noqa: PLC0415

    prompt = engine.new_prompt(tokens)
    switch.mode = Mode.KVTIER
    engine.generate([prompt], 4)
    switch.mode = Mode.NOTHING
    allocate = engine.scheduler.kv_cache_manager.allocate_slots
    engine.scheduler.kv_cache_manager.allocate_slots = _spy(engine.scheduler, allocate)
    engine.generate([prompt], 1)
    switch.remember()
    engine.scheduler.kv_cache_manager.allocate_slots = allocate
    taken: dict[Mode, list[float]] = {mode: [] for mode in Mode}
    for _ in range(rounds):
        for mode in (Mode.KVTIER, Mode.LOCAL, Mode.NOTHING):
            switch.mode = mode
            if mode is not Mode.NOTHING:  # then it is the engine's own hit
                engine.forget()
            seconds, cached = engine.generate([prompt], 1)
            if mode is not Mode.NOTHING and cached != [tokens - 1]:
                raise RuntimeError(f"{mode.value}: {cached} of {tokens} tokens were reused")
            taken[mode].append(seconds)
    kvtier, local, own = (
        statistics.median(taken[mode]) for mode in (Mode.KVTIER, Mode.LOCAL, Mode.NOTHING)
    )
    return {
        "kvtier_ms": 1000 * kvtier,
        "local_copy_ms": 1000 * local,
        "engine_hit_ms": 1000 * own,
        "to_best": kvtier / min(local, own),
    }


def _spy(scheduler: Any, allocate: Any) -> Any:
    """Let the switch see which blocks a request is given."""
    from kvtier.bench.vllm.compared import switch  # noqa: PLC0415

    def allocate_and_tell(request: Any, *arguments: Any, **options: Any) -> Any:
        given = allocate(request, *arguments, **options)
        switch.given = list(scheduler.kv_cache_manager.get_block_ids(request.request_id)[0])
        return given

    return allocate_and_tell


def misses(engine: Engine, rounds: int) -> dict[str, float]:
    """Time to first token of prompts that nobody has seen, with kvtier and without."""
    return _compared(
        rounds, lambda: engine.generate([engine.new_prompt(_MISS_TOKENS)], 1)[0], "_ms", 1000
    )


def decodes(engine: Engine, rounds: int) -> dict[str, float]:
    """Seconds of a batch that mostly decodes, with the output's KV offloaded and without."""

    def decode() -> float:
        prompts = [engine.new_prompt(64) for _ in range(_DECODE_BATCH)]
        return engine.generate(prompts, _DECODE_TOKENS)[0]

    figures = _compared(rounds, decode, "_s", 1)
    figures["throughput"] = 1 / figures.pop("ratio")
    return figures


def _compared(rounds: int, run: Any, unit: str, scale: float) -> dict[str, float]:
    from kvtier.bench.vllm.compared import Mode, switch  # noqa: PLC0415

    taken: dict[Mode, list[float]] = {Mode.KVTIER: [], Mode.NOTHING: []}
    for number in range(2 * rounds):
        first = (Mode.KVTIER, Mode.NOTHING)[number % 2]
        switch.mode = first
        taken[first].append(run())
    kvtier, alone = (statistics.median(taken[mode]) for mode in (Mode.KVTIER, Mode.NOTHING))
    return {
        f"kvtier{unit}": scale * kvtier,
        f"alone{unit}": scale * alone,
        "ratio": kvtier / alone,
    }


def steps(engine: Engine, requests: int) -> dict[str, float]:
    """Microseconds that the scheduler's side takes in steps that load and offload nothing."""
    from kvtier.bench.vllm.compared import Mode, switch  # noqa: PLC0415

    switch.mode = Mode.KVTIER
    connector = engine.scheduler.connector
    build, taken = connector.build_connector_meta, []

    def timed(output: Any) -> Any:
        started_s = time.perf_counter()
        meta = build(output)
        seconds = time.perf_counter() - started_s
        if not (meta.orders.loads or meta.orders.offloads or output.scheduled_new_reqs):
            taken.append(seconds)
        return meta

    connector.build_connector_meta = timed
    try:
        engine.generate([engine.new_prompt(32) for _ in range(requests)], 64)
    finally:
        connector.build_connector_meta = build
    return {"requests": requests, "added_us": 1e6 * statistics.median(taken), "steps": len(taken)}


def main() -> int:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)  # the engine prints to stdout
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    if not options.model.is_dir():
        parser.error(
            f"--model: {options.model} is no folder; `make vllm` makes one below out/models"
        )
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="kvtier-") as folder:
        settings = {"cpu.capacity": "2GiB", "disk.directory": f"{folder}/disk"}
        with sidecar(Path(folder), settings) as service:
            figures = _measure(Engine(options.model, service.target), options.rounds)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure(engine: Engine, rounds: int) -> dict[str, Any]:
    engine.generate([engine.new_prompt(40)], 4)
    figures: dict[str, Any] = {}
    for tokens in _HIT_TOKENS:
        _say(f"hits of {tokens} tokens")
        figures[f"hit_{tokens}"] = hits(engine, tokens, rounds)
    _say("misses")
    figures["miss"] = misses(engine, rounds)
    _say("decoding")
    figures["decode"] = decodes(engine, max(2, rounds // 2))
    _say("steps")
    figures["steps"] = [steps(engine, requests) for requests in (1, 32)]
    return figures


def _say(what: str) -> None:
    sys.stderr.write(f"overheads: {what}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
