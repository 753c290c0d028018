"""The result as a picture."""

from collections.abc import Sequence
from pathlib import Path

from kvtier.bench.trace.figures import Result
from kvtier.errors import InvalidRequest


def plot(name: str, results: Sequence[Result], file: Path) -> None:
    """Hit ratio against capacity, with LRU below it and MIN above, as PNG. Raises InvalidRequest
    when there is no matplotlib, or the file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise InvalidRequest("--plot: matplotlib is missing; install kvtier[demo]") from None
    rows = sorted(results, key=lambda row: row.capacity_percent)
    capacities = [row.capacity_percent for row in rows]
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = [
        ("MIN, the limit", "#8a8f98", "--", [row.min_percent for row in rows]),
        (rows[0].policy, "#2f7fb8", "-", [row.hit_percent for row in rows]),
        ("LRU", "#d98c3f", "-", [row.lru_percent for row in rows]),
    ]
    for label, colour, style, values in lines:
        axes.plot(capacities, values, style, marker="o", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xticks(capacities, [f"{capacity:.3g}" for capacity in capacities])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("capacity, % of the trace's different chunks")
    axes.set_ylabel("chunks served, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(name, fontsize=11)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise InvalidRequest(f"--plot: {file}: {error.strerror or error}") from None
