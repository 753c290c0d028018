"""Arrays of other libraries are found where they lie: by any of their interfaces, of any dtype."""

import ctypes
import struct
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from kvtier.errors import InvalidRequest
from kvtier.kernels.arrays import Array


def tensor(array: NDArray[Any]) -> Any:
    return SimpleNamespace(
        shape=array.shape,
        data_ptr=lambda: array.ctypes.data,
        stride=lambda: tuple(step // array.itemsize for step in array.strides),
        element_size=lambda: array.itemsize,
    )


def on_device(array: NDArray[Any]) -> Any:
    return SimpleNamespace(__cuda_array_interface__=array.__array_interface__)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("form", [tensor, on_device, Array.of])
def test_every_kind_of_array_is_understood(form: Callable[..., Any], step: int) -> None:
    array = np.zeros((4, 6, 3), np.float32)[:, ::step]
    wanted = Array(array.ctypes.data, array.shape, array.strides, 4)
    assert Array.of(form(array)) == Array.of(array) == wanted


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="a list tells no address"):
        Array.of([1, 2, 3])


class OnlyDLPack:
    """What a library gives that has no other interface; notes how it was asked."""

    def __init__(self, array: Any, kind: int | None = None) -> None:
        self._array = array
        self._kind = kind
        self.asked: list[dict[str, Any]] = []

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked.append(asked)
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self._array.__dlpack_device__()[0] if self._kind is None else self._kind, 0)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_dlpack_says_what_the_array_does(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.uint8, np.float16, np.float32, np.int64, np.complex128]))
    shape = data.draw(hnp.array_shapes(max_dims=6, max_side=5))
    array = np.zeros(shape, dtype)
    view = array.transpose(data.draw(st.permutations(range(array.ndim))))
    view = view[data.draw(hnp.basic_indices(view.shape, allow_newaxis=False, min_dims=1))]
    if not isinstance(view, np.ndarray) or not view.size:
        return
    found = Array.of(OnlyDLPack(view))
    assert (found.address, found.shape) == (view.ctypes.data, view.shape)
    assert found.itemsize == view.itemsize
    told = zip(found.shape, found.strides_bytes, view.strides, strict=True)
    assert all(one == other for extent, one, other in told if extent > 1)


def test_on_a_gpu_dlpack_waits_for_no_stream() -> None:
    """-1 is how the array API says it; None would have the legacy default stream wait."""
    array = np.zeros(4)
    on_cpu, on_gpu = OnlyDLPack(array), OnlyDLPack(array, kind=2)
    assert Array.of(on_cpu) == Array.of(on_gpu)
    assert (on_cpu.asked, on_gpu.asked) == ([{}], [{"stream": -1}])


def test_what_was_asked_of_dlpack_is_given_back() -> None:
    array = np.zeros(4)
    before = sys.getrefcount(array)
    for _ in range(10):
        Array.of(OnlyDLPack(array))
    assert sys.getrefcount(array) == before


def test_dlpack_may_begin_behind_its_data_and_leave_strides_out() -> None:
    array = np.zeros(64, np.uint8)
    shape = (ctypes.c_int64 * 2)(3, 4)
    tensor = struct.pack(
        "<QiiiBBHQQQ", array.ctypes.data, 1, 0, 2, 2, 16, 1, ctypes.addressof(shape), 0, 16
    )  # data, device, axes, bfloat-sized elements, shape, no strides, byte_offset
    memory = ctypes.create_string_buffer(tensor, len(tensor))
    types = ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    new = ctypes.PYFUNCTYPE(*types)(("PyCapsule_New", ctypes.pythonapi))
    capsule = new(ctypes.addressof(memory), b"dltensor", None)
    given = SimpleNamespace(__dlpack__=lambda: capsule, __dlpack_device__=lambda: (1, 0))
    assert Array.of(given) == Array(array.ctypes.data + 16, (3, 4), (8, 2), 2)


def test_dlpack_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="DLPack device type 10 given, CUDA's is 2"):
        Array.of(OnlyDLPack(np.zeros(4), kind=10))
    with pytest.raises(InvalidRequest, match="DLPack: "):
        Array.of(SimpleNamespace(__dlpack__=lambda: 7, __dlpack_device__=lambda: (1, 0)))
    with pytest.raises(InvalidRequest, match="0 axes of 64 bits"):
        Array.of(OnlyDLPack(np.zeros(())))


def test_torch_tensors_are_found_by_whatever_they_offer() -> None:
    torch = pytest.importorskip("torch")
    whole = torch.zeros((3, 4, 2, 8), dtype=torch.bfloat16)
    tensor = whole.permute(1, 0, 2, 3)[1:]
    found = Array.of(tensor)
    assert found == Array.of(OnlyDLPack(tensor))
    assert found == Array.of(tensor.view(torch.int16).numpy())
    assert found.address == tensor.data_ptr()
    assert (found.itemsize, found.strides_bytes) == (2, (32, 128, 16, 2))
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.float32, torch.uint8):
        assert Array.of(torch.zeros((2, 3), dtype=dtype)).itemsize == dtype.itemsize


def test_no_library_is_imported_for_it() -> None:
    program = (
        "import sys, kvtier.client, kvtier.kernels.paged, kvtier.kernels.cuda\n"
        "assert not {'torch', 'cupy', 'jax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
