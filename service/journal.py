"""What RAM alone has, on disk: so that after a crash `Explain` can say what it cost.

Two files of records in the disk tier's directory: chunks that were committed to RAM, and chunks
that were given up since. Records are written in batches, a moment after the fact and on a thread,
and never synced: they outlive the process, not the machine. When one file is full it replaces the
older one. Nothing depends on them: what is torn or damaged is not believed, and where they cannot
be written there is no journal. docs/formats.md has the bytes.
"""

import asyncio
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest as checksum_of

from kvtier.chunks import KEY_BYTES, ChunkKey
from kvtier.service.history import LOSSES, SPACE_BYTES, History, Loss, Why, whole_seconds
from kvtier.tiers.index import Index
from kvtier.tiers.tree import Node

logger = logging.getLogger(__name__)

COMMITTED = 0  # the code of a chunk that was committed; the others are those of `Loss`
RECORDS_PER_FILE = 65_536
_BODY = Struct(f"<{SPACE_BYTES}s{KEY_BYTES}sIB3x")
_CHECKSUM = Struct("<Q")
RECORD_BYTES = _BODY.size + _CHECKSUM.size
FILE_BYTES = RECORDS_PER_FILE * RECORD_BYTES
_NAMES = ("journal", "journal.older")
# Whatever lies there under the name: no link is followed and nobody is waited for.
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What a crash can leave untold, and how seldom the thread is woken.
_DELAY_S = 0.02


class Entry(NamedTuple):
    """One record: `space` is the beginning of a digest, `when_s` whole seconds since the epoch."""

    space: bytes
    key: ChunkKey
    when_s: int
    code: int


class Journal:
    """The journal of one directory, which must be this process's own: two files of at most
    `file_bytes`. Its methods belong to the event loop's thread."""

    def __init__(
        self, directory: Path, clock: Callable[[], float], file_bytes: int = FILE_BYTES
    ) -> None:
        self._clock = clock
        self._most_bytes = file_bytes - file_bytes % RECORD_BYTES
        self._newer, self._older = (directory / name for name in _NAMES)
        self._pending = bytearray()
        self._writer = ThreadPoolExecutor(1, "kvtier-journal")
        self._writing: asyncio.Task[None] | None = None
        self._file: int | None = None  # the writer's, and the next one
        self._file_bytes = 0
        self._given_up = False

    def read(self) -> Iterator[Entry]:
        """What earlier runs wrote, oldest first; to be read before anything is added."""
        for path in (self._older, self._newer):
            for packed in _records_of(path):
                space, key, when_s, code = _BODY.unpack(packed)
                yield Entry(space, ChunkKey(key), when_s, code)

    def stored(self, nodes: Sequence[Node]) -> None:
        """Chunks were committed to RAM."""
        for node in nodes:
            self._add(node, COMMITTED)

    def gone(self, node: Node, loss: Loss) -> None:
        """No tier has a chunk any more."""
        self._add(node, loss.code)

    def _add(self, node: Node, code: int) -> None:
        """Note a chunk; it is written in a moment."""
        if self._given_up:
            return
        body = _BODY.pack(node.branch.digest, node.key, whole_seconds(self._clock()), code)
        self._pending += body + _CHECKSUM.pack(checksum_of(body))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_soon(), name="kvtier-journal")
        elif len(self._pending) > 2 * self._most_bytes:  # all went at once, or the disk is slow
            del self._pending[:RECORD_BYTES]  # it would not be in the files for long

    async def close(self, *, keep: bool) -> None:
        """Stop; with `keep` everything is written first, else the journal goes: nothing was
        lost."""
        if self._writing is not None:
            await self._writing
        if not keep:
            self._given_up = True
            await self._run(self._remove)
        await self._run(self._close_file)
        self._writer.shutdown()

    async def _write_soon(self) -> None:
        await asyncio.sleep(_DELAY_S)
        while self._pending and not self._given_up:
            batch, self._pending = self._pending, bytearray()
            try:
                await self._run(self._write, batch)
            except OSError as error:
                self._give_up(str(error))
        self._writing = None

    def _give_up(self, reason: str) -> None:
        """Go on without: a journal with gaps would tell wrong things."""
        if not self._given_up:
            logger.warning(
                "journal: given up, so Explain will not know what a crash costs: %s", reason
            )
        self._given_up = True
        self._pending.clear()
        self._writer.submit(self._remove)

    # ── the thread ────────────────────────────────────────────────────────────────────────────────

    async def _run(self, work: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, work, *args)

    def _write(self, batch: bytearray) -> None:
        rest = memoryview(batch)
        while rest:
            if self._file is None:
                self._open_file()
            if self._file_bytes >= self._most_bytes:
                self._close_file()
                self._newer.replace(self._older)
                continue
            assert self._file is not None
            written = os.write(self._file, rest[: self._most_bytes - self._file_bytes])
            self._file_bytes += written
            rest = rest[written:]

    def _open_file(self) -> None:
        """Go on behind what is whole of the newer file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _SAFELY
        self._file = os.open(self._newer, flags, 0o600)
        found = os.fstat(self._file).st_size
        self._file_bytes = found - found % RECORD_BYTES
        os.ftruncate(self._file, self._file_bytes)

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _remove(self) -> None:
        self._close_file()
        for path in (self._newer, self._older):
            with suppress(OSError):
                path.unlink()


def recall(journal: Journal, history: History, index: Index) -> None:
    """Tell a new history what earlier runs wrote. What was committed and is not in the index that
    was brought back from disk, was lost when the service died."""
    branches = {space.digest[:SPACE_BYTES]: index.branch(space) for space in index.spaces}
    losses = {**LOSSES, COMMITTED: Loss(Why.CRASH)}
    for space, key, when_s, code in journal.read():
        branch, loss = branches.get(space), losses.get(code)
        node = branch.nodes.get(key) if branch is not None else None
        if loss is not None and not (node is not None and node.held):
            history.note(space, key, loss, when_s)


def _records_of(path: Path) -> Iterator[bytes]:
    """The bodies of a file's sound records; none of a file that cannot be one of ours."""
    try:
        fd = os.open(path, os.O_RDONLY | _SAFELY)
    except OSError:
        return
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > FILE_BYTES:
            return
        content = os.pread(fd, FILE_BYTES, 0)
    except OSError:
        return
    finally:
        os.close(fd)
    for start in range(0, len(content) - RECORD_BYTES + 1, RECORD_BYTES):
        body = content[start : start + _BODY.size]
        if (checksum_of(body),) == _CHECKSUM.unpack_from(content, start + _BODY.size):
            yield body
