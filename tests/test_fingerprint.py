"""The weights fingerprint: copies agree, whatever it reads counts, no header is believed."""

import itertools
import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from kvtier import fingerprint
from kvtier.errors import InvalidRequest
from kvtier.fingerprint import Sample

ROWS = 64  # 64 KiB per tensor: 16 blocks of 4 KiB


def write_safetensors(file: Path, names: list[str], fill: int = 1) -> None:
    header, data = {}, b""
    for index, name in enumerate(names):
        body = bytes([(fill + index) % 256]) * (ROWS * 1024)
        span = [len(data), len(data) + len(body)]
        header[name] = {"dtype": "F32", "shape": [ROWS, 256], "data_offsets": span}
        data += body
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model-00001-of-00002.safetensors", ["embed", "layers.0.q"])
    write_safetensors(folder / "model-00002-of-00002.safetensors", ["layers.1.q", "norm"], fill=9)
    return folder


def write_gguf(file: Path, body: bytes) -> None:
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + body)


def test_copies_agree_wherever_and_whenever_they_are(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(model, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    (copy / "README.md").write_text("not weights")
    assert fingerprint.of_path(model) == fingerprint.of_path(copy)
    assert fingerprint.of_path(model).startswith("files-")


def test_links_are_followed(model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    assert fingerprint.of_path(model) == fingerprint.of_path(linked)


def test_one_file_is_a_model_too(model: Path) -> None:
    first, second = sorted(model.iterdir())
    assert fingerprint.of_path(first) != fingerprint.of_path(second)
    assert fingerprint.of_path(first) != fingerprint.of_path(model)


def test_a_changed_shard_a_missing_shard_and_a_changed_header_are_seen(model: Path) -> None:
    seen = {fingerprint.of_path(model)}
    shard = model / "model-00002-of-00002.safetensors"
    original = shard.read_bytes()
    shard.write_bytes(original.replace(b'"norm"', b'"nurm"'))
    seen.add(fingerprint.of_path(model))
    shard.write_bytes(original + b"\0")
    seen.add(fingerprint.of_path(model))
    write_safetensors(shard, ["layers.1.q", "norm"], fill=10)
    seen.add(fingerprint.of_path(model))
    shard.unlink()
    seen.add(fingerprint.of_path(model))
    assert len(seen) == 5


def test_every_tensor_is_sampled_and_the_rest_of_it_is_not(model: Path) -> None:
    """The honest limit: one block in sixteen of these tensors decides, whichever tensor it is."""
    before = fingerprint.of_path(model)
    shard = model / "model-00001-of-00002.safetensors"
    original = shard.read_bytes()
    start = len(original) - 2 * ROWS * 1024
    noticed = []
    for block in range(2 * ROWS * 1024 // fingerprint.BLOCK_BYTES):
        changed = bytearray(original)
        changed[start + block * fingerprint.BLOCK_BYTES] ^= 0xFF
        shard.write_bytes(changed)
        noticed.append(fingerprint.of_path(model) != before)
    assert noticed[:16].count(True) == 1
    assert noticed[16:].count(True) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "claims a header"),
        (b"\1\2\3", "claims a header"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claims a header of 4611686018427387904 bytes"),
        (struct.pack("<Q", 3) + b"{}", "claims a header of 3 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"[]", "damaged header"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "damaged header"),
        (struct.pack("<Q", 4000) + b"[" * 4000, "damaged header"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "damaged header"),
        (struct.pack("<Q", 28) + b'{"a": {"data_offsets":[0,9]}}'[:28], "damaged header"),
        (struct.pack("<Q", 29) + b'{"a": {"data_offsets":[0,9]}}', "outside the file"),
        (struct.pack("<Q", 30) + b'{"a": {"data_offsets":[-9,0]}}', "outside the file"),
    ],
)
def test_a_bad_header_is_refused_and_never_believed(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message):
        fingerprint.of_path(file)


def test_gguf_sees_metadata_contents_and_size(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    body = bytearray(fingerprint.GGUF_HEAD_BYTES + (8 << 20))
    seen = set()
    for change in (None, 100, fingerprint.GGUF_HEAD_BYTES - 1000, len(body) - 5000):
        if change is not None:
            body[change] ^= 0xFF
        write_gguf(file, bytes(body))
        seen.add(fingerprint.of_path(file))
    write_gguf(file, bytes(body) + b"\0")
    seen.add(fingerprint.of_path(file))
    assert len(seen) == 5


def test_small_gguf_and_wrong_magic(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, b"tiny")
    assert fingerprint.of_path(file) == fingerprint.of_path(tmp_path)
    file.write_bytes(b"GGML")
    with pytest.raises(InvalidRequest, match="does not begin"):
        fingerprint.of_path(file)


def test_no_weights_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds no"):
        fingerprint.of_path(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        fingerprint.of_path(tmp_path / "absent.safetensors")
    with pytest.raises(InvalidRequest, match="is not one of"):
        fingerprint.of_path(tmp_path / "pytorch_model.bin")


def test_many_tensors_are_sampled_evenly(tmp_path: Path) -> None:
    header = {
        f"t{i:05}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(9000)
    }
    encoded = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(9000))
    before = fingerprint.of_path(file)
    noticed = 0
    for position in range(6):
        data = bytearray(9000)
        data[position] = 1
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
        noticed += fingerprint.of_path(file) != before
    assert noticed == 2


def bytes_read() -> int:
    """How many bytes this process has asked the kernel for so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar: "):
            return int(line.removeprefix("rchar: "))
    raise AssertionError("/proc/self/io has no rchar")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads by Linux's /proc")
def test_little_is_read_of_gigabytes(tmp_path: Path) -> None:
    header: dict[str, object] = {}
    for index in range(700):
        span = [index * (10 << 20), (index + 1) * (10 << 20)]
        header[f"layers.{index}"] = {"dtype": "BF16", "shape": [5 << 20], "data_offsets": span}
    encoded = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + 700 * (10 << 20))
    before = bytes_read()
    fingerprint.of_path(file)
    assert bytes_read() - before < 4 << 20


def test_samples_of_memory() -> None:
    samples = [Sample("b", "bfloat16", (2, 3), b"12"), Sample("a", "bfloat16", (4,), b"34")]
    same = fingerprint.of_samples(samples)
    assert same == fingerprint.of_samples(reversed(samples))
    assert same.startswith("memory-")
    for other in (
        Sample("b", "bfloat16", (3, 2), b"12"),
        Sample("b", "float16", (2, 3), b"12"),
        Sample("b", "bfloat16", (2, 3), b"13"),
        Sample("c", "bfloat16", (2, 3), b"12"),
    ):
        assert fingerprint.of_samples([other, samples[1]]) != same


def test_sample_positions_cover_the_tensor() -> None:
    assert fingerprint.sample_positions("w", 5) == [0, 1, 2, 3, 4]
    assert fingerprint.sample_positions("w", 0) == []
    positions = fingerprint.sample_positions("w", 1_000_003)
    assert positions == fingerprint.sample_positions("w", 1_000_003)
    assert positions != fingerprint.sample_positions("v", 1_000_003)
    assert positions[0] == 0
    assert positions[-1] == 1_000_002
    assert 62 <= len(positions) <= 66
    assert max(b - a for a, b in itertools.pairwise(positions)) < 2 * 1_000_003 / 60
