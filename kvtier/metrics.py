"""What the service counts. Each counter only grows while the service lives."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Plain integers on the event loop's thread; `Stats` reports them by these names."""

    lookups: int = 0  # Lookup calls
    lookup_chunks: int = 0  # keys asked for
    lookup_hits: int = 0  # of them held, counted as leading run
    loads: int = 0  # Load and Get calls
    load_chunks: int = 0  # keys asked for
    load_vram_hits: int = 0  # chunks answered from VRAM
    load_ram_hits: int = 0  # chunks answered from RAM
    load_disk_hits: int = 0  # chunks promoted from disk and answered
    load_deadlines: int = 0  # calls cut short by their deadline
    reserved_chunks: int = 0  # slots granted for writing
    refused_no_room: int = 0
    refused_parent_missing: int = 0
    refused_lease_limit: int = 0
    committed_chunks: int = 0
    aborted_chunks: int = 0  # reserved and never committed: aborted, or their client died
    evicted_gpu: int = 0
    evicted_cpu: int = 0
    evicted_disk: int = 0
    promoted_chunks: int = 0  # disk to RAM, prefetches included
    raised_chunks: int = 0  # RAM to VRAM
    lowered_chunks: int = 0  # VRAM to RAM
    disk_written_chunks: int = 0
    disk_skipped_chunks: int = 0  # committed in RAM, could not be written to disk
    corrupt_chunks: int = 0  # failed a checksum and were removed
    expired_chunks: int = 0
    sessions_opened: int = 0
    sessions_ended: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def add_evicted(self, tier: str) -> None:
        """Count a replica that a tier gave up; tiers are "gpu", "cpu" and "disk"."""
        name = f"evicted_{tier}"
        setattr(self, name, getattr(self, name) + 1)

    def add_aborted(self, chunks: int) -> None:
        """Count chunks that a session left uncommitted."""
        self.aborted_chunks += chunks
