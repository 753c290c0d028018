"""What a crash costs is told: over the wire, after kill -9, by a service that started again."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvtier.chunks import Prefix
from kvtier.client import Client, KeyState
from kvtier.service.journal import RECORD_BYTES
from tests.sidecar import Sidecar, load, offload, prompt_of, space_of, until

# RAM has room for all, so nothing is written before a stop.
LATE = "disk.write=demote"


def states(client: Client, prefix: Prefix) -> list[KeyState]:
    return [answer.state for answer in client.explain(prefix)]


def until_noted(sidecar: Sidecar, prefix: Prefix, times: int = 1) -> None:
    """Wait until the journal has so many records of each chunk."""

    def noted() -> bool:
        path = sidecar.disk / "journal"
        content = path.read_bytes() if path.exists() else b""
        return all(content.count(key) >= times for key in prefix)

    until(noted, "the chunks are in the journal")


def killed_after(sidecar: Sidecar, prompts: Sequence[list[int]]) -> None:
    """Store prompts, kill the service once it has noted them, and start it again."""
    client = sidecar.client()
    prefixes = [client.prefix(prompt) for prompt in prompts]
    for prefix in prefixes:
        assert len(offload(client, prefix).stored) == len(prefix)
        until_noted(sidecar, prefix)
    sidecar.kill()
    sidecar.start()


def test_what_was_in_ram_alone_is_told_after_a_crash(tmp_path: Path) -> None:
    with Sidecar(tmp_path, LATE) as sidecar:
        killed_after(sidecar, [prompt_of(1, 5)])
        client = sidecar.client()
        prefix = client.prefix(prompt_of(1, 6))
        assert states(client, prefix) == [KeyState.LOST_IN_CRASH] * 5 + [KeyState.NEVER_STORED]
        detail = client.explain(prefix)[0].detail
        assert "not on disk yet when the service ended: disk.write = demote" in detail
        assert load(client, prefix) == 0
        offload(client, prefix)
        assert states(client, prefix) == [KeyState.RAM] * 6


def test_a_second_crash_forgets_nothing(tmp_path: Path) -> None:
    with Sidecar(tmp_path, LATE) as sidecar:
        killed_after(sidecar, [prompt_of(1, 3)])
        killed_after(sidecar, [prompt_of(2, 3)])
        client = sidecar.client()
        for seed in (1, 2):
            prefix = client.prefix(prompt_of(seed, 3))
            assert states(client, prefix) == [KeyState.LOST_IN_CRASH] * 3


def test_what_was_on_disk_is_a_hit_and_what_was_removed_is_not_lost(tmp_path: Path) -> None:
    with Sidecar(tmp_path) as sidecar:
        client = sidecar.client()
        kept, removed = (client.prefix(prompt_of(seed, 4)) for seed in (1, 2))
        offload(client, kept)
        offload(client, removed)
        sidecar.until_idle()
        assert client.evict(removed[1:2]) == 3
        until_noted(sidecar, removed[1:], times=2)
        sidecar.kill()
        sidecar.start()
        client = sidecar.client()
        assert states(client, kept) == [KeyState.DISK] * 4
        told = client.explain(removed)
        # The removal itself may not have been durable when the service died.
        assert {answer.state for answer in told[1:]} <= {KeyState.EVICTED, KeyState.DISK}
        assert load(client, kept) == 4


def test_another_space_is_told_nothing(tmp_path: Path) -> None:
    with Sidecar(tmp_path, LATE) as sidecar:
        killed_after(sidecar, [prompt_of(1, 3)])
        ours = sidecar.client()
        other = sidecar.client(space_of(tenant="another"))
        lost, unheard = (ours.prefix(prompt_of(seed, 3)) for seed in (1, 2))
        assert states(ours, lost) == [KeyState.LOST_IN_CRASH] * 3
        assert other.explain(lost) == other.explain(unheard)


def test_a_clean_stop_leaves_no_journal(tmp_path: Path) -> None:
    with Sidecar(tmp_path, LATE) as sidecar:
        client = sidecar.client()
        prefix = client.prefix(prompt_of(1, 4))
        offload(client, prefix)
        until_noted(sidecar, prefix)
        assert sidecar.terminate() == 0
        assert not list(sidecar.disk.glob("journal*"))
        sidecar.start()
        client = sidecar.client()
        assert states(client, prefix) == [KeyState.DISK] * 4


def test_a_stop_that_does_not_write_everything_is_told_too(tmp_path: Path) -> None:
    """`second_touch` writes nothing at a stop that was asked for once."""
    with Sidecar(tmp_path, "disk.write=second_touch") as sidecar:
        client = sidecar.client()
        prefix = client.prefix(prompt_of(1, 4))
        offload(client, prefix)
        assert sidecar.terminate() == 0
        sidecar.start()
        client = sidecar.client()
        assert states(client, prefix) == [KeyState.LOST_IN_CRASH] * 4
        assert "disk.write = second_touch" in client.explain(prefix)[0].detail


def test_without_a_disk_tier_nothing_is_known(tmp_path: Path) -> None:
    with Sidecar(tmp_path, disk=False) as sidecar:
        client = sidecar.client()
        prefix = client.prefix(prompt_of(1, 2))
        offload(client, prefix)
        sidecar.kill()
        sidecar.start()
        client = sidecar.client()
        assert states(client, prefix) == [KeyState.NEVER_STORED] * 2


@pytest.mark.parametrize("damage", ["absent", "torn", "noise", "a folder", "a pipe", "too long"])
def test_a_damaged_journal_costs_answers_and_nothing_else(tmp_path: Path, damage: str) -> None:
    with Sidecar(tmp_path, LATE) as sidecar:
        client = sidecar.client()
        prefix = client.prefix(prompt_of(1, 3))
        offload(client, prefix)
        until_noted(sidecar, prefix)
        sidecar.kill()
        path = sidecar.disk / "journal"
        found = path.read_bytes()
        path.unlink()
        if damage == "torn":
            path.write_bytes(found[: 2 * RECORD_BYTES + 9])
        elif damage == "noise":
            path.write_bytes(os.urandom(7 * RECORD_BYTES + 5))
        elif damage == "a folder":
            path.mkdir()
        elif damage == "a pipe":
            os.mkfifo(path)
        elif damage == "too long":
            path.write_bytes(found)
            os.truncate(path, 1 << 40)
        sidecar.start()
        client = sidecar.client()
        known = 2 if damage == "torn" else 0
        expected = [KeyState.LOST_IN_CRASH] * known + [KeyState.NEVER_STORED] * (3 - known)
        assert states(client, prefix) == expected
        assert len(offload(client, prefix).stored) == 3
        assert load(client, prefix) == 3
        if damage in {"torn", "noise"}:  # it goes on behind what was whole
            until_noted(sidecar, prefix)
            until_noted(sidecar, prefix[:known], times=2)
            sidecar.kill()
            assert (path.stat().st_size % RECORD_BYTES) == 0
            sidecar.start()
            assert states(sidecar.client(), prefix) == [KeyState.LOST_IN_CRASH] * 3
        if damage == "a pipe":
            assert sidecar.terminate() == 0
            assert sum("journal: given up" in line for line in sidecar.log) == 1
