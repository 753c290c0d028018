"""The committed stubs run on the oldest protobuf and grpcio that pyproject.toml admits."""

import importlib
import re
from pathlib import Path

import google.protobuf
import pytest
from google.protobuf.descriptor import FileDescriptor

PROTO = Path(__file__).resolve().parent.parent / "proto"
SOURCES = sorted(path.stem for path in PROTO.glob("*.proto"))
OLDEST_PROTOBUF = (5, 29)
OLDEST_GRPC = (1, 71)


def numbers(version: str) -> tuple[int, int]:
    """Major and minor of a version, which is what the runtime checks compare."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def test_there_is_something_to_test() -> None:
    assert "cache" in SOURCES


@pytest.mark.parametrize("name", SOURCES)
def test_four_stubs_are_committed(name: str) -> None:
    wanted = [f"{name}_pb2{suffix}" for suffix in (".py", ".pyi", "_grpc.py", "_grpc.pyi")]
    assert [stub for stub in wanted if not (PROTO / stub).is_file()] == []


@pytest.mark.parametrize("name", SOURCES)
def test_stubs_import_with_the_installed_protobuf(name: str) -> None:
    messages = importlib.import_module(f"kvtier.proto.{name}_pb2")
    importlib.import_module(f"kvtier.proto.{name}_pb2_grpc")
    assert isinstance(messages.DESCRIPTOR, FileDescriptor)
    assert messages.DESCRIPTOR.name == f"kvtier/proto/{name}.proto"
    assert numbers(google.protobuf.__version__) >= OLDEST_PROTOBUF


@pytest.mark.parametrize("name", SOURCES)
def test_messages_ask_for_no_protobuf_newer_than_5_29(name: str) -> None:
    text = (PROTO / f"{name}_pb2.py").read_text(encoding="utf-8")
    header = re.search(r"^# Protobuf Python Version: ([0-9.]+)$", text, re.MULTILINE)
    check = re.search(
        r"ValidateProtobufRuntimeVersion\(\s*[\w.]+,\s*(\d+),\s*(\d+),\s*(\d+),", text
    )
    assert header is not None
    assert check is not None
    assert numbers(header[1]) == numbers(".".join(check.groups())) == OLDEST_PROTOBUF


@pytest.mark.parametrize("name", SOURCES)
def test_services_ask_for_no_grpcio_newer_than_1_71(name: str) -> None:
    text = (PROTO / f"{name}_pb2_grpc.py").read_text(encoding="utf-8")
    required = re.search(r"^GRPC_GENERATED_VERSION = '([0-9.]+)'$", text, re.MULTILINE)
    assert required is not None
    assert numbers(required[1]) == OLDEST_GRPC
