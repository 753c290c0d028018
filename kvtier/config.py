"""Every setting of the service: what it does, what is allowed, and where a value came from.

A value is taken from the TOML file, then from `KVTIER_SECTION_FIELD`, then from `--set
section.field=value`; the later one wins. A key that is not in the schema, a value that is malformed
and a value out of range are errors that name their source, wherever they stand.

    >>> load(None, {"KVTIER_CPU_CAPACITY": "2GiB"}, ["cpu.capacity=8GiB"]).cpu.capacity
    8589934592
"""

import dataclasses
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError
from kvtier.sections import (
    Cpu,
    Disk,
    Eviction,
    Gpu,
    Limits,
    Retention,
    Server,
    Tenants,
    default_directory,
    default_listen,
)
from kvtier.settings import MIB, SIZE_ALLOWED, Setting, read_bytes, shown

MAX_FILE_BYTES = MIB
FILE_VARIABLE = "KVTIER_CONFIG"
PREFIX = "KVTIER_"
# Kubernetes sets these in every pod beside a Service called `kvtier`; they are not ours to read.
FOREIGN = re.compile(r"KVTIER_(SERVICE_(HOST|PORT(_.*)?)|PORT(_.*)?)")


def parse_bytes(text: str) -> int:
    """The number of bytes that a size such as "8GiB", "45.0 MiB" or "512" names.

    >>> parse_bytes("8GiB") == 8 * 2**30
    True
    """
    try:
        return read_bytes(text)
    except ValueError as problem:
        raise ConfigError(f"{shown(text)}: {problem}; allowed: {SIZE_ALLOWED}") from None


def format_bytes(count: float) -> str:
    """A size for people, in the unit that leaves it below 1024; rounded, so not for storing.

    >>> format_bytes(47_185_920)
    '45.0 MiB'
    """
    names, rank = ("B", "KiB", "MiB", "GiB", "TiB"), 0
    while round(count, 1) >= 1024 and rank < len(names) - 1:
        count, rank = count / 1024, rank + 1
    return f"{count:.{1 if rank else 0}f} {names[rank]}"


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one service. Built by `load`, which checks; the constructor does not."""

    server: Server = field(default_factory=Server)
    gpu: Gpu = field(default_factory=Gpu)
    cpu: Cpu = field(default_factory=Cpu)
    disk: Disk = field(default_factory=Disk)
    eviction: Eviction = field(default_factory=Eviction)
    tenants: Tenants = field(default_factory=Tenants)
    retention: Retention = field(default_factory=Retention)
    limits: Limits = field(default_factory=Limits)

    def to_toml(self) -> str:
        """The effective configuration as a commented file; loading it gives an equal `Config`."""
        lines: list[str] = []
        for section, settings in SCHEMA.items():
            lines += ["", f"[{section}]"]
            for name, setting in settings.items():
                value = getattr(getattr(self, section), name)
                lines += [*setting.comment(), f"{name} = {setting.write(value)}"]
        return "\n".join(lines[1:]) + "\n"


SECTIONS: dict[str, type[Any]] = {
    "server": Server,
    "gpu": Gpu,
    "cpu": Cpu,
    "disk": Disk,
    "eviction": Eviction,
    "tenants": Tenants,
    "retention": Retention,
    "limits": Limits,
}


def _settings_of(section: type[Any]) -> dict[str, Setting]:
    """The `Setting` in each field's annotation; a field without one is a mistake of ours."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {each.name: hints[each.name].__metadata__[0] for each in dataclasses.fields(section)}


SCHEMA: dict[str, dict[str, Setting]] = {
    name: _settings_of(section) for name, section in SECTIONS.items()
}


def load(path: Path | None, environ: Mapping[str, str], overrides: Sequence[str]) -> Config:
    """The effective configuration; `ConfigError` names the first thing wrong in any source.

    Without `path`, `KVTIER_CONFIG` in `environ` names the file; without either there is none.
    """
    if path is None and environ.get(FILE_VARIABLE):
        path = Path(environ[FILE_VARIABLE])
    chosen: dict[str, dict[str, Any]] = {section: {} for section in SCHEMA}
    for source, section, name, raw in _given(path, environ, overrides):
        value = _checked(source, section, name, raw)
        chosen[section][name] = value
    for section, name, raw in _defaults(environ):
        if name not in chosen[section]:
            chosen[section][name] = _checked("default", section, name, raw)
    return Config(**{name: SECTIONS[name](**values) for name, values in chosen.items()})


def _given(
    path: Path | None, environ: Mapping[str, str], overrides: Sequence[str]
) -> Iterator[tuple[str, str, str, object]]:
    """Every (source, section, field, raw value), the weakest source first."""
    if path is not None:
        yield from _from_file(path)
    yield from _from_environment(environ)
    yield from _from_overrides(overrides)


def _defaults(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """The defaults that depend on the environment, which can therefore be wrong."""
    yield "server", "listen", default_listen(environ)
    yield "disk", "directory", str(default_directory(environ))


def _checked(source: str, section: str, name: str, raw: object) -> object:
    """The parsed value, or an error that says where it stands and what is allowed there."""
    _require_section(source, section)
    if name not in SCHEMA[section]:
        raise ConfigError(
            f"{source}: unknown key {shown(f'{section}.{name}')};"
            f" allowed in [{section}]: {', '.join(SCHEMA[section])}"
        )
    setting = SCHEMA[section][name]
    try:
        return setting.parse(raw)
    except ValueError as problem:
        reason = f" ({problem})" if str(problem) else ""
        raise ConfigError(
            f"{source}: {section}.{name} = {shown(raw)}{reason}; allowed: {setting.allowed}"
        ) from None


def _require_section(source: str, section: str) -> None:
    if section not in SCHEMA:
        raise ConfigError(
            f"{source}: unknown section {shown(section)}; allowed: {', '.join(SCHEMA)}"
        )


def _from_file(path: Path) -> Iterator[tuple[str, str, str, object]]:
    for section, table in _read_toml(path).items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {shown(section)} stands outside a section; allowed sections:"
                f" {', '.join(SCHEMA)}"
            )
        _require_section(str(path), section)
        for name, raw in table.items():
            yield str(path), section, name, raw


def _read_toml(path: Path) -> dict[str, Any]:
    """The parsed file. Its size is bounded before it is parsed."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read: {problem.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than 1 MiB, the most a configuration may have")
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text, as TOML must be") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a configuration") from None
    except ValueError as problem:  # TOMLDecodeError, or a number of too many digits
        raise ConfigError(f"{path}: not valid TOML: {problem}") from None


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str, object]]:
    known = {
        f"{PREFIX}{section}_{name}".upper(): (section, name)
        for section, settings in SCHEMA.items()
        for name in settings
    }
    for variable, raw in environ.items():
        if variable in known:
            yield variable, *known[variable], raw
        elif (
            variable.startswith(PREFIX)
            and variable != FILE_VARIABLE
            and not FOREIGN.fullmatch(variable)
        ):
            raise ConfigError(
                f"environment: unknown variable {shown(variable)}; allowed: {FILE_VARIABLE},"
                f" {', '.join(known)}"
            )


def _from_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, str, str, object]]:
    for override in overrides:
        key, equals, raw = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(
                f"--set {shown(override)}: allowed: section.field=value, such as cpu.capacity=8GiB"
            )
        yield "--set", section, name, raw
