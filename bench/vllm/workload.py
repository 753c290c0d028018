"""What the server is asked: conversations about real texts, and prompts of an exact length.

All texts ship with the project: the demo's document, its documentation, its readme and licence.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import KvtierError

EXACT_TOKENS = (1024, 4096)
REPEATS = 3  # prompts of each exact length
# About how many tokens of its text each turn of a conversation adds: 1k, 2k and 4k in all.
TURN_TOKENS = (900, 900, 1900)
QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "Here is more of it. What does this part explain?",
    "This is the rest. Which advice would you take from all of it?",
)
WARM_UP_TOKENS = 1000
_BETWEEN = "\n\n"
# The files of each text, in their order, from the project's root.
_TEXTS: tuple[tuple[str, ...], ...] = (
    ("bench/demo/document.txt",),
    ("docs/architecture.md", "docs/protocol.md", "docs/formats.md"),
    ("README.md", "docs/decisions/*.md", "LICENSE"),
)

Encode = Callable[[str], Sequence[int]]


class NoText(KvtierError):
    """The texts are not there: this is not a checkout of the project."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of an exact number."""

    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What its user says, turn by turn."""

    name: str
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that is asked of one engine process, after its warm-up."""

    prompts: tuple[Prompt, ...]
    conversations: tuple[Conversation, ...]


def warm_up() -> tuple[int, ...]:
    """Token ids of a prompt that shares nothing with the workload."""
    return tuple(range(1000, 1000 + WARM_UP_TOKENS))


def build(encode: Encode, root: Path | None = None) -> Workload:
    """The workload, as long as the model's tokenizer makes it. Raises NoText."""
    texts = read_texts(root or Path(__file__).resolve().parents[2])
    return Workload(
        prompts=exact_prompts(encode(_BETWEEN.join(texts))),
        conversations=tuple(
            Conversation(f"conversation {number}", turns(text, encode))
            for number, text in enumerate(texts, start=1)
        ),
    )


def read_texts(root: Path) -> list[str]:
    """The texts below a checkout's root. Raises NoText."""
    texts = []
    for patterns in _TEXTS:
        files = [file for pattern in patterns for file in sorted(root.glob(pattern))]
        if len(files) < len(patterns):
            raise NoText(f"vllm: it plays the project's own texts; {patterns[0]} is missing here")
        texts.append(_BETWEEN.join(file.read_text(encoding="utf-8").strip() for file in files))
    return texts


def exact_prompts(corpus: Sequence[int]) -> tuple[Prompt, ...]:
    """Prompts of exactly `EXACT_TOKENS`, each from another place of the corpus, which goes round:
    they differ from their first tokens on, so none has a prefix of another."""
    lengths = [(length, number) for length in EXACT_TOKENS for number in range(1, REPEATS + 1)]
    stride = len(corpus) // len(lengths)
    prompts = []
    for place, (length, number) in enumerate(lengths):
        ids = tuple(corpus[(place * stride + i) % len(corpus)] for i in range(length))
        prompts.append(Prompt(f"prompt {number} of {length:,} tokens", ids))
    return tuple(prompts)


def turns(text: str, encode: Encode) -> tuple[str, ...]:
    """What a user says who shows a text part by part and asks about each."""
    parts = cut(text.split(_BETWEEN), lambda part: len(encode(part)), TURN_TOKENS)
    return tuple(
        f"{part}{_BETWEEN}{question}" for part, question in zip(parts, QUESTIONS, strict=True)
    )


def cut(paragraphs: Iterable[str], size: Callable[[str], int], sizes: Sequence[int]) -> list[str]:
    """Consecutive parts of a text, of about these sizes; paragraphs stay whole."""
    parts: list[list[str]] = [[] for _ in sizes]
    place = so_far = 0
    for paragraph in paragraphs:
        length = size(paragraph)
        if parts[place] and so_far + length / 2 > sizes[place]:
            place, so_far = place + 1, 0
            if place == len(sizes):
                break
        parts[place].append(paragraph)
        so_far += length
    if not all(parts):
        raise NoText(f"vllm: a text is too short for {len(sizes)} turns")
    return [_BETWEEN.join(part) for part in parts]
