"""The hit ratio by capacity, as a person reads it: a table, a sentence and a drawing."""

from collections.abc import Sequence
from pathlib import Path

from kvtier.client import CurvePoint, HitCurve
from kvtier.config import format_bytes
from kvtier.errors import KvtierError

# References to sampled chunks, below which a curve says more of chance than of the workload.
FEWEST_SAMPLED = 1000
_MORE = 16 << 30  # bytes: the usual step in memory modules
_BAR = 40  # characters for 100 %
_TIERS = {"cpu": "RAM", "disk": "RAM and disk"}
_DRAWN = (".pdf", ".png", ".svg")


class CannotDraw(KvtierError):
    """A plot was asked for that cannot be had; the message says what is missing."""

    status = "INVALID_ARGUMENT"


def readable(curves: Sequence[HitCurve]) -> str:
    """Every curve as a table with bars, and in a sentence."""
    if not curves:
        return "no curve yet: no request was sampled\n"
    return "\n".join(_table(curve) for curve in curves)


def _table(curve: HitCurve) -> str:
    whose = "all tenants" if curve.tenant is None else f"tenant {curve.tenant!r} alone"
    tier = _TIERS.get(curve.tier, curve.tier)
    lines = [f"{whose}, {tier} ({format_bytes(curve.capacity_bytes)} today)"]
    if curve.sampled_chunks < FEWEST_SAMPLED:
        lines.append(
            f"  too few requests yet: {curve.requests} requests gave {curve.sampled_chunks} "
            f"sampled chunks, a curve needs {FEWEST_SAMPLED}; ask again later"
        )
        return "\n".join(lines) + "\n"
    lines += [_row(point, curve.capacity_bytes) for point in curve.points]
    lines.append(
        f"  from {curve.requests} requests, {100 * curve.rate:.3g} % of the chunks sampled "
        f"({curve.sampled_chunks} references)"
    )
    lines.append(f"  {_sentence(curve)}")
    return "\n".join(lines) + "\n"


def _row(point: CurvePoint, today_bytes: int) -> str:
    bar = "█" * round(_BAR * point.hit_percent / 100)
    name = _step(point.capacity_bytes, today_bytes)
    return (
        f"  {name:>6} {format_bytes(point.capacity_bytes):>10}  {point.hit_percent:5.1f} %  {bar}"
    ).rstrip()


def _step(nbytes: int, today_bytes: int) -> str:
    """A capacity in terms of today's: "-50 %", "+0", "+25 %", "x2"."""
    ratio = nbytes / max(1, today_bytes)
    if ratio >= 1.99:
        return f"x{ratio:.0f}"
    percent = round(100 * (ratio - 1))
    return f"{percent:+d} %" if percent else "+0"


def _sentence(curve: HitCurve) -> str:
    tier, today = _TIERS.get(curve.tier, curve.tier), curve.capacity_bytes
    largest = max((point.capacity_bytes for point in curve.points), default=0)
    more = min(_MORE, largest - today)
    hits, now = curve.hit_percent_at(today + more), curve.hit_percent_at(today)
    said = (
        f"with +{format_bytes(more)} of {tier} the hit ratio would be {hits:.1f} % "
        f"(now {now:.1f} %)"
    )
    if curve.seen_bytes < today + more:
        said += f"; only {format_bytes(curve.seen_bytes)} has come by so far, so wait and see"
    return said


def plot(curves: Sequence[HitCurve], path: Path) -> None:
    """Draw all curves into a file. Raises CannotDraw when it cannot be made."""
    if path.suffix not in _DRAWN:
        raise CannotDraw(f"--plot: {str(path)!r} must end in one of {', '.join(_DRAWN)}")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - only where it is asked for
    except ImportError:
        raise CannotDraw("--plot: matplotlib is missing; install kvtier[demo]") from None
    drawn = [curve for curve in curves if curve.sampled_chunks >= FEWEST_SAMPLED]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for curve in drawn:
        sizes = [point.capacity_bytes / 2**30 for point in curve.points]
        whose = "all tenants" if curve.tenant is None else curve.tenant
        label = f"{whose}, {_TIERS.get(curve.tier, curve.tier)}"
        (line,) = axes.plot(sizes, [point.hit_percent for point in curve.points], "o-", label=label)
        axes.axvline(curve.capacity_bytes / 2**30, color=line.get_color(), linestyle=":")
    axes.set(xlabel="capacity, GiB (dotted: today's)", ylabel="hit ratio, %", ylim=(0, 100))
    if drawn:
        axes.set_xscale("log")
        axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise CannotDraw(f"--plot: {path} cannot be written: {error}") from None
