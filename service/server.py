"""The process: binds the address, serves until it is told to stop, and leaves nothing behind."""

import asyncio
import fcntl
import gc
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import (
    aio as aio_health,  # pyright: ignore[reportAttributeAccessIssue]
)
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from kvtier.config import Config
from kvtier.errors import AlreadyRunning, ConfigError
from kvtier.kernels.allocator import keep_freed_memory
from kvtier.proto.cache_pb2_grpc import add_CacheServicer_to_server
from kvtier.service.build import Core, Progress, build
from kvtier.service.collection import IdleCollection
from kvtier.service.servicer import SERVICE, Servicer, inline_handlers
from kvtier.service.status import ErrorStatus

logger = logging.getLogger(__name__)

# Calls under way get this long to end by themselves when the service stops.
_STOP_GRACE_S = 1.0
_BASE_MESSAGE_BYTES = 4 << 20


@dataclass(slots=True)
class SocketLock:
    """Says who owns a unix socket's path. The kernel drops it when the owner dies, so a socket
    whose lock is free is stale."""

    path: Path
    fd: int

    @classmethod
    def take(cls, socket: Path) -> Self:
        """Own the path and clear it. Raises AlreadyRunning when a live service does, ConfigError
        when its directory cannot be used."""
        path = socket.with_name(socket.name + ".lock")
        try:
            socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            while (fd := _lock(path)) is None:
                pass
        except BlockingIOError:
            raise AlreadyRunning(
                f"server.listen: another live service owns unix://{socket}"
            ) from None
        except OSError as error:
            raise ConfigError(f"server.listen: {socket.parent} cannot be used: {error}") from None
        if socket.exists() and not socket.is_socket():
            path.unlink()
            os.close(fd)
            raise ConfigError(f"server.listen: {socket} exists and is not a socket")
        socket.unlink(missing_ok=True)
        return cls(path, fd)

    def release(self, socket: Path) -> None:
        """Remove the socket and the lock."""
        socket.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        os.close(self.fd)


def _lock(path: Path) -> int | None:
    """The locked file's descriptor; None when its owner removed it meanwhile, so that the lock is
    of a file that nobody else will find. Raises BlockingIOError when it is owned."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(path.stat(), os.fstat(fd)):
            return fd
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


async def serve(config: Config, progress: Progress, on_ready: Callable[[], None]) -> bool:
    """Run the service until SIGTERM or SIGINT. `on_ready` is called once it answers.

    Returns False when it stopped before all of RAM was written to disk. Raises ConfigError or
    AlreadyRunning when it cannot start.
    """
    keep_freed_memory()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    socket = _socket_of(config.server.listen)
    lock = SocketLock.take(socket) if socket is not None else None
    try:
        core = build(config, progress)
        gc.freeze()  # what was built stays as long as the service: it need not be looked at again
        collection = IdleCollection(core.cache.placement.counters.as_dict)
        collection.start()
        try:
            return await _serve_until(stop, config, core, socket, on_ready)
        finally:
            collection.close()
    finally:
        if lock is not None and socket is not None:
            lock.release(socket)


async def _serve_until(
    stop: asyncio.Event,
    config: Config,
    core: Core,
    socket: Path | None,
    on_ready: Callable[[], None],
) -> bool:
    try:
        server, health = await _start(config, core, socket)
    except BaseException:
        await core.stop()
        raise
    on_ready()
    await stop.wait()
    return await _stop(core, server, health)


async def _start(
    config: Config, core: Core, socket: Path | None
) -> tuple[aio.Server, aio_health.HealthServicer]:
    limit = _BASE_MESSAGE_BYTES + 48 * config.limits.keys_per_request
    server = aio.server(
        interceptors=[ErrorStatus()],
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", limit)],
    )
    health = aio_health.HealthServicer()
    add_HealthServicer_to_server(health, server)
    servicer = Servicer(core.cache, core.explainer, core.curves)
    server.add_generic_rpc_handlers((inline_handlers(servicer),))
    add_CacheServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)
    _bind(server, config.server.listen, socket)
    core.start()
    await server.start()
    for name in ("", SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server, health


def _bind(server: aio.Server, listen: str, socket: Path | None) -> None:
    try:
        server.add_insecure_port(f"unix:{socket}" if socket is not None else listen)
    except RuntimeError as error:
        raise AlreadyRunning(
            f"server.listen: {listen} cannot be bound, another program may use it: {error}"
        ) from None
    if socket is not None:
        socket.chmod(0o600)  # whoever may connect may read and write the arena


async def _stop(core: Core, server: aio.Server, health: aio_health.HealthServicer) -> bool:
    await health.enter_graceful_shutdown()
    core.cache.announce_stop()
    await server.stop(_STOP_GRACE_S)
    flushed = await core.stop()
    if not flushed:
        logger.warning("stopped before all chunks were on disk; raise server.shutdown_flush_s")
    return flushed


def _socket_of(listen: str) -> Path | None:
    return Path(listen.removeprefix("unix://")) if listen.startswith("unix://") else None
