"""The result for people: its tables."""

from collections.abc import Sequence
from typing import Any

from kvtier.bench.vllm.workload import EXACT_TOKENS

_BUSY = 0.15  # other work that takes more of the machine than this is worth a note
_PHASES = ("without", "cold", "ram", "disk", "disk_cold")


def tables(result: dict[str, Any]) -> str:
    """Two tables, a line on exactness, one on a busy machine and one for each problem."""
    plain = result["plain_read_ms"]
    same = "identical to" if result["identical"] else "DIFFERENT from"
    lines = [
        *_aligned(_turns(result)),
        "",
        *_aligned(_lengths(result)),
        "",
        f"answers: {same} vLLM without kvtier, token for token",
        "a plain read of as many bytes as the longest prompt has takes "
        f"{plain['disk']:,.0f} ms, cold {plain['disk_cold']:,.0f}",
        *_note(result["phases"]),
        *(f"PROBLEM: {problem}" for problem in result["problems"]),
    ]
    return "\n".join(lines) + "\n"


def _turns(result: dict[str, Any]) -> list[tuple[str, ...]]:
    head = ("time to first token, ms", "prompt", "without", "cold", "RAM", "disk", "cold disk")
    reused = ("reused: without", "RAM", "disk", "cold disk")
    return [
        (*head, *reused),
        *(
            (
                f"{each['conversation']}, turn {each['turn']}",
                f"{each['prompt_tokens']:,} tokens",
                *(f"{each['ttft_ms'][name]:,.0f}" for name in _PHASES),
                *(f"{each['reused_tokens'][name]:,}" for name in _PHASES if name != "cold"),
            )
            for each in result["conversations"]
        ),
    ]


def _lengths(result: dict[str, Any]) -> list[tuple[str, ...]]:
    columns = {
        "recompute": "recomputed",
        "cold": "cold",
        "engine_hit": "vLLM's cache",
        "ram": "RAM",
        "disk": "disk",
        "disk_cold": "cold disk",
    }
    ratios = {
        "recompute_over_ram": "recomputed/RAM",
        "disk_over_ram": "disk/RAM",
        "disk_cold_over_ram": "cold disk/RAM",
        "ram_over_engine_hit": "RAM/vLLM's cache",
    }
    rows = [("time to first token, ms", *columns.values(), *ratios.values())]
    for length in EXACT_TOKENS:
        rows.append(
            (
                f"{length:,} tokens",
                *(f"{result['ttft_ms'][name][str(length)]:,.0f}" for name in columns),
                *(f"{result['ratios'][name][str(length)]:.2f}" for name in ratios),
            )
        )
        rows.append(
            (
                "  of them reused",
                *(f"{result['reused_tokens'][name][str(length)]:,}" for name in columns),
                *("" for _ in ratios),
            )
        )
    return rows


def _note(phases: dict[str, Any]) -> list[str]:
    """A line on what else the machine did, where that was much."""
    busy = {name: each["other_work"] for name, each in phases.items()}
    if max(busy.values()) <= _BUSY:
        return []
    shares = ", ".join(f"{100 * share:.0f} % ({name})" for name, share in busy.items())
    return [f"NOTE: other work took {shares} of the machine: measure again for times that count"]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
