"""A device that refuses now and then."""

import random
from collections.abc import Sequence

from kvtier.kernels.device import DeviceError, Span, Stream
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos


class MoodyDevice(HostDevice):
    """While `failing`, half of its copies are refused, half of those when a part was begun."""

    def __init__(self, seed: int) -> None:
        super().__init__(Chaos(seed), memory_bytes=1 << 22)
        self.failing = False
        self._moods = random.Random(seed)

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        mood = self._moods.randrange(4) if self.failing else 0
        if mood == 1:
            super().copy(stream, pairs[:1])
        if mood in (1, 2):
            raise DeviceError("not in the mood")
        super().copy(stream, pairs)
