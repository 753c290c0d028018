"""The result as a picture."""

from pathlib import Path

from kvtier.bench.report import Report

_LINES = {
    "recompute": ("recomputed", "#8a8f98"),
    "disk": ("from disk", "#d98c3f"),
    "ram": ("from RAM", "#2f7fb8"),
    "vram": ("from VRAM", "#2e8b57"),
}


def plot(report: Report, file: Path) -> None:
    """TTFT against the prompt's length, a line for each source, both logarithmic, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    lengths = report.figures["lengths"]
    tokens = [int(length) for length in lengths]
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for source, (label, colour) in _LINES.items():
        values = [of_length[source]["ttft_ms"] for of_length in lengths.values()]
        speedup = lengths[str(tokens[-1])][source]["speedup"]
        more = "" if source == "recompute" else f"  ({speedup:,.1f}x)"
        axes.plot(tokens, values, marker="o", color=colour, label=label)
        axes.annotate(
            f"   {values[-1]:,.0f} ms{more}", (tokens[-1], values[-1]), va="center", fontsize=9
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(tokens[0] / 1.2, tokens[-1] * 2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("time to first token, ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    setup = report.setup
    axes.set_title(f"{setup['model']}, {setup['dtype']}, {setup['device']}", fontsize=11)
    figure.savefig(file)
