"""Every error that kvtier raises.

    KvtierError
    ├── ConfigError        a setting is unknown, malformed or out of range; the service does not sta
    │   └── AlreadyRunning another live service owns the socket, directory or arena
    ├── InvalidRequest     a request breaks the protocol's limits; nothing was changed
    ├── SessionEnded       the session is unknown or over; open a new one
    ├── LimitReached       a configured limit is used up; release something or try later
    └── ServiceStopping    the service is shutting down

A miss, a busy slot, no room and a corrupt chunk are not errors: they are outcomes, returned as
values. The client raises `InvalidRequest` for its caller's own mistakes only; whatever the service
does, its operations return a shorter prefix instead.

`status` is the name of the gRPC status code that carries the error over the wire.
"""

from typing import ClassVar


class KvtierError(Exception):
    """Base of all errors raised by kvtier."""

    status: ClassVar[str] = "INTERNAL"


class ConfigError(KvtierError):
    """A setting is unknown, malformed or out of range; the message names it and what is allowed."""

    status = "INVALID_ARGUMENT"


class AlreadyRunning(ConfigError):
    """Another live service owns what this one was told to use; the message names it."""


class InvalidRequest(KvtierError):
    """A request breaks a limit of the protocol; the message names the field, value and limit."""

    status = "INVALID_ARGUMENT"


class SessionEnded(KvtierError):
    """The named session is unknown or over; the remedy is to open a new one."""

    status = "FAILED_PRECONDITION"


class LimitReached(KvtierError):
    """A configured limit is used up; the message names the limit and its setting."""

    status = "RESOURCE_EXHAUSTED"


class ServiceStopping(KvtierError):
    """The service is shutting down and takes no new work."""

    status = "UNAVAILABLE"
