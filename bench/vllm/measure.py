"""Playing the workload to one engine process, and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvtier.bench.vllm.ask import Answer, chat, complete, counter
from kvtier.bench.vllm.load import Load
from kvtier.bench.vllm.server import Engine
from kvtier.bench.vllm.workload import Conversation, Workload, warm_up

PROMPT_ANSWER_TOKENS = 8
TURN_ANSWER_TOKENS = 24
_WARM_UP_ANSWER_TOKENS = 4
_EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"
_LOAD_FAILURE = "KV load failure"  # vLLM's words when it computes what a connector could not load

Say = Callable[[str], None]
Answers = dict[str, Answer]


@dataclass(frozen=True, slots=True)
class Phase:
    """What one engine process answered to the prompts and to the conversations' turns, by name.

    `again` has the prompts asked a second time, which vLLM's own cache holds. `from_kvtier` are the
    prompt tokens that vLLM says it took from kvtier, `load_failures` what it says could not be
    loaded, `service` what the sidecar counted in the meantime. `others` is the share of the machine
    that other work took.
    """

    prompts: Answers
    turns: Answers
    again: Answers = field(default_factory=dict)
    start_s: float = 0.0
    from_kvtier: int = 0
    load_failures: int = 0
    others: float = 0.0
    service: dict[str, int] = field(default_factory=dict)

    @property
    def answers(self) -> Answers:
        """The first answer to everything."""
        return self.prompts | self.turns


def play(
    engine: Engine, workload: Workload, say: Say, reference: Phase | None, *, twice: bool = False
) -> Phase:
    """Ask everything once, after a warm-up; with `twice` also each prompt a second time.

    Conversations carry the answers of `reference`, so that every phase is asked the same whatever
    it answers; without it, their own. Raises EngineFailed.
    """
    for _ in range(2):  # the second time it is a hit, so that this way is warm as well
        complete(engine.port, warm_up(), _WARM_UP_ANSWER_TOKENS)
    load = Load(engine.processor_s())
    taken = counter(engine.port, _EXTERNAL_HITS)
    prompts: Answers = {}
    again: Answers = {}
    for prompt in workload.prompts:
        prompts[prompt.name] = complete(engine.port, prompt.token_ids, PROMPT_ANSWER_TOKENS)
        say(progress(prompt.name, prompts[prompt.name]))
        if twice:
            again[prompt.name] = complete(engine.port, prompt.token_ids, PROMPT_ANSWER_TOKENS)
            say(progress(f"{prompt.name}, again", again[prompt.name]))
    turns: Answers = {}
    for conversation in workload.conversations:
        _converse(engine, conversation, turns, reference.turns if reference else turns, say)
    return Phase(
        prompts=prompts,
        turns=turns,
        again=again,
        start_s=engine.start_s,
        from_kvtier=counter(engine.port, _EXTERNAL_HITS) - taken,
        load_failures=engine.said().count(_LOAD_FAILURE),
        others=load.others(engine.processor_s()),
    )


def turn_name(conversation: Conversation, turn: int) -> str:
    """What the answer to a turn is filed under; turns count from 1."""
    return f"{conversation.name}, turn {turn}"


def progress(name: str, answer: Answer) -> str:
    """A line on an answer."""
    reused = f"{answer.cached_tokens:,} of {answer.prompt_tokens:,} tokens reused"
    return f"  {name}: {answer.ttft_ms:,.0f} ms, {reused}"


def _converse(
    engine: Engine, conversation: Conversation, turns: Answers, carried: Answers, say: Say
) -> None:
    """Ask turn by turn; the assistant's part of the history is taken from `carried`."""
    messages: list[dict[str, str]] = []
    for turn, words in enumerate(conversation.turns, start=1):
        name = turn_name(conversation, turn)
        messages.append({"role": "user", "content": words})
        turns[name] = chat(engine.port, messages, TURN_ANSWER_TOKENS)
        say(progress(name, turns[name]))
        messages.append({"role": "assistant", "content": carried[name].text})
