"""What policies learn: when they do, and how it outlives the service.

The tables of all tiers lie in one small file beside the disk tier's data. It is replaced as a
whole, and one that is absent, torn, of another version or of another policy means that learning
starts anew: no chunk depends on it.
"""

import asyncio
import logging
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from xxhash import xxh3_64_intdigest as checksum_of

from kvtier.tiers.base import Learner

logger = logging.getLogger(__name__)

FILE = "learned"
_MAGIC = b"kvtier learned 1"
_LENGTHS = struct.Struct("<II")  # of a name, of its table
_CHECKSUM = struct.Struct("<Q")
MOST_BYTES = 512 << 10  # of the file; there are two while it is replaced
_SAVE_EVERY_S = 60.0


class Learning:
    """Lets learners learn between requests. `learners` are by a name that says the tier and the
    policy; without a `directory` nothing is kept."""

    def __init__(
        self,
        learners: Mapping[str, Learner],
        directory: Path | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._learners = learners
        self._path = directory / FILE if directory is not None else None
        self._clock = clock
        self._saved_s = clock()
        self._saving: asyncio.Future[None] | None = None
        self._awaited = False

    def restore(self) -> None:
        """Take over what an earlier run learned."""
        if self._path is None:
            return
        try:
            with self._path.open("rb") as file:
                encoded = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("eviction: what was learned cannot be read: %s", error)
            return
        for name, table in unpack(encoded).items():
            learner = self._learners.get(name)
            if learner is not None and not learner.restore(table):
                logger.warning("eviction: the learned table %s is of another version", name)

    def asked(self) -> None:
        """A request was seen: learn soon, but after it is answered."""
        if not self._awaited and any(learner.due for learner in self._learners.values()):
            self._awaited = True
            asyncio.get_running_loop().call_soon(self._learn)

    def _learn(self) -> None:
        self._awaited = False
        for learner in self._learners.values():
            if learner.due:
                learner.learn()
        if self._path is None or self._clock() - self._saved_s < _SAVE_EVERY_S:
            return
        if self._saving is None or self._saving.done():
            self._saved_s = self._clock()
            encoded = self._packed()
            loop = asyncio.get_running_loop()
            self._saving = loop.run_in_executor(None, self._write, self._path, encoded)

    async def close(self) -> None:
        """Keep what was learned so far."""
        if self._path is None:
            return
        if self._saving is not None:
            await self._saving
        await asyncio.to_thread(self._write, self._path, self._packed())

    def _packed(self) -> bytes:
        return pack({name: learner.dump() for name, learner in self._learners.items()})

    @staticmethod
    def _write(path: Path, encoded: bytes) -> None:
        new = path.with_suffix(".new")
        assert len(encoded) <= MOST_BYTES, "learned tables are bounded"
        try:
            with new.open("wb") as file:
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as error:
            logger.warning("eviction: what was learned cannot be kept: %s", error)


def pack(tables: Mapping[str, bytes]) -> bytes:
    """The content of the file."""
    parts = [_MAGIC]
    for name, table in tables.items():
        encoded = name.encode()
        parts += [_LENGTHS.pack(len(encoded), len(table)), encoded, table]
    body = b"".join(parts)
    return body + _CHECKSUM.pack(checksum_of(body))


def unpack(encoded: bytes) -> dict[str, bytes]:
    """The tables that `pack` was given; none of anything else."""
    body, checksum = encoded[: -_CHECKSUM.size], encoded[-_CHECKSUM.size :]
    sound = len(encoded) <= MOST_BYTES and body.startswith(_MAGIC)
    if not sound or checksum != _CHECKSUM.pack(checksum_of(body)):
        logger.warning("eviction: the file of learned tables is damaged and is ignored")
        return {}
    tables = {}
    at = len(_MAGIC)
    while at + _LENGTHS.size <= len(body):
        name_bytes, table_bytes = _LENGTHS.unpack_from(body, at)
        at += _LENGTHS.size
        name = body[at : at + name_bytes].decode(errors="replace")
        at += name_bytes
        tables[name] = body[at : at + table_bytes]
        at += table_bytes
    return tables
