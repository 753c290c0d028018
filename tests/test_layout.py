"""The links in kvtier/, the package mapping and the package list in pyproject.toml agree."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]
# {"kvtier.bench": "bench", ...}
MAPPING: dict[str, str] = SETUPTOOLS["package-dir"]
FOLDERS = ["kvtier", "scripts", "tests", *sorted(MAPPING.values())]
MAX_LINES = 400


def source_files() -> list[Path]:
    """Our own Python files, each once: links are skipped, generated code is exempt."""
    linked = [ROOT / "kvtier" / folder for folder in MAPPING.values()]
    return [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "_pb2" not in path.name and not any(path.is_relative_to(link) for link in linked)
    ]


def package_of(directory: Path) -> str:
    """The import name of a real package folder: ROOT/tiers/policies is kvtier.tiers.policies."""
    parts = directory.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "kvtier" else ("kvtier", *parts))


def test_each_mapped_folder_has_its_relative_link() -> None:
    links = {
        path.name: path.readlink() for path in (ROOT / "kvtier").iterdir() if path.is_symlink()
    }
    assert links == {folder: Path("..") / folder for folder in MAPPING.values()}


def test_mapping_names_each_folder_as_its_link() -> None:
    assert {f"kvtier.{folder}": folder for folder in MAPPING.values()} == MAPPING


def test_package_list_is_what_lies_on_disk() -> None:
    found = {
        package_of(path.parent)
        for path in source_files()
        if path.name == "__init__.py"
        and path.relative_to(ROOT).parts[0] not in {"scripts", "tests"}
    }
    assert sorted(found) == sorted(SETUPTOOLS["packages"])


def test_every_python_file_lies_in_a_package() -> None:
    strays = [
        str(path.relative_to(ROOT))
        for path in source_files()
        if path.relative_to(ROOT).parts[0] not in {"scripts", "tests"}
        and package_of(path.parent) not in SETUPTOOLS["packages"]
    ]
    assert strays == []


def test_link_and_folder_are_one_place() -> None:
    for folder in MAPPING.values():
        assert (ROOT / "kvtier" / folder).samefile(ROOT / folder)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
