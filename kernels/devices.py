"""Devices by name."""

from kvtier.errors import InvalidRequest
from kvtier.kernels.device import Device


def open_device(name: str) -> Device:
    """The device of that name: "cuda:N" for the Nth GPU, "host" for none.

    What a kind of device needs is imported once one is opened. Raises InvalidRequest for any other
    name, DeviceError when the device cannot be used.
    """
    kind, _, index = name.partition(":")
    if name == "host":
        from kvtier.kernels.host import HostDevice  # noqa: PLC0415

        return HostDevice()
    if kind == "cuda" and index.isascii() and index.isdigit():
        from kvtier.kernels.cuda import CudaDevice  # noqa: PLC0415

        return CudaDevice(int(index))
    raise InvalidRequest(f'device: {name!r} given; name one such as "cuda:0", or "host"')
