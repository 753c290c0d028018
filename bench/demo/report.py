"""What the demo found: checks, table, JSON and plot."""

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from kvtier import __version__
from kvtier.bench.demo.model import NAME, PACKAGE

Record = dict[str, Any]  # one engine's answer, as `kvtier.bench.demo.engine` prints it

LABELS = {
    "recompute": "recomputed\n(transformers alone)",
    "no_sidecar": "sidecar killed\n(recomputed)",
    "disk": "from disk,\nafter a restart",
    "ram": "from RAM",
}
_ENGINES = {"ram": "B", "disk": "C", "no_sidecar": "D"}


@dataclass(frozen=True, slots=True)
class Runs:
    """Every answer: the `reference` ones by question, the others by the engine's name."""

    reference: list[Record]
    engines: dict[str, Record]  # A, B, C, D
    live: dict[int, Path]  # by question: logits on top of A's live cache
    chunk_tokens: int
    elapsed_s: float


def summarise(runs: Runs) -> Record:
    """The demo's result as a JSON document; `problems` is empty when all is as it should be."""
    first = runs.engines["A"]
    prefix = first["tokens"] // runs.chunk_tokens * runs.chunk_tokens
    ttft = {
        # The fastest: what else the machine does must not make the speed-up look larger.
        "recompute": min(each["ttft_ms"] for each in runs.reference),
        "cold_with_sidecar": first["ttft_ms"],
        **{name: runs.engines[engine]["ttft_ms"] for name, engine in _ENGINES.items()},
    }
    reloaded = [runs.engines["B"], runs.engines["C"]]
    compared = [(each, _reference(runs, each)) for each in runs.engines.values()]
    return {
        "identical": all(mine["answer"] == theirs["answer"] for mine, theirs in compared),
        "kv_identical": all(each["kv_sha256"] == first["kv_sha256"] for each in reloaded),
        "max_logit_diff": max(
            _difference(Path(each["logits"]), runs.live[each["question"]]) for each in reloaded
        ),
        "max_logit_diff_recomputed": max(
            _difference(Path(mine["logits"]), Path(theirs["logits"])) for mine, theirs in compared
        ),
        "meaning": {
            "identical": "every greedy answer is that of transformers alone, token for token",
            "kv_identical": "KV from RAM and from disk has the bits that engine A computed",
            "max_logit_diff": "reloaded KV against the live cache of engine A, every answer token",
            "max_logit_diff_recomputed": "every engine against transformers alone, whole prompt",
            "ttft_ms": "prompt ids in hand to first token id; recompute is the fastest "
            f"of {len(runs.reference)}, the others are one run each; before disk its files were "
            "dropped from the page cache",
            "kvtier_ms": "the part of ttft_ms spent in kvtier: hashing and loading",
        },
        "tokens": prefix,
        "bytes": runs.engines["B"]["loaded_bytes"],
        "ttft_ms": {name: round(value, 1) for name, value in ttft.items()},
        "kvtier_ms": {
            name: round(_in_kvtier_ms(runs.engines[engine]), 2) for name, engine in _ENGINES.items()
        },
        "speedup": {name: round(ttft["recompute"] / ttft[name], 1) for name in _ENGINES},
        "problems": problems(runs, prefix),
        "answers": [_public(each) for each in [*runs.reference, *runs.engines.values()]],
        "elapsed_s": round(runs.elapsed_s, 1),
        "model": {"name": NAME, "package": PACKAGE, "dtype": "float32"},
        "versions": versions(),
        "machine": machine(),
    }


def problems(runs: Runs, prefix: int) -> list[str]:
    """What is not as it should be, a line each."""
    found = []
    for name, each in runs.engines.items():
        reused = prefix if name in ("B", "C") else 0
        if each["answer"] != _reference(runs, each)["answer"]:
            found.append(f"engine {name} answers otherwise than transformers alone")
        if each["reused_tokens"] != reused:
            found.append(f"engine {name} reused {each['reused_tokens']} tokens, not {reused}")
        if name in ("B", "C") and each["kv_sha256"] != runs.engines["A"]["kv_sha256"]:
            found.append(f"engine {name} loaded other KV than engine A computed")
    if runs.engines["A"]["offloaded_chunks"] != prefix // runs.chunk_tokens:
        found.append(f"engine A offloaded {runs.engines['A']['offloaded_chunks']} chunks")
    return found


def table(result: Record) -> str:
    """The result for people: one table and one line on exactness."""
    rows = [("time to first token", "prompt", "KV loaded", "TTFT", "in kvtier", "speed-up")]
    by_engine = {each["engine"]: each for each in result["answers"]}
    for name in ("recompute", "ram", "disk", "no_sidecar"):
        engine = by_engine[_ENGINES.get(name, "reference")]
        ttft_ms = result["ttft_ms"][name]
        rows.append(
            (
                LABELS[name].replace("\n", " "),
                f"{engine['tokens']:,} tokens",
                f"{engine['loaded_bytes'] / (1 << 20):,.1f} MiB",
                f"{ttft_ms:,.0f} ms",
                f"{result['kvtier_ms'].get(name, 0):,.1f} ms",
                f"{result['ttft_ms']['recompute'] / ttft_ms:,.1f} x",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    same = "identical to" if result["identical"] else "DIFFERENT from"
    lines += [
        "",
        f"answers: {same} transformers alone, token for token",
        f"largest logit difference: {result['max_logit_diff']:g} to the live cache, "
        f"{result['max_logit_diff_recomputed']:.2g} to one pass over the whole prompt",
        *(f"PROBLEM: {problem}" for problem in result["problems"]),
    ]
    return "\n".join(lines) + "\n"


def plot(result: Record, file: Path) -> None:
    """A bar for each way to the first token, on a logarithmic scale, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = list(LABELS)[::-1]
    values = [result["ttft_ms"][name] for name in names]
    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"recompute": "#8a8f98", "no_sidecar": "#b9bdc4", "disk": "#d98c3f", "ram": "#2f7fb8"}
    bars = axes.barh([LABELS[name] for name in names], values, color=[colours[n] for n in names])
    recompute = result["ttft_ms"]["recompute"]
    words = [
        f" {value:,.0f} ms" + (f"  ({recompute / value:,.0f}x)" if value * 2 < recompute else "")
        for value in values
    ]
    axes.bar_label(bars, words)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, max(values) * 6)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("time to first token, ms (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{result['model']['name']}, {result['tokens']:,} tokens of shared prefix, "
        f"{result['machine']['threads']} CPU threads",
        fontsize=11,
    )
    figure.savefig(file)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"kvtier": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}


def machine() -> Record:
    """What the figures were measured on, in words that identify nobody."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {"cpu": model, "cpus": os.cpu_count(), "system": platform.system(), "threads": 2}


def _in_kvtier_ms(each: Record) -> float:
    timings: dict[str, float] = each["timings_ms"]
    return timings["hash"] + timings["load"]


def _reference(runs: Runs, each: Record) -> Record:
    return runs.reference[each["question"]]


def _public(each: Record) -> Record:
    hidden = ("logits", "kv_sha256")
    return {name: value for name, value in each.items() if name not in hidden}


def _difference(mine: Path, theirs: Path) -> float:
    a, b = (np.load(file, allow_pickle=False) for file in (mine, theirs))
    return float(np.abs(a - b).max())
