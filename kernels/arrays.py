"""Where other libraries' arrays lie, without a copy and without importing any of them."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from kvtier.errors import InvalidRequest

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType of DLPack
_KNOWN_DEVICES = (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED)
_NO_SYNC = -1  # to __dlpack__: the consumer orders its own work
_MOST_AXES = 64


class _DLTensor(ctypes.Structure):
    """As dlpack.h of DLPack 0.6 to 1.1 has it; a DLManagedTensor begins with one."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Array:
    """Where an array's elements are: address, extents, strides in bytes, bytes of an element."""

    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, source: Any) -> Self:
        """An array, or what a tensor or an object with an array interface says of itself.

        Looks for `data_ptr`, `shape`, `stride` and `element_size` as PyTorch's tensors of any dtype
        have them, then `__cuda_array_interface__`, `__array_interface__` and `__dlpack__`. Raises
        InvalidRequest for anything else. Does not keep the memory alive, and waits for no work.
        """
        if isinstance(source, Array):
            return cls(source.address, source.shape, source.strides_bytes, source.itemsize)
        if hasattr(source, "data_ptr"):
            size = int(source.element_size())
            strides = tuple(int(step) * size for step in source.stride())
            return cls(int(source.data_ptr()), tuple(source.shape), strides, size)
        for name in ("__cuda_array_interface__", "__array_interface__"):
            if hasattr(source, name):
                return cls._of_interface(getattr(source, name))
        if hasattr(source, "__dlpack__"):
            return cls._of_dlpack(source)
        raise InvalidRequest(
            f"array: a {type(source).__name__} tells no address and strides; "
            "give a tensor or an object with an array interface or DLPack"
        )

    @classmethod
    def _of_interface(cls, interface: dict[str, Any]) -> Self:
        shape = tuple(interface["shape"])
        size = int(interface["typestr"][2:])
        strides = interface.get("strides") or _contiguous(shape, size)
        return cls(int(interface["data"][0]), shape, tuple(strides), size)

    @classmethod
    def _of_dlpack(cls, source: Any) -> Self:
        kind, _ = source.__dlpack_device__()
        if kind not in _KNOWN_DEVICES:
            raise InvalidRequest(f"array: DLPack device type {int(kind)} given, CUDA's is {_CUDA}")
        capsule = source.__dlpack__(**({"stream": _NO_SYNC} if kind == _CUDA else {}))
        # The capsule is not renamed, so it stays its own to give back.
        tensor = _DLTensor.from_address(_pointer_in(capsule, b"dltensor"))
        if tensor.bits % 8 or tensor.lanes != 1 or not 0 < tensor.ndim <= _MOST_AXES:
            raise InvalidRequest(
                f"array: {tensor.ndim} axes of {tensor.bits} bits times {tensor.lanes} given; "
                "elements must be whole bytes, one at a time"
            )
        size = tensor.bits // 8
        shape = tuple(tensor.shape[: tensor.ndim])
        if tensor.strides:
            strides = tuple(step * size for step in tensor.strides[: tensor.ndim])
        else:
            strides = _contiguous(shape, size)
        return cls((tensor.data or 0) + tensor.byte_offset, shape, strides, size)

    def split(self, axis: int, outer: int) -> Self:
        """The same elements with one axis, counted from 0, cut into `outer` times the rest.

        For keys and values side by side: 2 * dim becomes plane, dim. Raises InvalidRequest when
        the extent is no multiple of `outer`.
        """
        if outer < 1 or self.shape[axis] % outer:
            raise InvalidRequest(f"array: {self.shape[axis]} cannot be split into {outer}")
        inner, step = self.shape[axis] // outer, self.strides_bytes[axis]
        shape, strides = list(self.shape), list(self.strides_bytes)
        shape[axis : axis + 1] = [outer, inner]
        strides[axis : axis + 1] = [inner * step, step]
        return type(self)(self.address, tuple(shape), tuple(strides), self.itemsize)


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))


def _pointer_in(capsule: object, name: bytes) -> int:
    """What a PyCapsule of that name holds. Raises InvalidRequest for any other object."""
    pythonapi = ctypes.pythonapi
    signature = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    get: Callable[[object, bytes], int] = signature(("PyCapsule_GetPointer", pythonapi))
    try:
        return get(capsule, name)
    except ValueError as error:
        raise InvalidRequest(f"array: DLPack: {error}") from None
