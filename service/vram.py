"""The VRAM tier: one allocation on the device, cut in slots, and the way between it and RAM."""

import logging
from dataclasses import dataclass, field

from kvtier.kernels.device import HANDLE_BYTES, Device, DeviceError, Region, Span
from kvtier.tiers.arena import Arena, Slot
from kvtier.transfer.bus import Bus

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Vram:
    """The tier's bytes and how they are cut. `ram` is the arena in host memory, registered with the
    device; `handle` lets processes on the same device open the region."""

    device: Device
    region: Region
    ram: Region
    bus: Bus
    arena: Arena = field(init=False)
    handle: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.arena = Arena(self.region.nbytes)
        self.handle = self.device.export(self.region)
        assert len(self.handle) == HANDLE_BYTES

    @property
    def lost(self) -> bool:
        """Whether the device is at fault: nothing can be read or written any more."""
        return self.bus.fault is not None

    def span(self, slot: Slot) -> Span:
        """A slot of this tier."""
        return self.region.span(slot.offset, slot.nbytes)

    def ram_span(self, slot: Slot) -> Span:
        """A slot of the arena in host memory."""
        return self.ram.span(slot.offset, slot.nbytes)

    async def close(self) -> None:
        """Stop the copies and give all memory back; nobody may use it any more."""
        await self.bus.close()
        for region in (self.ram, self.region):
            try:
                self.device.release(region)
            except DeviceError as error:
                if not self.lost:  # else its memory goes with the process
                    logger.warning("gpu: %s", error)
        self.device.close()
