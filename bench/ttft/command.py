"""The command: folders, progress, and where the results go."""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from kvtier.bench.demo.demo import Progress
from kvtier.bench.ttft.phases import Plan, play, repeats_that_fit
from kvtier.bench.ttft.plot import plot
from kvtier.bench.ttft.report import summarise, table
from kvtier.bench.ttft.shapes import shape_for


def measure(device: str, out: Path, *, as_json: bool) -> int:
    """Play it all; results go to `out`/DATE-DEVICE-ttft.json and .png.

    Progress goes to stderr; stdout gets the table, or with `as_json` the JSON document. Returns 0
    when every prefix came from where it should and gave what was computed, else 1. Raises
    KvtierError when a step could not be done. Whatever happens, everything started is stopped.
    """
    shape = shape_for(device)
    repeats = repeats_that_fit(shape)
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    with _folder(out) as work, _folder(out) as disk:
        played = play(Plan(shape, device, repeats, work, disk / "store"), progress)
        report = summarise(played, shape, progress.elapsed_s)
    name = device if device == "host" else played.facts["device"]
    file = out / f"{datetime.now(UTC):%Y-%m-%d}-{slug(name)}-ttft"
    document = report.as_json()
    file.with_suffix(".json").write_text(document, encoding="utf-8")
    plot(report, file.with_suffix(".png"))
    progress(f"wrote {file}.json and .png")
    sys.stdout.write(document if as_json else table(report))
    return 1 if report.figures["problems"] else 0


def slug(name: str) -> str:
    """A device's name as part of a file's.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


@contextmanager
def _folder(place: Path) -> Iterator[Path]:
    """A folder that is removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="ttft-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
