"""The workload: exact lengths, no shared prefixes, real texts cut where paragraphs end."""

from pathlib import Path

import pytest

from kvtier.bench.vllm import workload
from kvtier.bench.vllm.workload import EXACT_TOKENS, REPEATS, TURN_TOKENS, NoText

ROOT = Path(__file__).resolve().parents[2]


def words(text: str) -> list[int]:
    """A tokenizer of sorts: a word is a token. The real one makes a few more."""
    return [sum(word.encode()) for word in text.split()]


def test_it_is_built_from_this_checkout() -> None:
    built = workload.build(words)
    lengths = [len(prompt.token_ids) for prompt in built.prompts]
    assert lengths == [length for length in EXACT_TOKENS for _ in range(REPEATS)]
    assert len({prompt.name for prompt in built.prompts}) == len(built.prompts)
    assert len(built.conversations) == 3
    for conversation in built.conversations:
        assert len(conversation.turns) == len(TURN_TOKENS)
        assert conversation.turns[0].endswith(workload.QUESTIONS[0])


def test_it_is_the_same_every_time() -> None:
    assert workload.build(words) == workload.build(words, ROOT)


def test_no_prompt_has_a_beginning_of_another() -> None:
    prompts = workload.build(words).prompts
    assert len({prompt.token_ids[:16] for prompt in prompts}) == len(prompts)
    assert not any(prompt.token_ids[:4] == workload.warm_up()[:4] for prompt in prompts)


def test_prompts_go_round_a_corpus_that_is_short() -> None:
    corpus = range(60)
    prompts = workload.exact_prompts(corpus)
    assert [prompt.token_ids[0] for prompt in prompts] == [0, 10, 20, 30, 40, 50]
    assert prompts[1].token_ids[:100] == tuple((10 + i) % 60 for i in range(100))


def test_a_text_is_cut_into_consecutive_parts() -> None:
    paragraphs = [f"{i}" * 10 for i in range(10)]
    assert workload.cut(paragraphs, len, (20, 30, 10)) == [
        "\n\n".join(paragraphs[:2]),
        "\n\n".join(paragraphs[2:5]),
        "\n\n".join(paragraphs[5:6]),
    ]


def test_a_part_is_about_its_size_and_never_empty() -> None:
    assert workload.cut(["a" * 9, "b" * 4, "c" * 50, "d"], len, (10, 10, 10)) == [
        "a" * 9,
        "b" * 4,
        "c" * 50,
    ]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(NoText, match="too short for 3 turns"):
        workload.cut(["one", "two"], len, (1, 1, 1))


def test_without_a_checkout_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NoText, match=r"document\.txt is missing"):
        workload.build(words, tmp_path)
