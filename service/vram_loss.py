"""What becomes of the VRAM tier when its device is at fault: it goes, and RAM and disk serve."""

import logging
from functools import partial

from kvtier.kernels.device import DeviceFault
from kvtier.service.placement import Placement
from kvtier.service.sessions import Sessions
from kvtier.service.vram import Vram

logger = logging.getLogger(__name__)


def watch(vram: Vram, placement: Placement, sessions: Sessions) -> None:
    """Give the tier up as soon as the bus meets a fault."""
    vram.bus.on_fault = partial(_give_up, placement, sessions)


def _give_up(placement: Placement, sessions: Sessions, fault: DeviceFault) -> None:
    # Sessions first: whoever releases what it read in VRAM is told that it was not held.
    sessions.end_in_vram()
    lost = placement.lose_vram()
    logger.error(
        "gpu: the VRAM tier is given up, %d chunks are lost with it; restart the service to have "
        "it again: %s",
        lost,
        fault,
    )
