"""Write the Python stubs of proto/*.proto, or with --check say which committed one is stale.

The stubs are committed, so that using kvtier needs no compiler. They are generated into a
temporary folder and copied: protoc writes under the virtual path `kvtier/proto/`, which makes every
generated import read `from kvtier.proto import ...`, but the real folder is `proto/`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
VIRTUAL = "kvtier/proto"
# Newer generators write code that refuses the protobuf 5.29 which inference engines still install.
GENERATORS = {"grpcio-tools": "1.71.2", "mypy-protobuf": "3.6.0"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate or check; the exit status is 1 when a stub is stale or cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; change nothing")
    check = parser.parse_args(arguments).check
    try:
        require_generators()
        with tempfile.TemporaryDirectory(prefix="kvtier-stubs-") as scratch:
            generated = generate(Path(scratch))
            return compare(generated) if check else install(generated)
    except GenerationError as problem:
        print(f"generate_stubs: {problem}", file=sys.stderr)
        return 1


class GenerationError(Exception):
    """The stubs cannot be generated; the message says what to mend."""


def require_generators() -> None:
    """Refuse any generator but the pinned ones: their output would differ for no good reason."""
    for package, wanted in GENERATORS.items():
        found = version(package)
        if found != wanted:
            raise GenerationError(f"{package} {found} is installed, {wanted} is needed")


def generate(scratch: Path) -> dict[str, Path]:
    """Run protoc into `scratch`; returns the generated files by name."""
    sources = sorted(path.name for path in PROTO.glob("*.proto"))
    if not sources:
        raise GenerationError("there is no .proto file in proto/")
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", f"-I{VIRTUAL}={PROTO}"),
        *(plugin("protoc-gen-mypy"), plugin("protoc-gen-mypy_grpc")),
        *(f"--{kind}_out={scratch}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *(f"{VIRTUAL}/{name}" for name in sources),
    ]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if run.returncode != 0:
        raise GenerationError(f"protoc failed:\n{run.stderr.strip()}")
    return {path.name: path for path in sorted((scratch / VIRTUAL).iterdir())}


def plugin(name: str) -> str:
    """The protoc option for a plugin that lies beside the running interpreter, off PATH or on."""
    return f"--plugin={name}={Path(sys.executable).with_name(name)}"


def committed() -> dict[str, Path]:
    """The stubs that lie in proto/ now, by name."""
    return {path.name: path for path in sorted(PROTO.glob("*_pb2*.py*"))}


def compare(generated: dict[str, Path]) -> int:
    """Name each stub that is missing, stale or left over; 1 if there was any."""
    present = committed()
    problems = [f"proto/{name} is missing" for name in generated.keys() - present.keys()]
    problems += [f"proto/{name} has no source" for name in present.keys() - generated.keys()]
    problems += [
        f"proto/{name} is stale"
        for name in generated.keys() & present.keys()
        if generated[name].read_bytes() != present[name].read_bytes()
    ]
    for problem in sorted(problems):
        print(f"{problem}: run `make proto` and commit the result", file=sys.stderr)
    return 1 if problems else 0


def install(generated: dict[str, Path]) -> int:
    """Copy the generated stubs into proto/ and remove those whose source is gone."""
    for name, path in committed().items():
        if name not in generated:
            path.unlink()
            print(f"removed proto/{name}")
    for name, path in generated.items():
        shutil.copyfile(path, PROTO / name)
        print(f"wrote proto/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
