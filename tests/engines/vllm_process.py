"""vLLM engines as child processes: started, asked, killed."""

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.sidecar import ROOT, Sidecar, clean_environ

HANG_S = 240.0  # an engine that answers nothing for so long hangs
MOST_LOGPROB_ERROR = 1e-3

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": str(ROOT),
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
ARGUMENTS = {
    "disable_log_stats": False,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 8192,
    "max_num_batched_tokens": 2048,
}


class EngineFailed(Exception):
    """The engine process answered with an error, or not at all; the message has both."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and a cache salt: a text, or a number of bytes."""

    tokens: tuple[int, ...]
    salt: str = ""
    salt_bytes: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def wire(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "salt": self.salt, "salt_bytes": self.salt_bytes}


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens with their logprobs; `cached` counts the prompt's tokens that were not computed."""

    tokens: list[int]
    logprobs: list[float]
    cached: int
    finish: str

    def distance(self, other: "Answer") -> float:
        """The largest difference of a token's logprob; infinite where tokens differ."""
        if self.tokens != other.tokens:
            return float("inf")
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


class Engines:
    """A process that has imported vLLM, and forks engines."""

    def __init__(self, python: Path) -> None:
        self._asking, asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).with_name("vllm_engine.py")
        with asked:
            self._process = subprocess.Popen(
                [str(python), str(script), str(asked.fileno())],
                cwd=ROOT,
                env={**clean_environ(), **ENVIRONMENT},
                pass_fds=[asked.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def fork(self, environment: dict[str, str]) -> tuple[socket.socket, Any]:
        """A new engine process: its socket, and its log as an open file."""
        log = tempfile.TemporaryFile()  # noqa: SIM115 - the engine's for as long as it lives
        control, theirs = socket.socketpair()
        with theirs:
            message = json.dumps(environment).encode()
            socket.send_fds(self._asking, [message], [theirs.fileno(), log.fileno()])
        control.settimeout(HANG_S)
        return control, log

    def close(self) -> None:
        self._asking.close()
        self._process.wait(HANG_S)


class Child:
    """A process forked by `Engines`, and what it is asked. As a context manager it ends with the
    block."""

    def __init__(self, engines: Engines, environment: dict[str, str] | None = None) -> None:
        self._control, self._log = engines.fork(environment or {})
        self._lines = self._control.makefile("rw", encoding="utf-8")
        self._ended = False
        self.pid = int(self._lines.readline())

    def ask(self, command: str, **arguments: Any) -> Any:
        """Have a command carried out and return its result. Raises EngineFailed."""
        self.tell(command, **arguments)
        return self.answer()

    def tell(self, command: str, **arguments: Any) -> None:
        """Send a command; `answer` gets its result."""
        self._lines.write(json.dumps({"do": command, "with": arguments}) + "\n")
        self._lines.flush()

    def answer(self) -> Any:
        try:
            line = self._lines.readline()
        except OSError:
            line = ""
        if not line:
            raise EngineFailed(f"no answer from the engine:\n{self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{answer['error']}\n{self.log}")
        return answer["result"]

    @property
    def log(self) -> str:
        """What it has printed."""
        size = os.fstat(self._log.fileno()).st_size  # its offset is the engine's
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL, to its children too."""
        if not self._ended:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._end()

    def close(self) -> None:
        """End it as a server ends."""
        if not self._ended:
            try:
                self.ask("close")
            except BaseException:
                self.kill()
                raise
            self._end()

    def _end(self) -> None:
        self._ended = True
        with suppress(OSError):
            self._lines.read()  # until the process is gone
        self._lines.close()
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()
        self._log.close()


class Engine(Child):
    """One vLLM."""

    def __init__(
        self,
        engines: Engines,
        model: Path,
        *,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(engines, environment)
        try:
            self.ask("start", arguments={**ARGUMENTS, "model": str(model), **arguments})
        except BaseException:
            self.kill()
            self._log.close()
            raise

    def generate(self, prompts: Sequence[Prompt], max_tokens: int = 4) -> list[Answer]:
        """Greedy answers to prompts that are given at the same time."""
        self.tell_generate(prompts, max_tokens)
        return self.generated()

    def tell_generate(self, prompts: Sequence[Prompt], max_tokens: int = 4) -> None:
        self.tell("generate", prompts=[each.wire for each in prompts], max_tokens=max_tokens)

    def generated(self) -> list[Answer]:
        return [Answer(**each) for each in self.answer()]

    def one(self, prompt: Prompt, max_tokens: int = 4) -> Answer:
        return self.generate([prompt], max_tokens)[0]

    @contextmanager
    def wrong(self, command: str, **arguments: Any) -> Iterator[None]:
        """Within the block, something goes wrong: one of the engine's commands for that."""
        self.ask(command, **arguments)
        yield
        self.ask("go_right")

    def metrics(self) -> Counter[str]:
        """Every counter by its name, or by NAME{source} where it has one."""
        return Counter(self.ask("metrics"))


class Reference:
    """What vLLM alone answers, and prompts to ask it."""

    def __init__(self, engine: Engine, text: list[int]) -> None:
        self._engine = engine
        self._text = text
        self._known: dict[tuple[tuple[int, ...], int], Answer] = {}

    def prompt(self, seed: int, length: int, **salt: Any) -> Prompt:
        """Text of that many tokens. Of the same seed the shorter is a prefix of the longer; those
        of two seeds share no chunk."""
        start = seed * 41 % len(self._text)
        around = self._text[start:] + self._text[:start]
        return Prompt(tuple(around[:length]), **salt)

    def answers(self, prompts: Sequence[Prompt], max_tokens: int = 4) -> list[Answer]:
        wanted = sorted({(each.tokens, max_tokens) for each in prompts} - set(self._known))
        new = self._engine.generate([Prompt(tokens) for tokens, _ in wanted], max_tokens)
        self._known.update(zip(wanted, new, strict=True))
        return [self._known[each.tokens, max_tokens] for each in prompts]

    def check(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        """Assert that answers are those of vLLM alone."""
        expected = self.answers(prompts, len(answers[0].tokens))
        for prompt, answer, right in zip(prompts, answers, expected, strict=True):
            assert answer.tokens == right.tokens, f"a prompt of {len(prompt)} tokens"
            assert answer.distance(right) < MOST_LOGPROB_ERROR, f"a prompt of {len(prompt)} tokens"


def connected_to(target: str, policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    """The argument that makes an engine use a service. By default with so much time for each load
    that a busy machine does not make it a miss."""
    return {
        "kv_transfer_config": {
            "kv_connector": "KvtierConnector",
            "kv_connector_module_path": "kvtier.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"target": target, "deadline_ms": 20_000, **extra},
        }
    }


def emptied(engine: Engine) -> Engine:
    """The engine, connected to its service, with nothing in its own cache: in its blocks are values
    that would ruin any answer."""
    assert engine.ask("reset")
    engine.ask("spoil")
    assert engine.ask("wait_connected")
    return engine


@contextmanager
def storing(sidecar: Sidecar, chunks: int) -> Iterator[None]:
    """Wait at the end until so many chunks were stored in the block, and none is being written."""
    before = sidecar.stats().counters["committed_chunks"]
    yield
    sidecar.until(
        lambda stats: stats.counters["committed_chunks"] - before >= chunks, f"{chunks} are stored"
    )
    after = sidecar.until_idle().counters["committed_chunks"]
    assert after - before == chunks
