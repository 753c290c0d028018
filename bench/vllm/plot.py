"""The result as a picture."""

from pathlib import Path
from typing import Any

from kvtier.bench.vllm.workload import EXACT_TOKENS

_WAYS = {
    "recompute": ("recomputed\n(vLLM alone)", "#8a8f98"),
    "disk_cold": ("kvtier: from disk,\nnot in the page cache", "#b5651d"),
    "disk": ("kvtier: from disk,\nafter restarts", "#d98c3f"),
    "ram": ("kvtier: from RAM,\nafter a restart", "#2f7fb8"),
    "engine_hit": ("vLLM's own cache,\nsame process", "#b9bdc4"),
}


def plot(result: dict[str, Any], file: Path) -> None:
    """For each prompt length a bar for each way to the first token, on a logarithmic scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(EXACT_TOKENS), sharex=True, sharey=True)
    every = [value for way in _WAYS for value in result["ttft_ms"][way].values()]
    for axes, length in zip(panels, EXACT_TOKENS, strict=True):
        _panel(axes, {way: result["ttft_ms"][way][str(length)] for way in _WAYS})
        axes.set_title(f"prompt of {length:,} tokens", fontsize=10)
        axes.set_xlim(min(every) / 2, max(every) * 8)
    machine = result["machine"]
    figure.suptitle(
        f"vLLM {result['versions']['vllm']}, {result['model']['name']}, "
        f"{machine['threads']} CPU threads",
        fontsize=11,
    )
    figure.savefig(file)


def _panel(axes: Any, values: dict[str, float]) -> None:
    ways = list(_WAYS)[::-1]
    labels, colours = zip(*(_WAYS[way] for way in ways), strict=True)
    bars = axes.barh(labels, [values[way] for way in ways], color=colours)
    recompute = values["recompute"]
    axes.bar_label(
        bars,
        [
            f" {values[way]:,.0f} ms"
            + (f"  ({recompute / values[way]:,.1f}x)" if way != "recompute" else "")
            for way in ways
        ],
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("time to first token, ms (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
