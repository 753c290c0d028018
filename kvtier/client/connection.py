"""Keeps a session open, in the background, so that no request ever waits for a connection.

While there is no session every operation of the client is a miss that costs nothing. This is the
circuit: repeated failure drops the session, and the background thread opens a new one when the
service answers again, after growing pauses if sessions keep failing.
"""

import logging
import os
import threading
from collections.abc import Callable

from kvtier.client.session import Session, attach
from kvtier.client.transport import SERVICE_FAILURES, Transport
from kvtier.kernels.device import Device, DeviceError
from kvtier.proto import cache_pb2 as pb
from kvtier.spaces import Space

logger = logging.getLogger(__name__)

FAILURES_TO_OPEN = 3
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
_OPEN_TIMEOUT_S = 5.0


class Connection:
    """One client's link to a service; `session` is None while the circuit is open."""

    def __init__(
        self,
        make_transport: Callable[[], Transport],
        space: Space,
        client: str,
        paths: "list[pb.DataPath.ValueType]",
        device: Device | None = None,
    ) -> None:
        self._make_transport = make_transport
        self._client = client
        self._paths = paths
        self._space = space
        self._device = device
        self._session: Session | None = None
        self._ready = threading.Event()
        self._closed = threading.Event()
        self._process = os.getpid()
        self._failures = 0
        self._proven = False  # the present session has answered something
        self._said_absent = False
        self._said_without = False
        self._opening: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="kvtier-session", daemon=True)
        self._thread.start()

    @property
    def session(self) -> Session | None:
        """The open session, or None; None in a process forked from the one that connected."""
        session = self._session
        return None if session is None or session.inherited else session

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until a session is open; False when time ran out."""
        return self._ready.wait(timeout_s)

    def succeeded(self) -> None:
        """The service answered a request."""
        self._failures = 0
        self._proven = True

    def failed(self, session: Session, what: str, error: BaseException) -> None:
        """A request of this session failed. The third in a row, or one that shows the session to be
        over, opens the circuit."""
        self._failures += 1
        over = _says_session_is_over(error)
        if self._failures >= FAILURES_TO_OPEN or over:
            self.drop(session, f"{what}: {describe(error)}")

    def drop(self, session: Session, why: str) -> None:
        """Give a session up: what it leased ends with it."""
        self._forget(session, why)
        session.end()

    def abandon(self, session: Session, why: str) -> None:
        """As `drop`, for callbacks of the transport: there nothing may be closed, for it would wait
        for its own callback. The background thread does the rest."""
        self._forget(session, why)
        session.stream.cancel()

    def _request(self, device: Device | None) -> pb.OpenSessionRequest:
        """Asks for VRAM only with the device that is to reach it."""
        every, ipc = self._paths, pb.DATA_PATH_CUDA_IPC
        paths = [path for path in every if path != ipc or device is not None]
        return pb.OpenSessionRequest(
            client=self._client, space=to_message(self._space), paths=paths
        )

    def _forget(self, session: Session, why: str) -> None:
        if self._session is session:
            self._session = None
            self._ready.clear()
            logger.warning("kvtier: no cache until the service answers again (%s)", why)

    def close(self) -> None:
        """End the session and the background thread."""
        if self._process != os.getpid():
            return  # they are the parent's
        self._closed.set()
        session = self._session
        self._session = None
        if session is not None:
            session.end()
        self._opening()
        self._thread.join(timeout=_OPEN_TIMEOUT_S)

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        refused = False
        while not self._closed.is_set():
            self._proven = False
            device = None if refused else self._device
            refused = False  # the session after one without its device tries it again
            try:
                self._hold_one_session(device)
            except DeviceError as error:
                refused = True
                self._say_without_device(error)
            except SERVICE_FAILURES as error:
                self._say_absent(describe(error))
            pause_s = FIRST_PAUSE_S if self._proven else min(2 * pause_s, LONGEST_PAUSE_S)
            self._closed.wait(pause_s)

    def _say_absent(self, why: str) -> None:
        # Once: it is tried again every few seconds, and losing a session has been said already.
        level = logging.DEBUG if self._said_absent else logging.WARNING
        self._said_absent = True
        logger.log(level, "kvtier: no cache until a service answers (%s)", why)

    def _say_without_device(self, error: DeviceError) -> None:
        level = logging.DEBUG if self._said_without else logging.WARNING
        self._said_without = True
        logger.log(level, "kvtier: goes on without its device: %s", error)

    def _hold_one_session(self, device: Device | None) -> None:
        """Open a session and stay until it ends. Raises DeviceError when the device cannot reach
        its memory."""
        transport = self._make_transport()
        session = None
        request = self._request(device)
        try:
            stream = transport.stream("OpenSession", request, None)
            self._opening = stream.cancel
            if self._closed.is_set():
                stream.cancel()  # `close` may have come too early to see it
            watchdog = threading.Timer(_OPEN_TIMEOUT_S, stream.cancel)
            watchdog.daemon = True
            watchdog.start()
            try:
                event = next(stream)
            finally:
                watchdog.cancel()
            if event.opened.path not in request.paths:
                raise ValueError("the service chose a data path that was not offered")
            session = attach(event.opened, self._space, transport, stream, device)
            self._said_without &= device is None
            self._failures = 0
            self._said_absent = True
            self._session = session
            self._ready.set()
            for _ in stream:
                break  # the service is closing
        except StopIteration:
            pass
        finally:
            if session is not None:
                self.drop(session, "the session ended")
            else:
                transport.close()


def to_message(space: Space) -> pb.Space:
    """A space as the wire carries it."""
    layout = space.layout
    return pb.Space(
        model=space.model,
        weights=space.weights,
        rope=space.rope,
        tenant=space.tenant,
        format_version=space.format_version,
        layout=pb.Layout(
            dtype=layout.dtype,
            layers=layout.layers,
            planes=layout.planes,
            heads=layout.heads,
            head_dim=layout.head_dim,
            tokens=layout.tokens,
            axes=layout.axes,
            rank=layout.rank,
            ranks=layout.ranks,
            encoding=layout.encoding,
        ),
    )


def describe(error: BaseException) -> str:
    """An error in one line: gRPC's own text goes over many."""
    code = getattr(error, "code", None)
    details = getattr(error, "details", None)
    if callable(code) and callable(details):
        return f"{getattr(code(), 'name', code())}: {details()}"
    return f"{type(error).__name__}: {error}"


def _says_session_is_over(error: BaseException) -> bool:
    status = getattr(error, "status", "")
    code = getattr(error, "code", None)
    name = getattr(code(), "name", "") if callable(code) else status
    return name in ("FAILED_PRECONDITION", "UNAVAILABLE")
