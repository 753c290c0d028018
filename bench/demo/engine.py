"""One engine process of the demo: answers questions about the document, with kvtier or without.

    python -m kvtier.bench.demo.engine --name A --question 0 --model DIR --out DIR --target ADDRESS

prints one line of JSON, an `Answer` for each question. Without `--target` it is transformers alone:
the reference. Progress goes to stderr.

TTFT is the time from the prompt's ids in hand to the first token's id. Loading the model, opening
the session, reserving the cache's memory and a warm-up on another prompt come before it.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Before the imports: nothing is fetched here; and waiting threads sleep instead of spinning, which
# on a shared machine made a short forward seven times slower, with kvtier and without.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kvtier
from kvtier.connectors.transformers import Prefilled, PrefixCache, space_of

QUESTIONS = (
    "Why do caches work?",
    "What is the difference between latency and bandwidth?",
    "What are the two kinds of locality?",
    "What is the weakness of LRU?",
)
CHUNK_TOKENS = 256
ANSWER_TOKENS = 32
THREADS = 2
# The engine's patience with the sidecar for one prompt. Recomputing it takes longer.
DEADLINE_S = 5.0
_CONNECT_S = 5.0
_WARM_UP_TOKENS = 600


@dataclass
class Answer:
    """What one question gave. `logits` names a file: float32 [ANSWER_TOKENS, vocabulary], .npy."""

    engine: str
    question: int
    tokens: int
    answer: list[int]
    text: str
    ttft_ms: float
    reused_tokens: int
    loaded_bytes: int
    logits: str
    kv_sha256: str  # of the KV of the prompt's full chunks
    timings_ms: dict[str, float] = field(default_factory=dict)
    offloaded_chunks: int = 0
    offloaded_bytes: int = 0


class Engine:
    """The model and its tokenizer, loaded and warm."""

    def __init__(self, model_path: Path) -> None:
        torch.set_num_threads(THREADS)
        quiet: Any = transformers.logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        self.model_path = model_path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)

    def prompt(self, question: int) -> torch.Tensor:
        """Token ids [1, tokens] of the document and a question, in the model's chat format."""
        document = Path(__file__).with_name("document.txt").read_text(encoding="utf-8")
        content = f"{document}\n\nQuestion: {QUESTIONS[question]}"
        encoded = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids: torch.Tensor = encoded["input_ids"]
        return ids

    def forward(self, input_ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits [1, vocabulary] after `input_ids` on top of a cache, which grows by them."""
        with torch.no_grad():
            output = self.model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def finish(
        self, input_ids: torch.Tensor, logits: torch.Tensor, cache: DynamicCache
    ) -> tuple[list[int], "np.ndarray[Any, Any]"]:
        """The greedy answer after a prefill, by transformers' own generate, and all its logits."""
        so_far = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=-1)
        output = self.model.generate(
            so_far,
            attention_mask=torch.ones_like(so_far),
            past_key_values=cache,
            min_new_tokens=ANSWER_TOKENS - 1,
            max_new_tokens=ANSWER_TOKENS - 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answer = output.sequences[0, input_ids.shape[1] :].tolist()
        return answer, torch.cat([logits, *output.logits]).numpy()

    def warm_up_prompt(self) -> torch.Tensor:
        """A prompt that shares nothing with the document."""
        return torch.arange(1000, 1000 + _WARM_UP_TOKENS).unsqueeze(0)


class Reference:
    """transformers alone: every prompt is computed from its first token."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prefill(engine.warm_up_prompt())

    def prefill(self, input_ids: torch.Tensor) -> Prefilled:
        """A prefill of the whole prompt into a cache of transformers' own."""
        started = time.perf_counter()
        cache = DynamicCache(config=self.engine.model.config)
        logits = self.engine.forward(input_ids, cache)
        timings = {"compute": time.perf_counter() - started}
        return Prefilled(cache, input_ids.shape[1], 0, 0, timings, logits)


class WithKvtier:
    """The same engine with the connector; whether a sidecar is there makes no difference here."""

    def __init__(self, engine: Engine, target: str) -> None:
        space = space_of(engine.model, model_path=engine.model_path, chunk_tokens=CHUNK_TOKENS)
        self.client = kvtier.connect(target, space, deadline_s=DEADLINE_S, name="demo")
        self.reserved = len(engine.prompt(0)[0]) + 256
        self.kv = PrefixCache(engine.model, self.client, reserve_tokens=self.reserved)

    def ready(self) -> bool:
        """Wait for the sidecar; False when there is none, which is no reason to stop."""
        return self.client.wait_ready(_CONNECT_S)

    def warm_up(self, engine: Engine) -> None:
        """A prompt that kvtier does not hold, and the beginning of another on top of it."""
        warm = self.kv.prefill(engine.warm_up_prompt(), max_new_tokens=128)
        engine.forward(engine.warm_up_prompt()[:, :70], warm.cache)
        self.kv.recycle(warm)

    def prefill(self, input_ids: torch.Tensor) -> Prefilled:
        """A prefill from the longest prefix that the sidecar holds."""
        return self.kv.prefill(input_ids, max_new_tokens=self.reserved - input_ids.shape[1])


def answer(
    engine: Engine, source: Reference | WithKvtier, name: str, question: int, out: Path
) -> tuple[Answer, Prefilled]:
    """Answer one question and write its logits below `out`."""
    input_ids = engine.prompt(question)
    started = time.perf_counter()
    prefilled = source.prefill(input_ids)
    int(prefilled.logits.argmax())  # the first token's id is in hand
    ttft_ms = 1000 * (time.perf_counter() - started)
    full = input_ids.shape[1] // CHUNK_TOKENS * CHUNK_TOKENS
    digest = kv_digest(prefilled.cache, full)
    tokens, logits = engine.finish(input_ids, prefilled.logits, prefilled.cache)
    result = Answer(
        engine=name,
        question=question,
        tokens=prefilled.tokens,
        answer=tokens,
        text=engine.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        ttft_ms=ttft_ms,
        reused_tokens=prefilled.reused_tokens,
        loaded_bytes=prefilled.loaded_bytes,
        logits=save(logits, out / f"logits-{name}-{question}.npy"),
        kv_sha256=digest,
        timings_ms={step: 1000 * seconds for step, seconds in prefilled.timings.items()},
    )
    say(f"  {name}: first token of answer {question + 1} after {ttft_ms:,.0f} ms")
    return result, prefilled


def answer_on_live_cache(
    engine: Engine, cache: DynamicCache, question: int, keep: int, out: Path
) -> Path:
    """Answer a question on top of the first `keep` tokens of a live cache, which is cut to them.

    The logits are what a reload of the same KV must give to the last bit.
    """
    cache.crop(keep - cache.get_seq_length())
    input_ids = engine.prompt(question)
    logits = engine.forward(input_ids[:, keep:], cache)
    _, every = engine.finish(input_ids, logits, cache)
    return Path(save(every, out / f"logits-live-{question}.npy"))


def kv_digest(cache: DynamicCache, tokens: int) -> str:
    """SHA-256 of the KV of the first tokens, bit for bit."""
    hasher = hashlib.sha256()
    layers: list[Any] = cache.layers
    for layer in layers:
        for plane in (layer.keys, layer.values):
            hasher.update(plane[:, :, :tokens].contiguous().numpy())
    return hasher.hexdigest()


def save(logits: "np.ndarray[Any, Any]", file: Path) -> str:
    """Write logits; returns the file's name."""
    np.save(file, logits.astype(np.float32, copy=False), allow_pickle=False)
    return str(file)


def say(line: str) -> None:
    """A line of progress."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one engine process."""
    parser = argparse.ArgumentParser(prog="python -m kvtier.bench.demo.engine")
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--question", type=int, action="append", required=True)
    parser.add_argument("--target", help="the sidecar's address; without it, transformers alone")
    parser.add_argument("--offload", action="store_true", help="hand the prompt's KV to kvtier")
    parser.add_argument(
        "--live",
        type=int,
        action="append",
        default=[],
        help="a question to answer afterwards on top of the live cache, for comparison",
    )
    options = parser.parse_args(arguments)
    engine = Engine(options.model)
    run = run_with_kvtier if options.target else run_reference
    answers = run(engine, options)
    sys.stdout.write(json.dumps([asdict(each) for each in answers]) + "\n")
    return 0


def run_reference(engine: Engine, options: argparse.Namespace) -> list[Answer]:
    """Answer the questions by transformers alone."""
    reference = Reference(engine)
    return [
        answer(engine, reference, options.name, question, options.out)[0]
        for question in options.question
    ]


def run_with_kvtier(engine: Engine, options: argparse.Namespace) -> list[Answer]:
    """Answer the questions with kvtier, offload if asked to, and answer the `--live` ones."""
    source = WithKvtier(engine, options.target)
    if not source.ready():
        say(f"  {options.name}: no sidecar at {options.target}; going on without")
    source.warm_up(engine)
    answers = []
    for question in options.question:
        result, prefilled = answer(engine, source, options.name, question, options.out)
        if options.offload:
            offloaded = source.kv.offload(engine.prompt(question), prefilled.cache)
            result.offloaded_chunks = offloaded.chunks
            result.offloaded_bytes = offloaded.nbytes
        keep = result.tokens // CHUNK_TOKENS * CHUNK_TOKENS
        for other in options.live:
            answer_on_live_cache(engine, prefilled.cache, other, keep, options.out)
        source.kv.recycle(prefilled)
        answers.append(result)
    source.client.close()
    return answers


if __name__ == "__main__":
    sys.exit(main())
