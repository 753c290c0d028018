"""Reading what vLLM streams: whole events only, the first token's time, and what it refuses."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from kvtier.bench.vllm.ask import (
    EngineFailed,
    chat,
    collect,
    complete,
    counter,
    events,
    is_ready,
    total,
)

USAGE = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
COMPLETION = [
    {"choices": [{"text": "a", "token_ids": [5]}]},
    {"choices": [{"text": "b", "token_ids": [6, 7], "finish_reason": "length"}]},
    {"choices": [], "usage": USAGE},
]
CHAT = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "a"}, "token_ids": [5]}]},
    {"choices": [{"delta": {"content": None}, "token_ids": [6]}]},
    {"choices": [], "usage": USAGE},
]


def stream(documents: list[dict[str, Any]], end: str = "data: [DONE]\n\n") -> list[bytes]:
    text = "".join(f"data: {json.dumps(each)}\n\n" for each in documents) + end
    return text.encode().splitlines(keepends=True)


def test_events_are_the_documents_of_the_stream() -> None:
    assert list(events(stream(COMPLETION))) == COMPLETION


def test_an_event_may_have_several_lines_comments_and_either_line_end() -> None:
    lines = [b": hello\n", b"event: x\r\n", b'data: {"a":\r\n', b"data:1}\r\n", b"\r\n"]
    assert list(events([*lines, b"\n", b"data: [DONE]\n", b"\n", b"data: never\n"])) == [{"a": 1}]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (stream(COMPLETION, end=""), "in the middle"),
        (stream(COMPLETION, end="data: [DONE]\n"), "in the middle"),
        ([b"data: {oh\n", b"\n"], "no JSON object: {oh"),
        ([b"data: [1]\n", b"\n"], "no JSON object"),
    ],
)
def test_a_stream_that_is_not_whole_is_refused(lines: list[bytes], said: str) -> None:
    with pytest.raises(EngineFailed, match=said):
        list(events(lines))


def test_a_completion_is_put_together() -> None:
    answer = collect(COMPLETION, started_s=1.0, clock=iter([1.25]).__next__)
    assert (answer.token_ids, answer.text, answer.ttft_ms) == ((5, 6, 7), "ab", 250)
    assert (answer.prompt_tokens, answer.cached_tokens) == (9, 4)


def test_a_chat_has_its_first_token_after_the_role() -> None:
    seen: list[int] = []

    def watched() -> Iterator[dict[str, Any]]:
        for place, event in enumerate(CHAT):
            seen.append(place)
            yield event

    answer = collect(watched(), started_s=0.0, clock=lambda: float(len(seen)))
    assert answer.ttft_ms == 2000  # two events had come
    assert (answer.token_ids, answer.text) == ((5, 6), "a")


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}])
def test_nothing_said_of_the_cache_is_nothing_cached(details: Any) -> None:
    usage = {"choices": [], "usage": {**USAGE, "prompt_tokens_details": details}}
    assert collect([*COMPLETION[:2], usage], 0.0).cached_tokens == 0


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (COMPLETION[2:], "without tokens"),
        (COMPLETION[:2], "without its usage"),
        ([COMPLETION[0], {"error": {"message": "out of luck"}}], "out of luck"),
    ],
)
def test_an_answer_that_lacks_something_is_refused(
    documents: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(EngineFailed, match=said):
        collect(documents, 0.0)


def test_a_metric_is_summed_over_its_labels() -> None:
    text = (
        '# HELP hits x\nhits_total{a="1 2"} 3.0\nhits_total{a="2"} 1e2\nhits_total_more 9\nhits 4\n'
    )
    assert total(text, "hits_total") == 103
    assert total(text, "hits") == 4
    assert total(text, "misses") == 0


class FakeServer(BaseHTTPRequestHandler):
    """Answers as vLLM does; keeps what it was asked."""

    asked: list[tuple[str, dict[str, Any]]]

    def do_GET(self) -> None:
        self._answer(200 if self.path in ("/health", "/metrics") else 404, b"hits 2\n")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if body.get("prompt") == []:
            self._answer(400, b"the prompt is empty")
        else:
            self._answer(200, b"".join(stream(CHAT if "messages" in body else COMPLETION)))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        pass

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def server() -> Iterator[int]:
    FakeServer.asked = []
    with HTTPServer(("127.0.0.1", 0), FakeServer) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield listening.server_port
        finally:
            listening.shutdown()
            thread.join()


def test_a_server_is_asked_greedily_for_a_stream_with_ids() -> None:
    with server() as port:
        assert is_ready(port)
        assert complete(port, (1, 2), 3).token_ids == (5, 6, 7)
        assert chat(port, [{"role": "user", "content": "x"}], 3).token_ids == (5, 6)
        assert counter(port, "hits") == 2
        (path, body), (chat_path, _) = FakeServer.asked
    assert (path, chat_path) == ("/v1/completions", "/v1/chat/completions")
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ([1, 2], 3, 0)
    assert body["stream"]
    assert body["return_token_ids"]


def test_a_refusal_and_an_absent_server_are_told() -> None:
    with server() as port, pytest.raises(EngineFailed, match="status 400: the prompt is empty"):
        complete(port, (), 1)
    assert not is_ready(port)
    with pytest.raises(EngineFailed, match="did not answer /v1/completions"):
        complete(port, (1,), 1)
    with pytest.raises(EngineFailed, match="no metrics"):
        counter(port, "hits")
