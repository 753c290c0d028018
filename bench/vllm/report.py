"""What the run found: its JSON document, and what is wrong with it."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import takewhile
from operator import eq
from statistics import median
from typing import Any

from kvtier.bench.demo.model import NAME, PACKAGE
from kvtier.bench.demo.report import machine
from kvtier.bench.vllm.ask import Answer
from kvtier.bench.vllm.measure import Answers, Phase, turn_name
from kvtier.bench.vllm.phases import Played
from kvtier.bench.vllm.server import CHUNK_TOKENS, connector
from kvtier.bench.vllm.workload import EXACT_TOKENS, Workload

Record = dict[str, Any]
ByLength = dict[str, float]

FROM_DISK = ("disk", "disk_cold")
RELOADED = ("ram", *FROM_DISK)
WITH_KVTIER = ("cold", *RELOADED)
# The fastest of these: what else the machine does must not make the speed-up look larger.
COMPUTED = ("recompute", "cold")
RATIOS = (
    ("recompute", "ram"),
    ("disk", "ram"),
    ("disk_cold", "ram"),
    ("ram", "engine_hit"),
)
_MEANING = {
    "identical": "every greedy answer with kvtier is that of vLLM alone, token for token",
    "identical_engine_hit": "the same of vLLM alone, asked again, when its own cache holds the "
    "prompt",
    "ttft_ms": "request sent to first token streamed, by prompt length: of several prompts the "
    "fastest of those that were computed and the median of the others; before disk the sidecar was "
    "restarted, before disk_cold its files were dropped from the page cache as well",
    "ratios": "of those times; a reload leaves one token to compute, a hit in vLLM's own cache up "
    "to one of its blocks",
    "reused_tokens": "prompt tokens not computed, as vLLM reports them, the least of those prompts",
    "other_work": "share of the machine that other processes took, the sidecar among them; with "
    "much of it the times, and what they are to each other, mean little",
    "plain_read_ms": "reading a plain file as large as the longest prompt's chunks, written when "
    "they were, once the engine was up: what the medium alone costs",
    "conversations": "the history is asked turn by turn; what vLLM still holds of it, it holds in "
    "every column",
}


def summarise(
    played: Played, workload: Workload, engine_versions: Mapping[str, str], elapsed_s: float
) -> Record:
    """The result as a JSON document; `problems` is empty when all is as it should be."""
    ways = _ways(played)
    ttft = {
        name: _by_length(answers, lambda each: each.ttft_ms, min if name in COMPUTED else median)
        for name, answers in ways.items()
    }
    reference = played.phases["without"]
    return {
        "identical": not _differing(played),
        "identical_engine_hit": all(
            answer.token_ids == reference.answers[name].token_ids
            for name, answer in reference.again.items()
        ),
        "ttft_ms": {name: _rounded(values) for name, values in ttft.items()},
        "ratios": {
            f"{above}_over_{below}": _ratio(ttft[above], ttft[below]) for above, below in RATIOS
        },
        "reused_tokens": {
            name: _by_length(answers, lambda each: each.cached_tokens, min)
            for name, answers in ways.items()
        },
        "conversations": _conversations(played, workload),
        "problems": problems(played),
        "meaning": _MEANING,
        "phases": {name: _of_phase(phase) for name, phase in played.phases.items()},
        "plain_read_ms": _rounded(played.plain_read_ms),
        "left_in_page_cache_bytes": played.left_in_page_cache,
        "prompts": _prompts(ways),
        "connector": connector("unix://…"),
        "model": {"name": NAME, "package": PACKAGE, "dtype": "float32"},
        "versions": dict(engine_versions),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "elapsed_s": round(elapsed_s, 1),
    }


def problems(played: Played) -> list[str]:
    """What is not as it should be, a line each."""
    found = _differing(played)
    for name in RELOADED:
        for prompt, answer in played.phases[name].answers.items():
            due = due_tokens(answer.prompt_tokens)
            if answer.cached_tokens < due:
                found.append(f"{name}, {prompt}: reused {answer.cached_tokens} tokens, not {due}")
    for prompt, answer in played.phases["cold"].prompts.items():
        if answer.cached_tokens:
            found.append(f"cold, {prompt}: reused {answer.cached_tokens} tokens of nothing")
    for name in WITH_KVTIER:
        phase = played.phases[name]
        if phase.load_failures:
            found.append(f"{name}: vLLM says {phase.load_failures} times that a load failed")
        found += _misplaced(name, phase)
    return found


def due_tokens(prompt_tokens: int) -> int:
    """What is to be reused of a prompt that was asked before: every full chunk, but for the
    prompt's last token, which is always computed."""
    return min(prompt_tokens // CHUNK_TOKENS * CHUNK_TOKENS, prompt_tokens - 1)


def _ways(played: Played) -> dict[str, Answers]:
    """The answers to the prompts of exact length, by where their prefix came from."""
    reference = played.phases["without"]
    return {
        "recompute": reference.prompts,
        "engine_hit": reference.again,
        **{name: played.phases[name].prompts for name in WITH_KVTIER},
    }


def _differing(played: Played) -> list[str]:
    """The answers that are not those of vLLM alone, a line each."""
    reference = played.phases["without"].answers
    found = []
    for name in WITH_KVTIER:
        for asked, answer in played.phases[name].answers.items():
            ours, theirs = answer.token_ids, reference[asked].token_ids
            if ours != theirs:
                same = sum(1 for _ in takewhile(bool, map(eq, ours, theirs)))
                found.append(f"{name}, {asked}: answers otherwise from token {same + 1} on")
    return found


def _misplaced(name: str, phase: Phase) -> list[str]:
    """Chunks that came from elsewhere than the phase is about: every chunk of the prompts of exact
    length must have come from disk after the sidecar's restarts, and none in `ram`."""
    promoted = phase.service["promoted_chunks"]
    due = sum(each.prompt_tokens // CHUNK_TOKENS for each in phase.prompts.values())
    if name in FROM_DISK and promoted < due:
        return [f"{name}: {promoted} chunks came from disk, not {due}"]
    if name == "ram" and promoted:
        return [f"ram: {promoted} chunks came from disk"]
    return []


def _by_length(
    answers: Answers, of: Callable[[Answer], float], choose: Callable[[list[float]], float]
) -> ByLength:
    found: dict[str, list[float]] = {str(length): [] for length in EXACT_TOKENS}
    for answer in answers.values():
        found[str(answer.prompt_tokens)].append(of(answer))
    return {length: choose(values) for length, values in found.items()}


def _ratio(above: ByLength, below: ByLength) -> ByLength:
    return {length: round(above[length] / below[length], 2) for length in above}


def _conversations(played: Played, workload: Workload) -> list[Record]:
    rows = []
    for conversation in workload.conversations:
        for turn in range(1, len(conversation.turns) + 1):
            each = {
                name: phase.turns[turn_name(conversation, turn)]
                for name, phase in played.phases.items()
            }
            rows.append(
                {
                    "conversation": conversation.name,
                    "turn": turn,
                    "prompt_tokens": each["without"].prompt_tokens,
                    "ttft_ms": {name: round(answer.ttft_ms, 1) for name, answer in each.items()},
                    "reused_tokens": {name: answer.cached_tokens for name, answer in each.items()},
                    "answer": each["without"].text,
                }
            )
    return rows


def _prompts(ways: Mapping[str, Answers]) -> list[Record]:
    return [
        {
            "way": way,
            "prompt": name,
            "ttft_ms": round(answer.ttft_ms, 1),
            "reused_tokens": answer.cached_tokens,
        }
        for way, answers in ways.items()
        for name, answer in answers.items()
    ]


def _of_phase(phase: Phase) -> Record:
    return {
        "engine_start_s": round(phase.start_s, 1),
        "tokens_from_kvtier": phase.from_kvtier,
        "load_failures": phase.load_failures,
        "other_work": round(phase.others, 2),
        "sidecar": {name: count for name, count in phase.service.items() if count},
    }


def _rounded(values: ByLength) -> ByLength:
    return {length: round(value, 1) for length, value in values.items()}
