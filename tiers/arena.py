"""How one tier's addressable memory is cut into slots: offsets only, no bytes.

Slots of one size are cut from slabs, so that allocation is O(1) and slots of one size never
fragment. A slab whose last slot is freed goes back to the common pool at once, where neighbours
merge: that is how memory moves between layouts. A slab is sized to whole slots, so a single layout
wastes less than one slot of the arena.
"""

from bisect import insort
from dataclasses import dataclass, field

SLOT_ALIGN = 4096
# A slab is about 1/32 of the arena, at most this much: enough slots to amortise, small enough to
# move.
SLAB_BYTES_MAX = 256 << 20


@dataclass(slots=True, eq=False)
class Slab:
    """A run of equal slots; `free` holds the offsets of those not in use."""

    offset: int
    slot_bytes: int
    slots: int
    free: list[int] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.slot_bytes * self.slots

    @property
    def used(self) -> int:
        return self.slots - len(self.free)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A place for one chunk; `nbytes` is the chunk's size, which may be less than the slot's."""

    offset: int
    nbytes: int
    slab: Slab

    @property
    def number(self) -> int:
        """Which of its slab's slots it is, from 0."""
        return (self.offset - self.slab.offset) // self.slab.slot_bytes


class Arena:
    """Allocates slots out of `nbytes` of memory."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes - nbytes % SLOT_ALIGN
        self.used_bytes = 0  # in slots handed out, alignment included
        self._gaps: list[tuple[int, int]] = [(0, self.nbytes)] if self.nbytes else []
        # Per slot size, the slabs that have a free slot. A dict keeps them in the order of arrival.
        self._open: dict[int, dict[Slab, None]] = {}

    def allocate(self, nbytes: int) -> Slot | None:
        """A slot of at least `nbytes`, or None when there is neither a free slot nor a free
        slab."""
        slot_bytes = slot_bytes_of(nbytes)
        open_slabs = self._open.setdefault(slot_bytes, {})
        if not open_slabs:
            slab = self._cut_slab(slot_bytes)
            if slab is None:
                return None
            open_slabs[slab] = None
        slab = next(iter(open_slabs))
        offset = slab.free.pop()
        if not slab.free:
            del open_slabs[slab]
        self.used_bytes += slot_bytes
        return Slot(offset, nbytes, slab)

    def free(self, slot: Slot) -> None:
        """Give a slot back. The caller frees each slot once."""
        slab = slot.slab
        slab.free.append(slot.offset)
        self.used_bytes -= slab.slot_bytes
        open_slabs = self._open[slab.slot_bytes]
        if slab.used:
            open_slabs[slab] = None
            return
        open_slabs.pop(slab, None)
        self._give_back(slab.offset, slab.nbytes)

    def could_fit(self, nbytes: int) -> bool:
        """Whether an empty arena had room for one such slot."""
        return slot_bytes_of(nbytes) <= self.nbytes

    def _cut_slab(self, slot_bytes: int) -> Slab | None:
        target = min(self.nbytes // 32, SLAB_BYTES_MAX)
        slots = max(1, target // slot_bytes)
        best = max(self._gaps, key=lambda gap: gap[1], default=(0, 0))
        for start, length in self._gaps:  # first fit keeps the far end whole
            if length >= slots * slot_bytes:
                best = (start, length)
                break
        slots = min(slots, best[1] // slot_bytes)
        if slots == 0:
            return None
        start, length = best
        self._gaps.remove(best)
        taken = slots * slot_bytes
        if length > taken:
            insort(self._gaps, (start + taken, length - taken))
        offsets = [start + index * slot_bytes for index in reversed(range(slots))]
        return Slab(start, slot_bytes, slots, offsets)

    def _give_back(self, start: int, length: int) -> None:
        insort(self._gaps, (start, length))
        merged: list[tuple[int, int]] = []
        for gap in self._gaps:
            if merged and sum(merged[-1]) == gap[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + gap[1])
            else:
                merged.append(gap)
        self._gaps = merged


def slot_bytes_of(nbytes: int) -> int:
    """Bytes that a chunk of `nbytes` takes of an arena."""
    return -(-nbytes // SLOT_ALIGN) * SLOT_ALIGN
