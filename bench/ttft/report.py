"""What was found: checks, figures, and a table for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from kvtier.bench.report import Report, Target
from kvtier.bench.ttft.phases import Played, Record
from kvtier.bench.ttft.shapes import LLAMA_8B, Shape

# The tier that each phase is about, by the counter that proves it.
TIERS = {"vram": "load_vram_hits", "ram": "load_ram_hits", "disk": "load_disk_hits"}
# At the longest prompt, of the 8B shape on one H100.
TARGETS = {"speedup_vram": Target(25), "speedup_ram": Target(25)}
_TITLES = {
    "recompute": "recomputed",
    "cold": "recomputed and stored",
    "disk": "from disk",
    "ram": "from RAM",
    "vram": "from VRAM",
}
_COLUMNS = ("prompt", "first token", "TTFT", "in kvtier", "speed-up", "KV loaded", "answers")
_MEANING = {
    "ttft_ms": "prompt's ids in hand to first token's id in hand, the median of the repeats",
    "recompute": "transformers alone; of one pass over the prompt and two (all but the last token, "
    "then that) the one whose median is less",
    "cold": "the process that stored the KV: a lookup that finds nothing, then two passes",
    "speedup": "ttft_ms of recompute over that of the phase, of the same length",
    "kvtier_ms": "the part of ttft_ms that the engine's thread spent in kvtier; the first token is "
    "computed while later layers are on their way",
    "identical": "the greedy answers are those of the phase cold, token for token",
    "kv_identical": "the KV has the bits that the phase cold computed",
    "max_logit_diff": "of the first token, to the phase cold",
    "noise.another_process": "the same sums in another process, without kvtier",
    "noise.one_pass": "the same prompt in one pass instead of two, in another process",
    "left_in_page_cache_bytes": "of the disk tier's files, before the phase disk",
}


def summarise(played: Played, shape: Shape, elapsed_s: float) -> Report:
    """The figures of a run. `problems` is empty when all is as it should be."""
    lengths = {str(length): _of_length(played, shape, length) for length in shape.lengths}
    longest = lengths[str(max(shape.lengths))]
    reloaded = [lengths[length][phase] for length in lengths for phase in TIERS]
    found = problems(played, shape)
    return Report(
        scenario="ttft",
        figures={
            **{f"speedup_{phase}": longest[phase]["speedup"] for phase in TIERS},
            "identical": all(each["identical"] and each["kv_identical"] for each in reloaded),
            "max_logit_diff": max(each["max_logit_diff"] for each in reloaded),
            "problems": found,
            "lengths": lengths,
            "noise": _noise(played),
            "left_in_page_cache_bytes": played.left_in_page_cache,
            "elapsed_s": round(elapsed_s, 1),
        },
        setup={
            "model": shape.title,
            "dtype": shape.dtype,
            "chunk_tokens": shape.chunk_tokens,
            "chunk_bytes": shape.layout.nbytes,
            "computed_tokens": 1,
            "repeats": len(played.answers["cold"]) // len(shape.lengths),
            **played.facts,
            "meaning": _MEANING,
        },
        targets=TARGETS if shape is LLAMA_8B else {},
    )


def problems(played: Played, shape: Shape) -> list[str]:
    """What is not as it should be, a line each."""
    found = []
    for cold in played.answers["cold"]:
        chunks = cold["length"] // shape.chunk_tokens
        if cold["reused_tokens"] or cold["stored_chunks"] != chunks:
            found.append(
                f"cold, {_name(cold)}: reused {cold['reused_tokens']} tokens of nothing and stored "
                f"{cold['stored_chunks']} of {chunks} chunks"
            )
        for phase, tier in TIERS.items():
            mine = _same_prompt(played.answers[phase], cold)
            faults = _faults(mine, cold, {tier: chunks})
            found += [f"{phase}, {_name(cold)}: {fault}" for fault in faults]
    return found


def table(report: Report) -> str:
    """The figures for people."""
    figures, setup = report.figures, report.setup
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for length, phases in figures["lengths"].items():
        for phase, title in _TITLES.items():
            rows.append((f"{int(length):,} + 1", title, *_cells(phases[phase])))
    lines = [
        f"{setup['device']}: {setup['model']}, {setup['dtype']}, "
        f"medians of {setup['repeats']} prompts",
        "",
        *_aligned(rows),
        "",
        f"reloaded: KV and answers {_same(figures['identical'])} what was computed, largest logit "
        f"difference {figures['max_logit_diff']:g}",
        _noise_line("recomputed in another process", figures["noise"]["another_process"]),
        _noise_line("recomputed in one pass, not two", figures["noise"]["one_pass"]),
    ]
    for name, target in report.targets.items():
        verdict = "met" if target.met(figures[name]) else "MISSED"
        lines.append(f"{name}: {figures[name]:.1f}, {verdict}: {target}")
    lines += [f"PROBLEM: {problem}" for problem in figures["problems"]]
    return "\n".join(lines) + "\n"


def _of_length(played: Played, shape: Shape, length: int) -> Record:
    """Every phase's figures for the prompts of one length."""
    answers = {
        phase: [each for each in every if each["length"] == length]
        for phase, every in played.answers.items()
    }
    alone, cold = answers["alone"], answers["cold"]
    ways = {
        "one_pass_ms": [each["at_once"]["ttft_ms"] for each in alone],
        "two_passes_ms": [each["ttft_ms"] for each in alone],
    }
    recompute_ms = min(median(each) for each in ways.values())
    of_phases = {
        phase: {
            **_figures(every, cold, recompute_ms),
            "sources": {
                tier: sum(each["sources"][tier] for each in every) for tier in TIERS.values()
            },
        }
        for phase, every in answers.items()
        if phase != "alone"
    }
    recompute = {
        "ttft_ms": recompute_ms,
        "speedup": 1.0,
        "kvtier_ms": 0.0,
        "bytes": 0,
        **_compared(alone, cold),
        **{f"every_{way}": each for way, each in ways.items()},
    }
    return {"recompute": recompute, **of_phases}


def _figures(mine: Sequence[Record], cold: Sequence[Record], recompute_ms: float) -> Record:
    ttft_ms = median(each["ttft_ms"] for each in mine)
    return {
        "ttft_ms": ttft_ms,
        "speedup": recompute_ms / ttft_ms,
        "kvtier_ms": median(each["kvtier_ms"] for each in mine),
        "bytes": mine[0]["loaded_bytes"],
        **_compared(mine, cold),
        "every_ttft_ms": [each["ttft_ms"] for each in mine],
    }


def _noise(played: Played) -> Record:
    """What differs between computations of the same: kvtier has no part in it."""
    alone, cold = played.answers["alone"], played.answers["cold"]
    at_once = [each["at_once"] for each in alone]
    return {"another_process": _compared(alone, cold), "one_pass": _compared(at_once, cold)}


def _compared(mine: Sequence[Record], cold: Sequence[Record]) -> Record:
    pairs = [(each, _same_prompt(cold, each)) for each in mine]
    return {
        "identical": all(one["answer"] == other["answer"] for one, other in pairs),
        "kv_identical": all(one["kv"] == other["kv"] for one, other in pairs),
        "max_logit_diff": max(_difference(one["logits"], other["logits"]) for one, other in pairs),
    }


def _faults(mine: Record, cold: Record, due: Mapping[str, int]) -> list[str]:
    found = []
    if mine["answer"] != cold["answer"]:
        found.append("answers otherwise than the process that computed it")
    if mine["kv"] != cold["kv"]:
        found.append("loaded other KV than was computed")
    sources = {tier: count for tier, count in mine["sources"].items() if count}
    if sources != due or mine["reused_tokens"] != cold["length"]:
        found.append(
            f"reused {mine['reused_tokens']} tokens, chunks by source {sources}, not {due}"
        )
    return found


def _same_prompt(answers: Sequence[Record], wanted: Record) -> Record:
    (found,) = (
        each
        for each in answers
        if (each["length"], each["number"]) == (wanted["length"], wanted["number"])
    )
    return found


def _name(answer: Record) -> str:
    return f"{answer['length']:,} tokens, prompt {answer['number'] + 1}"


def _difference(mine: str, theirs: str) -> float:
    a, b = (np.load(Path(file), allow_pickle=False) for file in (mine, theirs))
    return float(np.abs(a - b).max())


def _cells(phase: Record) -> list[str]:
    same = phase["identical"] and phase["kv_identical"]
    return [
        f"{phase['ttft_ms']:,.1f} ms",
        f"{phase['kvtier_ms']:,.1f} ms",
        f"{phase['speedup']:,.1f} x",
        f"{phase['bytes'] / (1 << 20):,.1f} MiB",
        "identical" if same else "DIFFERENT",
    ]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, with one under the first; only the second column is words."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        cells[1] = row[1].ljust(widths[1])
        lines.append("  ".join(cells))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _same(identical: bool) -> str:
    return "identical to" if identical else "DIFFERENT from"


def _noise_line(what: str, noise: Record) -> str:
    return (
        f"{what}: KV {_same(noise['kv_identical'])} it, answers {_same(noise['identical'])} it, "
        f"largest logit difference {noise['max_logit_diff']:g}"
    )
