"""One engine process: answers every prompt, alone or from what a sidecar holds.

    python -m kvtier.bench.ttft.engine --shape tiny --device host --phase cold --out DIR …

prints one line of JSON: `facts` of what it ran on, and an `Answer` for each prompt. Progress goes
to stderr. The phase "alone" is transformers without kvtier, "cold" computes and stores, all others
load. Making the model, connecting and a warm-up on other prompts come before what is timed.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

# Before the imports: nothing is fetched here; and waiting threads sleep instead of spinning, which
# on a shared machine makes short forwards several times slower.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

import kvtier
from kvtier.bench.demo.report import machine
from kvtier.bench.ttft.model import Model, torch_device
from kvtier.bench.ttft.reload import First, Reloads
from kvtier.bench.ttft.shapes import PHASES, SHAPES, Prompt, Shape

_PACKAGES = ("torch", "transformers", "numpy", "cupy-cuda12x", "cupy-cuda13x")


@dataclass(slots=True)
class Answer:
    """What one prompt gave. `logits` names a file: float32 [vocabulary] of the first token, .npy.

    `at_once` is, of the phase "alone", the same prompt computed in one pass.
    """

    length: int
    number: int
    ttft_ms: float
    kvtier_ms: float
    reused_tokens: int
    answer: list[int]
    logits: str
    kv: str  # digest of the KV of the prompt's full chunks
    loaded_bytes: int = 0
    stored_chunks: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    at_once: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What this process is to do."""

    shape: Shape
    device: str
    phase: str
    repeats: int
    out: Path


def alone(model: Model, run: Run) -> Iterator[Answer]:
    """transformers alone: each prompt in two passes, as a reload does its sums, and in one."""
    for prompt in run.shape.prompts(run.repeats):
        tokens = run.shape.token_ids(prompt)
        if prompt.number == 0:
            warm = run.shape.token_ids(prompt, run.phase)
            _computed(model, warm, at_once=True)
            _computed(model, warm)
        at_once = _answer(model, run, prompt, _computed(model, tokens, at_once=True), " at once")
        answer = _answer(model, run, prompt, _computed(model, tokens))
        answer.at_once = asdict(at_once)
        yield answer


def beside(model: Model, run: Run, target: str) -> Iterator[Answer]:
    """The same engine with a sidecar; whether that has anything makes no difference here."""
    with Reloads(model, run.device, target) as reloads:
        for prompt in run.shape.prompts(run.repeats):
            tokens = run.shape.token_ids(prompt)
            before = reloads.counters()
            if prompt.number == 0:
                warm = run.shape.token_ids(prompt, run.phase)
                _computed(model, warm)
                reloads.rehearse(warm)
                reloads.settle(before)
                before = reloads.counters()
            model.wipe()
            first = reloads.first_token(tokens)
            sources = reloads.settle(before)
            answer = _answer(model, run, prompt, first)
            answer.sources = sources
            chunks = first.reused_tokens // run.shape.chunk_tokens
            answer.loaded_bytes = chunks * run.shape.layout.nbytes
            if run.phase == "cold":
                answer.stored_chunks = reloads.store(tokens)
            yield answer


def _computed(model: Model, tokens: Sequence[int], *, at_once: bool = False) -> First:
    model.wipe()
    started_s = time.perf_counter()
    cache, logits = (model.compute_at_once if at_once else model.compute)(tokens)
    token = int(logits.argmax())
    return First(token, logits, cache, time.perf_counter() - started_s, 0.0, 0)


def _answer(model: Model, run: Run, prompt: Prompt, first: First, way: str = "") -> Answer:
    """Finish an answer, and note it."""
    file = run.out / f"{run.phase}-{prompt.length}-{prompt.number}{way.replace(' ', '-')}.npy"
    np.save(file, first.logits.float().cpu().numpy(), allow_pickle=False)
    answer = Answer(
        length=prompt.length,
        number=prompt.number,
        ttft_ms=1000 * first.ttft_s,
        kvtier_ms=1000 * first.kvtier_s,
        reused_tokens=first.reused_tokens,
        answer=model.answer(first.token, first.cache),
        logits=str(file),
        kv=model.digest(prompt.length),
    )
    say(f"  {run.phase}{way}, {prompt.length:,} tokens: {answer.ttft_ms:,.1f} ms")
    return answer


def facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, in words that identify nobody."""
    versions = {"kvtier": kvtier.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "device": "CPU, simulated device",
        "cpu": machine()["cpu"],
        "versions": versions,
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["device_bytes"] = torch.cuda.get_device_properties(device).total_memory
        versions["cuda"] = str(torch.version.cuda)
        # CUDA knows only the version of its own interface; the module's is the driver's.
        driver = Path("/sys/module/nvidia/version")
        found["driver"] = driver.read_text().strip() if driver.exists() else "unknown"
    return found


def say(line: str) -> None:
    """A line of progress."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one engine process."""
    parser = argparse.ArgumentParser(prog="python -m kvtier.bench.ttft.engine")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", required=True)
    options = parser.parse_args(arguments)
    run = Run(SHAPES[options.shape], options.device, options.phase, options.repeats, options.out)
    device = torch_device(run.device)
    started_s = time.monotonic()
    model = Model(run.shape, device)
    say(f"  {run.phase}: the model took {time.monotonic() - started_s:.1f} s")
    answers = alone(model, run) if run.phase == "alone" else beside(model, run, options.target)
    document = {"facts": facts(device), "answers": [asdict(each) for each in answers]}
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
