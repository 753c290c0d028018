"""Who is connected: sessions, and when what they leased may be taken back."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import LimitReached, SessionEnded
from kvtier.service.leases import Leases
from kvtier.service.pace import Pace
from kvtier.tiers.index import Index
from kvtier.tiers.tree import Branch
from kvtier.transfer.paths.shm import Tether

SESSION_ID_BYTES = 16
# Chunks of ended leases given back in one turn of the loop, each in some 5 microseconds.
_MOST_AT_ONCE = 512
_TETHER_RETRY_S = 0.05
_TETHER_WATCH_S = 1.0


@dataclass(slots=True, eq=False)
class Session:
    """One client's connection to one space. `tether` is None on the inline path; `in_vram`: it also
    reaches the VRAM tier."""

    id: bytes
    client: str
    branch: Branch
    leases: Leases
    tether: Tether | None
    closing: asyncio.Event
    in_vram: bool = False


class Sessions:
    """All sessions of the service. `on_discard` is told how many chunks were discarded with
    leases."""

    def __init__(
        self, index: Index, limit: int, arena_path: Path, on_discard: Callable[[int], None]
    ) -> None:
        self._index = index
        self._limit = limit
        self._arena_path = arena_path
        self._on_discard = on_discard
        self._sessions: dict[bytes, Session] = {}
        # Connections that broke while their process still lives and may be copying.
        self._lingering: dict[bytes, Session] = {}
        self._giving_back: set[asyncio.Task[None]] = set()
        self._reaper: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session: Session) -> bool:
        """Whether a session is open."""
        return session.id in self._sessions

    @property
    def leases(self) -> int:
        """Leases of all sessions, lingering ones included."""
        everyone = (*self._sessions.values(), *self._lingering.values())
        return sum(len(session.leases) for session in everyone)

    def open(
        self, client: str, branch: Branch, *, tethered: bool, in_vram: bool = False
    ) -> Session:
        """A new session; `tethered` when the client will map the arena.

        Raises LimitReached when limits.sessions are open.
        """
        if len(self._sessions) + len(self._lingering) >= self._limit:
            raise LimitReached(f"limits.sessions: {self._limit} are open; close one or raise it")
        session_id = secrets.token_bytes(SESSION_ID_BYTES)
        tether = None
        if tethered:
            tether = Tether(Path(f"{self._arena_path}.{session_id.hex()}"))
            if self._watcher is None or self._watcher.done():
                self._watcher = asyncio.create_task(self._watch(), name="kvtier-tethers")
        leases = Leases(self._index)
        session = Session(session_id, client, branch, leases, tether, asyncio.Event(), in_vram)
        self._sessions[session_id] = session
        return session

    def get(self, session_id: bytes) -> Session:
        """The open session of that id. Raises SessionEnded."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionEnded("session_id: unknown or over; open a new session")
        if session.tether is not None and not session.tether.was_held:
            session.tether.is_released()  # notes that it is held
        return session

    @property
    def branches(self) -> set[Branch]:
        """The spaces that sessions are connected to."""
        everyone = (*self._sessions.values(), *self._lingering.values())
        return {session.branch for session in everyone}

    def end(self, session: Session) -> None:
        """End a session. Its leases end now, or when its process has let go of the arena."""
        if self._sessions.pop(session.id, None) is None:
            return
        if session.tether is None or session.tether.is_released():
            self._bury(session)
            return
        self._lingering[session.id] = session
        if self._reaper is None or self._reaper.done():
            self._reaper = asyncio.create_task(self._reap(), name="kvtier-reaper")

    def end_in_vram(self) -> None:
        """End the sessions that reach VRAM: what they read there may not be right any more, and
        releasing it is to say so."""
        for session in [each for each in self._sessions.values() if each.in_vram]:
            session.closing.set()
            self.end(session)

    def announce_stop(self) -> None:
        """Ask every client to go."""
        for session in self._sessions.values():
            session.closing.set()

    async def close(self) -> None:
        """End everything; the arena is about to go, so nobody is waited for."""
        for task in (self._reaper, self._watcher):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for session in (*self._sessions.values(), *self._lingering.values()):
            self._bury(session)
        self._sessions.clear()
        self._lingering.clear()
        await asyncio.gather(*self._giving_back)

    async def _reap(self) -> None:
        while self._lingering:
            await asyncio.sleep(_TETHER_RETRY_S)
            for session in list(self._lingering.values()):
                if session.tether is None or session.tether.is_released():
                    del self._lingering[session.id]
                    self._bury(session)

    async def _watch(self) -> None:
        """End the sessions of clients that died without their connection breaking: a process that
        they forked has inherited it."""
        while self._sessions:
            await asyncio.sleep(_TETHER_WATCH_S)
            for session in self._sessions.values():
                tether = session.tether
                if tether is not None and tether.was_held and tether.is_released():
                    session.closing.set()

    def _bury(self, session: Session) -> None:
        session.leases.end_all()
        self.give_back(session.leases)
        if session.tether is not None:
            session.tether.close()

    def give_back(self, leases: Leases) -> None:
        """Give back what ended leases had: some now, the rest while others have turns."""
        self._give_back(leases)
        if not leases.given_back:
            task = asyncio.create_task(self._give_back_rest(leases), name="kvtier-leases")
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)

    def _give_back(self, leases: Leases) -> None:
        self._on_discard(leases.give_back(_MOST_AT_ONCE))

    async def _give_back_rest(self, leases: Leases) -> None:
        pace = Pace(1)
        while not leases.given_back:
            await pace.stepped()
            self._give_back(leases)
