"""The command: every measurement, the report, and the file that keeps it."""

import logging
import re
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from kvtier.bench.gpu import copies, crossing, decoding, hits, paged_kernels
from kvtier.bench.gpu.scale import DRY, FULL, Scale
from kvtier.bench.report import Progress, Report, Target
from kvtier.kernels.devices import open_device

Figures = dict[str, Any]

MEASUREMENTS: dict[str, Callable[[str, Scale], Figures]] = {
    "copies": copies.measure,
    "kernels": paged_kernels.measure,
    "staging": crossing.measure,
    "hits": hits.measure,
    "decode": decoding.measure,
}
# Of an H100; on others they say how far it is from one.
TARGETS = {
    "copies_ratio": Target(0.95),
    "copies_both_gain": Target(copies.FULL_DUPLEX_GAIN),
    "gather_ratio": Target(0.85),
    "scatter_ratio": Target(0.85),
    "vram_hit_ratio": Target(0.8),
    "decode_slowdown_percent": Target(10.0, at_most=True),
    "decode_slowdown_engine_percent": Target(10.0, at_most=True),
}

_log = logging.getLogger(__name__)


def measure(name: str, folder: Path | None, *, as_json: bool) -> int:
    """Measure the device of that name; 1 when a measurement failed, else 0.

    stdout gets the table, or with `as_json` the JSON document, which is also written to the folder,
    if any. Raises InvalidRequest for a name that is no device's, DeviceError when it cannot be
    used.
    """
    dry = name == "host"
    with closing(open_device(name)) as device:
        about = {"device": name, **device.describe()}
    figures = figures_of(name, DRY if dry else FULL)
    report = Report("gpu", figures, about, {} if dry else TARGETS)
    document = report.as_json()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / file_name(datetime.now(UTC).date(), about["model"])
        file.write_text(document, encoding="utf-8")
    sys.stdout.write(document if as_json else report.as_table())
    return 1 if figures["failed"] else 0


def figures_of(name: str, scale: Scale) -> Figures:
    """All figures, those with a target first; `failed` says why a measurement has none."""
    progress = Progress()
    found: Figures = {}
    failed: dict[str, str] = {}
    for number, (what, measure_one) in enumerate(MEASUREMENTS.items()):
        progress("measuring", number, len(MEASUREMENTS))
        try:
            found |= measure_one(name, scale)
        except Exception as error:  # noqa: BLE001 - the others' figures must not be lost
            _log.exception("%s failed", what)
            failed[what] = f"{type(error).__name__}: {error}"
    progress("measuring", len(MEASUREMENTS), len(MEASUREMENTS))
    nested = {key: value for key, value in found.items() if isinstance(value, dict)}
    plain = {key: value for key, value in found.items() if key not in nested}
    return {**plain, **nested, "failed": failed}


def file_name(day: date, model: str) -> str:
    """The name of a result file.

    >>> file_name(date(2026, 5, 17), "NVIDIA H100 80GB HBM3")
    '2026-05-17-nvidia-h100-80gb-hbm3-gpu.json'
    """
    slug = "-".join(re.findall(r"[a-z0-9]+", model.lower()))
    return f"{day:%Y-%m-%d}-{slug}-gpu.json"
