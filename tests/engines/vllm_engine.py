"""Engine processes for tests, run by the interpreter that has vLLM: `python vllm_engine.py FD`.

This process only imports vLLM, which takes longer than all else, and then forks one engine for each
start that is asked for on the socket FD. Each engine has a socket of its own, on which it answers
one JSON line to each JSON line: see `Engine` for the commands. What it prints goes to its log.
"""
# ruff: noqa: PLC0415 - the engine is imported before the first fork, and by nothing else

import dataclasses
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

HANG_S = 60.0
Change = Callable[[Iterator[Any]], Iterator[Any]]


class Engine:
    """One vLLM. Each public method is a command; arguments and results are JSON."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.events: list[dict[str, Any]] = []

    def save_model(self, kind: str, folder: str) -> None:
        """Write a tiny model: see tiny_models.py."""
        from tests.engines.tiny_models import save

        save(kind, folder)

    def start(self, arguments: dict[str, Any]) -> None:
        """Build the engine."""
        from vllm import LLM

        self.llm = LLM(**arguments)

    def encode(self, text: str) -> list[int]:
        """A text's token ids."""
        return list(self.llm.get_tokenizer().encode(text))

    def generate(self, prompts: list[dict[str, Any]], max_tokens: int) -> list[dict[str, Any]]:
        """Greedy answers to prompts of token ids, all at once. `salt_bytes` stands for a salt of
        that many bytes."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, logprobs=0, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt["tokens"], **_salted(prompt)} for prompt in prompts]
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [
                    next(iter(each.values())).logprob for each in output.outputs[0].logprobs
                ],
                "cached": output.num_cached_tokens or 0,
                "finish": output.outputs[0].finish_reason,
            }
            for output in outputs
        ]

    def reset(self, connector: bool = False) -> bool:
        """Empty the engine's own prefix cache."""
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def metrics(self) -> dict[str, float]:
        """Every counter by its name, or by NAME{source} where it has one."""
        found = {}
        for metric in self.llm.get_metrics():
            source = metric.labels.get("source")
            name = f"{metric.name}{{{source}}}" if source else metric.name
            found[name] = getattr(metric, "value", 0)
        return found

    def wait_connected(self) -> bool:
        """Wait until every client of the connector is connected."""
        return all(client.wait_ready(HANG_S) for client in self._clients())

    def connected(self) -> bool:
        """Whether any client of the connector is connected."""
        return any(client.connected for client in self._clients())

    def spaces(self) -> list[dict[str, Any]]:
        """The spaces of the connector's chunks."""
        clients = self._scheduler().connector._lookups._clients.values()
        return [json.loads(client.space.to_json()) for client in clients]

    def settle(self) -> bool:
        """Wait until what was given to the connector to be stored is stored, or given up."""
        offloader = self._working()._offloader
        with offloader._state:
            return bool(
                offloader._state.wait_for(lambda: offloader._done >= offloader._submitted, HANG_S)
            )

    # ── what goes wrong from now on, until `go_right` ──

    def withhold(self, keep: int) -> None:
        """The service hands out at most `keep` chunks of each prefix, whatever it says to hold."""
        self._change_loads(lambda chunks: _first(chunks, keep))

    def corrupt(self) -> None:
        """Each loaded chunk has the content of none: it is all zeros."""
        self._change_loads(_zeros)

    def signal_at_load(self, pid: int, number: int) -> None:
        """A process gets a signal when chunks are fetched, after it was asked what it holds."""

        def change(chunks: Iterator[Any]) -> Iterator[Any]:
            os.kill(pid, number)
            yield from chunks

        self._change_loads(change)

    def lose(self, keep: int, part: int | None = None) -> None:
        """At most `keep` chunks of each load get into blocks, of those that vLLM counts on; of all
        parts or of one."""
        parts = self._stored()

        def cut(stored: Any, chunks: Sequence[Any]) -> Sequence[Any]:
            return chunks[:keep] if part is None or stored is parts[part] else chunks

        self._change_copies(cut)

    def signal_at_copy(self, pid: int, number: int) -> None:
        """A process gets a signal when chunks are to be copied into blocks."""

        def kill(stored: Any, chunks: Sequence[Any]) -> Sequence[Any]:
            os.kill(pid, number)
            return chunks

        self._change_copies(kill)

    def go_right(self) -> None:
        """All is again as it is."""
        for stored in self._stored():
            vars(stored.client).pop("load", None)
        for loader in self._loaders():
            vars(loader).pop("_scatter", None)

    # ── what is kept ──

    def spoil(self) -> None:
        """Fill every block with nonsense, once nothing is to be copied out of one. For an engine
        whose prefix cache is empty."""
        self.generate([{"tokens": [3]}], max_tokens=2)  # what ended requests have left goes along
        assert self.settle(), "chunks are still being copied out of blocks"
        torch = importlib.import_module("torch")
        for stored in self._stored():
            for band in stored.pages.bands:
                for cache in band.caches:
                    cache.view(torch.uint8).fill_(0x42)  # 48.5 in bfloat16 and in float32

    def watch(self) -> None:
        """From now on keep the KV events that the scheduler publishes."""
        engine = self

        class Keeping:
            def publish(self, batch: Any) -> None:
                engine.events += [_plain(event) for event in batch.events]

            def shutdown(self) -> None:
                pass

        self._scheduler().kv_event_publisher = Keeping()

    def take_events(self) -> list[dict[str, Any]]:
        """The events kept since the last call."""
        taken, self.events = self.events, []
        return taken

    def close(self) -> None:
        """End the engine as a server does."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()

    def _scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def _working(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._working

    def _stored(self) -> list[Any]:
        return list(self._working()._parts)

    def _loaders(self) -> list[Any]:
        return [self._working()._loader, self._working()._background._loader]

    def _clients(self) -> list[Any]:
        return [*self._scheduler().connector._clients, *(each.client for each in self._stored())]

    def _change_loads(self, change: Change) -> None:
        for stored in self._stored():
            stored.client.load = _changed(stored.client.load, change)

    def _change_copies(self, change: Callable[[Any, Sequence[Any]], Sequence[Any]]) -> None:
        for loader in self._loaders():
            loader._scatter = _copying(loader._scatter, change)


class _Load:
    """A load whose chunks are changed on their way."""

    def __init__(self, loaded: Any, change: Change) -> None:
        self._loaded = loaded
        self._change = change

    def __enter__(self) -> Self:
        self._loaded.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._loaded.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return self._change(iter(self._loaded))


def _changed(load: Callable[..., Any], change: Change) -> Callable[..., _Load]:
    return lambda *arguments: _Load(load(*arguments), change)


def _copying(
    scatter: Callable[..., int], change: Callable[[Any, Sequence[Any]], Sequence[Any]]
) -> Callable[..., int]:
    return lambda stored, run, order, chunks, way: scatter(
        stored, run, order, change(stored, chunks), way
    )


def _first(chunks: Iterator[Any], count: int) -> Iterator[Any]:
    for chunk in chunks:
        if chunk.index >= count:
            return
        yield chunk


def _zeros(chunks: Iterator[Any]) -> Iterator[Any]:
    for chunk in chunks:
        yield dataclasses.replace(chunk, data=memoryview(bytes(chunk.data.nbytes)))


def _salted(prompt: dict[str, Any]) -> dict[str, str]:
    nbytes = prompt.get("salt_bytes", 0)
    salt = prompt.get("salt") or "s" * nbytes
    return {"cache_salt": salt} if salt else {}


def _plain(event: Any) -> dict[str, Any]:
    fields = {name: getattr(event, name, None) for name in event.__struct_fields__}
    return {
        "kind": type(event).__name__,
        **{name: _jsonable(value) for name, value in fields.items()},
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    return value if isinstance(value, int | float | str | None) else str(value)


# ── processes ─────────────────────────────────────────────────────────────────────────────────────


def serve(control: socket.socket) -> None:
    """Carry out commands until the test has gone or closes the engine; ends the process."""
    engine = Engine()
    try:
        with control.makefile("rw", encoding="utf-8") as lines:
            for line in lines:
                request = json.loads(line)
                lines.write(json.dumps(answer(engine, request)) + "\n")
                lines.flush()
                if request["do"] == "close":
                    break
    finally:
        os.killpg(0, signal.SIGKILL)  # itself, and what it may have left


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """A command's result, or its error."""
    try:
        return {"result": getattr(engine, request["do"])(**request["with"])}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the answer
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def fork_engines(asked: socket.socket) -> None:
    """Fork an engine for each message: its environment as JSON, its socket and its log."""
    for name in ("vllm", "vllm.v1.worker.cpu_worker", "kvtier.connectors.vllm.connector"):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 16, 2)
        if not message:
            return
        control, log = descriptors
        if os.fork() == 0:
            os.setpgid(0, 0)  # so that it can be killed with its own children
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asked.close()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            os.environ.update(json.loads(message))
            own = socket.socket(fileno=control)
            own.sendall(f"{os.getpid()}\n".encode())
            serve(own)
        os.close(control)
        os.close(log)


if __name__ == "__main__":
    fork_engines(socket.socket(fileno=int(sys.argv[1])))
