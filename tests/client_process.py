"""A client in a process of its own, to be killed, stopped and cut off. Its commands and answers are
lines of JSON: `python -m tests.client_process TARGET PATH`."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

from kvtier.proto import cache_pb2 as pb
from tests.sidecar import HANG_S, ROOT, clean_environ
from tests.wire.own_client import OwnClient, piece_of

WRITE = pb.RESERVE_STATUS_WRITE


class ClientProcess:
    """The parent's end. A context manager; the process is killed at the end at the latest."""

    def __init__(self, target: str, path: str = "shm") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.client_process", target, path],
            cwd=ROOT,
            env=clean_environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def tell(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the client process has ended"
        return json.loads(line)

    def ask(self, command: str, **arguments: Any) -> Any:
        """Have the client do something; returns what came of it."""
        self.tell(command, **arguments)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(HANG_S)


class _Child:
    """The child's end: a method for each command."""

    def __init__(self, target: str, path: str) -> None:
        paths = {"shm": pb.DATA_PATH_SHM, "inline": pb.DATA_PATH_INLINE}
        self.client = OwnClient(target, path=paths[path])
        self.reserved: dict[int, dict[bytes, int]] = {}
        self.loaded: dict[bytes, int] = {}

    def ready(self) -> bool:
        """It is connected, or this would not be answered."""
        return True

    def reserve(self, seed: int, chunks: int) -> list[int]:
        """Statuses of a prompt's chunks, reserved under the seed as lease id."""
        keys = self.client.keys(seed, chunks)
        answers = self.client.reserve(seed, keys)
        self.reserved[seed] = {
            key: answer.offset
            for key, answer in zip(keys, answers, strict=True)
            if answer.status == WRITE
        }
        return [answer.status for answer in answers]

    def fill(self, seed: int, share: float) -> bool:
        """Write the first part of each reserved slot."""
        for key, offset in self.reserved[seed].items():
            chunk = self.client.content(key)
            self.client.fill(offset, chunk[: int(share * len(chunk))])
        return True

    def scribble(self, seed: int) -> bool:
        """Write nonsense over the reserved slots."""
        for offset in self.reserved[seed].values():
            self.client.fill(offset, b"\xee" * self.client.nbytes)
        return True

    def commit(self, seed: int) -> list[int]:
        return [status for _, status in self.client.commit(seed, range(len(self.reserved[seed])))]

    def store(self, seed: int, chunks: int) -> int:
        return self.client.store(self.client.keys(seed, chunks))

    def store_for_ever(self, seed: int, chunks: int) -> Iterator[int]:
        """Store prompt after prompt; answers with the seed of each that is done."""
        while True:
            self.client.store(self.client.keys(seed, chunks))
            yield seed
            seed += 1

    def load(self, seed: int, chunks: int) -> int:
        """Lease a prompt for reading, for as long as the process lives."""
        keys = self.client.keys(seed, chunks)
        offsets, _ = self.client.load(seed, keys)
        self.loaded.update({keys[index]: offset for index, offset in offsets.items()})
        return len(offsets)

    def check(self) -> bool:
        """Whether all slots leased for reading still have the right bytes."""
        return all(
            self.client.slot(offset) == self.client.content(key)
            for key, offset in self.loaded.items()
        )

    def begin_put(self, seed: int, chunks: int) -> bool:
        """Send the first chunk of a reserved prompt and half of the second, and stay there."""
        self.reserve(seed, chunks)
        keys = self.client.keys(seed, chunks)
        sent = threading.Event()

        def messages() -> Iterator[pb.PutRequest]:
            yield from self.client.pieces(seed, {0: self.client.content(keys[0])})
            yield piece_of(1, self.client.content(keys[1])[:2000])
            sent.set()
            threading.Event().wait()

        threading.Thread(target=lambda: self.client.put(messages()), daemon=True).start()
        return sent.wait(HANG_S)

    def disconnect(self) -> bool:
        """Cut the connection; arena and tether stay."""
        self.client.disconnect()
        return True

    def let_tether_go(self) -> bool:
        self.client.let_tether_go()
        return True

    def fork(self) -> int:
        """Leave a child behind that does nothing; returns its id."""
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        return child


def _main(target: str, path: str) -> None:
    child = _Child(target, path)
    for line in sys.stdin:
        command, arguments = json.loads(line)
        answer = getattr(child, command)(**arguments)
        for each in answer if isinstance(answer, Iterator) else [answer]:
            print(json.dumps(each), flush=True)  # noqa: T201 - the answer to the parent


if __name__ == "__main__":
    _main(*sys.argv[1:])
