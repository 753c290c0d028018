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
    load_partial_tokens: int = 0  # tokens answered of chunks that a prompt leaves half-way
    load_deadlines: int = 0  # calls cut short by their deadline
    reserved_chunks: int = 0  # slots granted for writing
    refused_no_room: int = 0  # everything else was leased
    refused_not_worth: int = 0  # the policy valued everything else higher
    refused_quota: int = 0  # their tenant held all it may
    refused_parent_missing: int = 0
    refused_lease_limit: int = 0
    unverified_tokens: int = 0  # chunks whose offered tokens do not make their key
    committed_chunks: int = 0
    aborted_chunks: int = 0  # reserved and never committed: aborted, or their client died
    evicted_gpu: int = 0
    evicted_cpu: int = 0
    evicted_disk: int = 0
    promoted_chunks: int = 0  # disk to RAM, prefetches included
    prefetched_chunks: int = 0  # disk to RAM, begun before a load asked: Prefetch and read-ahead
    prefetch_used_chunks: int = 0  # of them, those that a load asked for then
    prefetch_cancelled_chunks: int = 0  # of them, those given up: their asker went, or made way
    raised_chunks: int = 0  # RAM to VRAM
    lowered_chunks: int = 0  # VRAM to RAM
    disk_written_chunks: int = 0
    disk_written_bytes_commit: int = 0  # because they were committed (disk.write = write_through)
    disk_written_bytes_demotion: int = 0  # because RAM is about to give them up
    disk_written_bytes_second_touch: int = 0  # because they were asked for again
    disk_written_bytes_stop: int = 0  # because the service stops
    disk_skipped_chunks: int = 0  # to be written to disk, and could not be
    corrupt_chunks: int = 0  # failed a checksum and were removed
    expired_chunks: int = 0
    clamped_hints: int = 0  # values of hints, and times to live of pins, that were out of range
    pins_made: int = 0
    pins_expired: int = 0
    pins_cut: int = 0  # Pin calls that kept less than is held, for a bound on pins
    sessions_opened: int = 0
    sessions_ended: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def add_hit(self, tier: str) -> None:
        """Count a chunk that a load was answered; tiers are "vram", "ram" and "disk"."""
        name = f"load_{tier}_hits"
        setattr(self, name, getattr(self, name) + 1)

    def add_evicted(self, tier: str) -> None:
        """Count a replica that a tier gave up; tiers are "gpu", "cpu" and "disk"."""
        name = f"evicted_{tier}"
        setattr(self, name, getattr(self, name) + 1)

    def add_written(self, cause: str, nbytes: int) -> None:
        """Count a chunk that is on disk now, with the bytes it takes there; causes are "commit",
        "demotion", "second_touch" and "stop"."""
        name = f"disk_written_bytes_{cause}"
        setattr(self, name, getattr(self, name) + nbytes)
        self.disk_written_chunks += 1

    def add_refused(self, reason: str) -> None:
        """Count a chunk that was offered and not taken; reasons are "no_room", "not_worth",
        "quota", "parent_missing" and "lease_limit"."""
        name = f"refused_{reason}"
        setattr(self, name, getattr(self, name) + 1)

    def add_aborted(self, chunks: int) -> None:
        """Count chunks that a session left uncommitted."""
        self.aborted_chunks += chunks
