"""The journal: what is written is read again, whatever happens to it, and it does not grow."""

import asyncio
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.service import journal as module
from kvtier.service.history import SPACE_BYTES, History, Loss, Why
from kvtier.service.journal import COMMITTED, FILE_BYTES, RECORD_BYTES, Journal, recall
from kvtier.tiers.tree import Node, TierId
from tests.core import Harness, harness

EVICTED = Loss(Why.ROOM, TierId.DISK)


def nodes_of(h: Harness, chunks: int, seed: int = 0) -> list[Node]:
    """Chunks that are held in RAM."""
    session = h.session()
    prefix = h.chain_of(session, chunks, seed)
    h.put(session, prefix)
    return [session.branch.nodes[key] for key in prefix]


async def written(
    directory: Path, nodes: list[Node], *, gone: int = 0, file_bytes: int = FILE_BYTES
) -> None:
    """A run that commits chunks, loses some of them and dies."""
    journal = Journal(directory, lambda: 7.5, file_bytes)
    journal.stored(nodes)
    for node in nodes[:gone]:
        journal.gone(node, EVICTED)
    await journal.close(keep=True)


def sizes(directory: Path) -> list[int]:
    """Of the journal's files, in bytes."""
    return [path.stat().st_size for path in directory.glob("journal*")]


async def test_what_was_written_is_read_in_order(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        nodes = nodes_of(h, 3)
        await written(tmp_path, nodes, gone=1)
        entries = list(Journal(tmp_path, lambda: 0.0).read())
        assert [entry.key for entry in entries] == [node.key for node in [*nodes, nodes[0]]]
        assert [entry.code for entry in entries] == [COMMITTED] * 3 + [EVICTED.code]
        assert {entry.space for entry in entries} == {nodes[0].branch.digest[:SPACE_BYTES]}
        assert {entry.when_s for entry in entries} == {7}
        assert (tmp_path / "journal").stat().st_size == 4 * RECORD_BYTES


async def test_only_what_is_not_held_is_recalled_as_lost(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        nodes = nodes_of(h, 2) + nodes_of(h, 3, seed=1)
        await written(tmp_path, nodes, gone=3)  # two of one prompt, and the first of the other
        h.placement.lose(nodes[0], Why.REMOVED)
        history = History(100)
        recall(Journal(tmp_path, lambda: 0.0), history, h.placement.index)
        digest = nodes[0].branch.digest
        found = [history.find(digest, node.key) for node in nodes]
        assert [lost and lost.loss for lost in found] == [EVICTED, EVICTED, None, None, None]
        h.placement.lose(nodes[2], Why.REMOVED)
        later = History(100)
        recall(Journal(tmp_path, lambda: 0.0), later, h.placement.index)
        whys = [lost.loss.why for node in nodes if (lost := later.find(digest, node.key))]
        assert whys == [Why.ROOM] * 3 + [Why.CRASH] * 2


async def test_a_clean_end_takes_it_away(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        nodes = nodes_of(h, 2)
        await written(tmp_path, nodes)
        journal = Journal(tmp_path, lambda: 1.0)
        journal.stored(nodes)
        await journal.close(keep=False)
        assert sizes(tmp_path) == []


async def test_it_is_bounded(tmp_path: Path) -> None:
    """Two files of four records: of eleven, the last seven are known."""
    file_bytes = 4 * RECORD_BYTES + 5
    async with harness(tmp_path) as h:
        nodes = nodes_of(h, 11)
        for node in nodes:
            await written(tmp_path, [node], file_bytes=file_bytes)
        assert sum(sizes(tmp_path)) == 7 * RECORD_BYTES
        known = [entry.key for entry in Journal(tmp_path, lambda: 0.0).read()]
        assert known == [node.key for node in nodes[4:]]
        await written(tmp_path, nodes, file_bytes=file_bytes)  # more in a batch than both hold
        known = [entry.key for entry in Journal(tmp_path, lambda: 0.0).read()]
        assert known == [node.key for node in nodes[-len(known) :]]
        assert 4 <= len(known) <= 8


async def test_what_waits_to_be_written_is_bounded(tmp_path: Path) -> None:
    """More in one go than may wait: the oldest are left out."""
    async with harness(tmp_path) as h:
        nodes = nodes_of(h, 11)
        await written(tmp_path, nodes, file_bytes=2 * RECORD_BYTES)
        known = [entry.key for entry in Journal(tmp_path, lambda: 0.0).read()]
        assert known == [node.key for node in nodes[7:]]


@settings(max_examples=25)
@given(data=st.data())
def test_damage_costs_the_records_it_hits(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere and with bytes flipped, what is read is what was written, without what was hit;
    and what is added afterwards is read."""
    directory = tmp_path_factory.mktemp("journal")

    async def play() -> None:
        async with harness(directory) as h:
            nodes = nodes_of(h, 6)
            await written(directory, nodes[:5])
            path = directory / "journal"
            content = bytearray(path.read_bytes())
            cut = data.draw(st.integers(0, len(content)))
            hit = data.draw(st.sets(st.integers(0, len(content) - 1), max_size=3))
            for at in hit:
                content[at] ^= data.draw(st.integers(1, 255))
            path.write_bytes(content[:cut])
            spoilt = {at // RECORD_BYTES for at in hit}
            whole = [nodes[i].key for i in range(cut // RECORD_BYTES) if i not in spoilt]
            assert [entry.key for entry in Journal(directory, lambda: 0.0).read()] == whole
            await written(directory, nodes[5:])
            after = [entry.key for entry in Journal(directory, lambda: 0.0).read()]
            assert after == [*whole, nodes[5].key]

    asyncio.run(play())


async def test_a_full_disk_ends_it_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with harness(tmp_path) as h:
        nodes = nodes_of(h, 3)
        await written(tmp_path, nodes[:1])
        journal = Journal(tmp_path, lambda: 1.0)

        def full(fd: int, content: memoryview) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(module.os, "write", full)
        journal.stored(nodes[1:2])
        await journal.close(keep=True)
        journal.stored(nodes[2:])
        monkeypatch.undo()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "No space left" in caplog.text
        assert sizes(tmp_path) == [], "with gaps it would tell wrong things"
