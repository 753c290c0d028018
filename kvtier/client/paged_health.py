"""What an engine knows of its device's faults."""

import logging

from kvtier.kernels.device import DeviceError, DeviceFault

logger = logging.getLogger(__name__)


class Health:
    """Whether an engine's device may still be asked: not after its first `fault`. For any
    thread."""

    def __init__(self) -> None:
        self.fault: DeviceFault | None = None
        self._said = ""

    def note(self, what: str, error: DeviceError) -> None:
        """Say what an error of the device has cost: of faults the first, of others each that is not
        the last one again."""
        if not isinstance(error, DeviceFault):
            said, self._said = self._said, f"{what}: {error}"
            level = logging.DEBUG if said == self._said else logging.WARNING
            logger.log(level, "kvtier: %s", self._said)
        elif self.fault is None:
            self.fault = error
            logger.error("kvtier: %s, and so it stays: the device is at fault: %s", what, error)
