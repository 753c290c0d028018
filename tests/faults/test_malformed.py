"""Bytes that are no message of the protocol: refused, and nobody else notices."""

import os
import random
import socket
from collections.abc import Iterator

import grpc
import pytest

from kvtier.proto import cache_pb2 as pb
from tests.faults.fake_service import METHODS, STREAMS
from tests.sidecar import Sidecar
from tests.wire.own_client import TIMEOUT_S, OwnClient, refusal

FINE = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with Sidecar(tmp_path_factory.mktemp("garbage")) as running:
        yield running


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[OwnClient]:
    """A session whose chunks stay right."""
    with OwnClient(sidecar.target) as opened:
        keys = opened.keys(1, 10)
        opened.store(keys)
        yield opened
        assert opened.verify(keys) == 10


def send(client: OwnClient, method: str, sent: bytes) -> grpc.StatusCode:
    """The status with which the method answers these bytes, taken for one message."""
    path = f"/kvtier.v1.Cache/{method}"
    timeout = 2.0 if method == "OpenSession" else TIMEOUT_S
    if method == "Put":
        upload = client.channel.stream_unary(path)
        return refusal(lambda: upload(iter([sent]), timeout=timeout))[0]
    if method in STREAMS:
        stream = client.channel.unary_stream(path)
        return refusal(lambda: stream(sent, timeout=timeout))[0]
    call = client.channel.unary_unary(path)
    return refusal(lambda: call(sent, timeout=timeout))[0]


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message(client: OwnClient, method: str) -> None:
    for sent in (b"\x0a\xff\xff\xff\xff\x0f", b"\xff" * 100, b"\x0a\x10short", b"\x07"):
        assert send(client, method, sent) == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", [name for name in METHODS if name != "OpenSession"])
def test_messages_with_damaged_bytes(client: OwnClient, method: str) -> None:
    """What still parses is checked like any other request; nothing ends in an error of ours."""
    chance = random.Random(method)
    right = METHODS[method](session_id=client.id).SerializeToString() if method not in (
        "Put", "Stats",
    ) else pb.PutRequest(header=pb.PutHeader(session_id=client.id)).SerializeToString()  # fmt: skip
    for _ in range(100):
        sent = bytearray(right + os.urandom(chance.randrange(8)))
        for _ in range(chance.randrange(4)):
            sent[chance.randrange(len(sent))] = chance.randrange(256)
        assert send(client, method, bytes(sent)) in FINE


@pytest.mark.parametrize("method", METHODS)
def test_messages_beyond_the_limit(client: OwnClient, method: str) -> None:
    assert send(client, method, bytes(8 << 20)) == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_methods_that_do_not_exist(client: OwnClient) -> None:
    for path in ("/kvtier.v1.Cache/Nothing", "/kvtier.v2.Cache/Lookup", "/"):
        call = client.channel.unary_unary(path)
        status, _ = refusal(lambda call=call: call(b"", timeout=TIMEOUT_S))
        assert status == grpc.StatusCode.UNIMPLEMENTED


def test_noise_on_the_socket(sidecar: Sidecar, client: OwnClient) -> None:
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(1 << 16), b"PRI * HTTP/2.0\r\n"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(sidecar.socket))
            try:
                connection.sendall(noise)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
            except OSError:
                pass  # it hung up on us first


def test_many_connections_that_say_nothing(sidecar: Sidecar, client: OwnClient) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(200)]
    try:
        for connection in silent:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(sidecar.socket))
        with OwnClient(sidecar.target) as another:
            assert another.verify(another.keys(1, 10)) == 10
    finally:
        for connection in silent:
            connection.close()
