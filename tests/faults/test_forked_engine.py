"""An engine that forks: the child has no cache, harms none, and waits for nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sidecar import HANG_S, ROOT, Sidecar, clean_environ

# The parent stores a prompt, forks while it reads it, and goes on when the child has ended.
ENGINE = """
import os, sys
from kvtier.client import connect
from tests.sidecar import *

client = connect(sys.argv[1], space_of(), deadline_s=HANG_S, path=sys.argv[2])
assert client.wait_ready(HANG_S)
prefix, other = client.prefix(prompt_of(1, 20)), client.prefix(prompt_of(2, 20))
assert len(offload(client, prefix).stored) == 20
with client.load(prefix) as loaded:
    chunks = iter(loaded)
    first = next(chunks)
    child = os.fork()
    if child == 0:
        assert not client.connected
        assert client.lookup(prefix) == load(client, prefix) == client.prefetch(prefix) == 0
        assert len(offload(client, other).refused) == 20
        assert client.explain(prefix) == [] and client.stats() is None
        client.close()
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert client.connected
        rest = list(chunks)
        assert len(rest) == 19
        for chunk in (first, *rest):
            assert bytes(chunk.data) == content_of(prefix[chunk.index], chunk.data.nbytes)
        assert sys.argv[2] == "inline" or client.stats().leases == 1
if child == 0:
    os._exit(7)  # it has left the block
assert len(offload(client, other).stored) == 20
assert load(client, other) == load(client, prefix) == 20
client.close()
"""

EMBEDDED = """
import os, kvtier
from tests.sidecar import *

client = kvtier.open(space_of(), cpu="16MiB", deadline_s=HANG_S)
prefix = client.prefix(prompt_of(1, 20))
assert len(offload(client, prefix).stored) == 20
child = os.fork()
if child == 0:
    assert client.lookup(prefix) == load(client, prefix) == 0
    client.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert load(client, prefix) == 20
client.close()
"""


def run(script: str, *arguments: str) -> None:
    """Run a script in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=clean_environ(),
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("path", ["shm", "inline"])
def test_a_fork_in_the_middle_of_a_load(tmp_path: Path, path: str) -> None:
    with Sidecar(tmp_path) as sidecar:
        run(ENGINE, sidecar.target, path)
        sidecar.until(lambda stats: (stats.sessions, stats.leases) == (0, 0), "all is given back")


def test_a_fork_of_an_engine_with_the_cache_inside() -> None:
    run(EMBEDDED)
