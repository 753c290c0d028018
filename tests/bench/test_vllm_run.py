"""The run's own part: what is asked, with which history, and what it says without an engine."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.bench.vllm import measure
from kvtier.bench.vllm.ask import Answer
from kvtier.bench.vllm.measure import Phase, play
from kvtier.bench.vllm.server import Engine
from kvtier.bench.vllm.workload import Conversation, Prompt, Workload
from kvtier.cli import main

WORKLOAD = Workload(
    prompts=(Prompt("prompt 1", (1, 2)), Prompt("prompt 2", (3, 4))),
    conversations=(
        Conversation("conversation 1", ("first", "second")),
        Conversation("conversation 2", ("other",)),
    ),
)


class FakeVllm:
    """Answers each request with its number, and takes ten tokens from kvtier for each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        monkeypatch.setattr(measure, "complete", self.answer)
        monkeypatch.setattr(measure, "chat", self.answer)
        monkeypatch.setattr(measure, "counter", lambda port, name: 10 * len(self.asked))

    def answer(self, port: int, what: Sequence[Any], max_tokens: int) -> Answer:
        self.asked.append(list(what))
        number = len(self.asked)
        return Answer((number,), f"answer {number}", 1.0, 9, 0)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    log = tmp_path / "log"
    log.write_text("KV load failure: of the last engine\nRecovered from KV load failure: 1\n")
    myself: Any = SimpleNamespace(pid=os.getpgrp())
    return Engine(1, myself, log, log_start=36, start_s=4.5)


def play_quietly(engine: Engine, reference: Phase | None, *, twice: bool = False) -> Phase:
    return play(engine, WORKLOAD, lambda line: None, reference, twice=twice)


def test_everything_is_asked_once_after_the_warm_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = FakeVllm(monkeypatch)
    phase = play_quietly(engine, None)
    warm, again, *asked = vllm.asked
    assert warm == again
    assert asked[:2] == [[1, 2], [3, 4]]
    assert [[message["role"] for message in each] for each in asked[2:]] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert list(phase.answers) == [
        "prompt 1",
        "prompt 2",
        "conversation 1, turn 1",
        "conversation 1, turn 2",
        "conversation 2, turn 1",
    ]
    assert (phase.again, phase.start_s, phase.from_kvtier, phase.load_failures) == ({}, 4.5, 50, 1)


def test_twice_asks_each_prompt_again_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = FakeVllm(monkeypatch)
    phase = play_quietly(engine, None, twice=True)
    assert vllm.asked[2:6] == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert {name: each.token_ids for name, each in phase.again.items()} == {
        "prompt 1": (4,),
        "prompt 2": (6,),
    }


def test_a_conversation_carries_the_answers_of_the_reference(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = FakeVllm(monkeypatch)
    reference = play_quietly(engine, None, twice=True)
    assert alone.asked[7][1]["content"] == reference.turns["conversation 1, turn 1"].text
    other = FakeVllm(monkeypatch)
    phase = play_quietly(engine, reference)
    assert phase.turns["conversation 1, turn 1"].text != alone.asked[7][1]["content"]
    assert other.asked[5] == alone.asked[7]


def test_without_an_engine_it_says_so_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = str(tmp_path / "bin" / "python")
    assert main(["vllm", "--out", str(tmp_path / "out"), "--engine-python", nobody]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvtier: no vLLM for CPU")
    assert error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_the_orchestrator_does_not_load_an_engine() -> None:
    code = "import sys, kvtier.bench.vllm.run; sys.exit(bool({'torch', 'vllm'} & {*sys.modules}))"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
