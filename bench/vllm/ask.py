"""Asking an OpenAI server on this host: a streamed answer, with the time of its first token."""

import http.client
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.errors import KvtierError

HOST = "127.0.0.1"
MODEL = "model"
_TIMEOUT_S = 300.0  # for the server to send the next bytes
_SHOWN_BYTES = 500
_END = "[DONE]"

Event = dict[str, Any]


class EngineFailed(KvtierError):
    """The engine did not start, or did not answer as it should; the message says what it said."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer. `cached_tokens` are those of the prompt that were not computed."""

    token_ids: tuple[int, ...]
    text: str
    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int


def complete(port: int, prompt: Sequence[int], max_tokens: int) -> Answer:
    """The answer to a prompt of exactly these token ids. Raises EngineFailed."""
    return _ask(port, "/v1/completions", {"prompt": list(prompt), "max_tokens": max_tokens})


def chat(port: int, messages: Sequence[dict[str, str]], max_tokens: int) -> Answer:
    """The answer to a conversation. Raises EngineFailed."""
    body = {"messages": list(messages), "max_tokens": max_tokens}
    return _ask(port, "/v1/chat/completions", body)


def counter(port: int, name: str) -> int:
    """A counter of the server's metrics, over all its labels. Raises EngineFailed."""
    try:
        with _Reply(port, "GET", "/metrics") as reply:
            text = reply.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise EngineFailed(f"vLLM gave no metrics: {error!r}") from None
    return total(text, name)


def is_ready(port: int) -> bool:
    """Whether the server serves."""
    try:
        with _Reply(port, "GET", "/health") as reply:
            return reply.status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def total(metrics: str, name: str) -> int:
    """The sum of a metric's samples in the text format of Prometheus; 0 where there is none."""
    found = 0.0
    for line in metrics.splitlines():
        if line.startswith((f"{name} ", f"{name}{{")):
            found += float(line.rpartition(" ")[2])
    return int(found)


def events(lines: Iterable[bytes]) -> Iterator[Event]:
    """The JSON documents of a stream of server-sent events, each as soon as it is whole."""
    data: list[str] = []
    for raw in lines:
        line = raw.decode().rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text == _END:
                return
            yield _parsed(text)
    raise EngineFailed("vLLM ended its answer in the middle")


def collect(
    stream: Iterable[Event], started_s: float, clock: Callable[[], float] = time.perf_counter
) -> Answer:
    """Put a streamed answer together. Raises EngineFailed where something is missing."""
    token_ids: list[int] = []
    text: list[str] = []
    first_s: float | None = None
    usage: Event | None = None
    for event in stream:
        if "error" in event:
            raise EngineFailed(f"vLLM broke off its answer: {_short(json.dumps(event['error']))}")
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids") or ()
            if ids and first_s is None:
                first_s = clock()
            token_ids += ids
            text.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
        usage = event.get("usage") or usage
    if first_s is None or usage is None:
        raise EngineFailed(f"vLLM gave an answer without {'tokens' if usage else 'its usage'}")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        token_ids=tuple(token_ids),
        text="".join(text),
        ttft_ms=1000 * (first_s - started_s),
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
    )


class _Reply:
    """One request on a connection of its own; inside the `with` block, its response."""

    def __init__(self, port: int, method: str, path: str, body: Event | None = None) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=_TIMEOUT_S)
        self._request = (method, path, json.dumps(body) if body is not None else None)

    def __enter__(self) -> http.client.HTTPResponse:
        try:
            self._connection.request(*self._request, headers={"Content-Type": "application/json"})
            return self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _ask(port: int, path: str, what: Event) -> Answer:
    body = {
        **what,
        "model": MODEL,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    started_s = time.perf_counter()
    try:
        with _Reply(port, "POST", path, body) as reply:
            if reply.status != http.HTTPStatus.OK:
                said = _short(reply.read().decode(errors="replace"))
                raise EngineFailed(f"vLLM refused {path} with status {reply.status}: {said}")
            return collect(events(reply), started_s)
    except (OSError, http.client.HTTPException) as error:
        raise EngineFailed(f"vLLM did not answer {path}: {error!r}") from None


def _parsed(text: str) -> Event:
    try:
        event = json.loads(text)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise EngineFailed(f"vLLM sent an event that is no JSON object: {_short(text)}")
    return event


def _short(text: str) -> str:
    return text[:_SHOWN_BYTES]
