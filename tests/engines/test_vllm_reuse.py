"""vLLM takes over prefixes that another vLLM computed: the same answers, and how much is reused.

Every answer is compared with vLLM alone: token for token, and the tokens' logprobs to 1e-3.
"""

from collections.abc import Sequence

import pytest

from tests.engines.vllm_process import Answer, Engine, Prompt, Reference, storing
from tests.sidecar import Sidecar

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHUNK = 256
LENGTHS = [300, 1023, 1024, 1025, 1500, 2047, 2049]


def cached(answers: Sequence[Answer]) -> list[int]:
    return [answer.cached for answer in answers]


@pytest.fixture(scope="module")
def text(first_engine: Engine, sidecar: Sidecar, reference: Reference) -> Prompt:
    """A prompt that is stored: eight chunks and a token."""
    prompt = reference.prompt(1, 8 * CHUNK + 1)
    with storing(sidecar, 8):
        answer = first_engine.one(prompt)
    assert answer.cached == 0
    reference.check([prompt], [answer])
    return prompt


def test_from_ram_and_from_disk_after_a_restart(
    first: Engine, second: Engine, sidecar: Sidecar, reference: Reference
) -> None:
    prompts = [reference.prompt(2, 1024), reference.prompt(3, 4096)]
    with storing(sidecar, 20):
        cold = first.generate(prompts)
    assert cached(cold) == [0, 0]
    reference.check(prompts, cold)

    before = second.metrics()
    from_ram = second.generate(prompts)
    assert cached(from_ram) == [1023, 4095]
    reference.check(prompts, from_ram)
    grown = second.metrics() - before
    assert grown["vllm:external_prefix_cache_queries"] == 1024 + 4096
    assert grown["vllm:external_prefix_cache_hits"] == 1023 + 4095
    assert grown["vllm:prompt_tokens_cached_by_source{host}"] == 1023 + 4095
    assert grown["vllm:kvtier_loaded_chunks"] == 20
    assert grown["vllm:kvtier_failed_loads"] == 0

    assert sidecar.terminate() == 0
    sidecar.start()
    assert second.ask("reset")
    assert second.ask("wait_connected")
    before = second.metrics()
    from_disk = second.generate(prompts)
    assert cached(from_disk) == [1023, 4095]
    reference.check(prompts, from_disk)
    grown = second.metrics() - before
    assert grown["vllm:prompt_tokens_cached_by_source{disk}"] == 1023 + 4095
    assert sidecar.stats().counters["committed_chunks"] == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_of_any_length(
    second: Engine, reference: Reference, text: Prompt, length: int
) -> None:
    prompt = Prompt(text.tokens[:length])
    answer = second.one(prompt)
    assert answer.cached == min(length // CHUNK * CHUNK, length - 1)
    reference.check([prompt], [answer])


def test_a_prompt_shorter_than_a_chunk_is_neither_stored_nor_found(
    first: Engine, second: Engine, sidecar: Sidecar, reference: Reference
) -> None:
    short, longer = reference.prompt(4, CHUNK - 10), reference.prompt(5, 2 * CHUNK)
    with storing(sidecar, 2):  # the longer one's, which is offered last
        answers = [first.one(short), first.one(longer)]
    assert second.one(short).cached == 0
    reference.check([short, longer], answers)


def test_wrong_content_would_be_seen(second: Engine, reference: Reference, text: Prompt) -> None:
    """The negative control: the comparison notices what is not as it should be."""
    with second.wrong("corrupt"):
        wrong = second.one(text)
    [right] = reference.answers([text])
    assert wrong.cached == 2048
    assert wrong.distance(right) > 0.1
    assert second.ask("reset")
    reference.check([text], [second.one(text)])


# ── Partly held ──


@pytest.mark.parametrize("common", [1024, 1200, 255])
def test_prompts_that_diverge_share_whole_chunks(
    second: Engine, reference: Reference, text: Prompt, common: int
) -> None:
    other = Prompt(text.tokens[:common] + reference.prompt(6, 300).tokens)
    answer = second.one(other)
    assert answer.cached == common // CHUNK * CHUNK
    reference.check([other], [answer])


def test_goes_on_in_the_middle_of_a_chunk_where_the_engine_s_own_cache_ends(
    second: Engine, reference: Reference, text: Prompt
) -> None:
    start, longer = Prompt(text.tokens[:700]), Prompt(text.tokens[:1500])
    begun = second.one(start)
    before = second.metrics()
    answer = second.one(longer)
    grown = second.metrics() - before
    assert (begun.cached, answer.cached) == (512, 1280)
    assert grown["vllm:prompt_tokens_cached_by_source{device}"] == 640  # five of its blocks
    assert grown["vllm:prompt_tokens_cached_by_source{host}"] == 640
    reference.check([start, longer], [begun, answer])
    again = second.one(longer)
    assert again.cached == 1408
    reference.check([longer], [again])


# ── At the same time ──


def test_concurrent_prompts_that_share_a_prefix(
    second: Engine, reference: Reference, text: Prompt
) -> None:
    tails = [reference.prompt(seed, 200).tokens for seed in range(20, 24)]
    prompts = [Prompt(text.tokens[:1024] + tail) for tail in tails]
    answers = second.generate(prompts)
    assert cached(answers) == [1024] * 4
    reference.check(prompts, answers)


def test_salted_prompts_share_nothing_with_others(
    first: Engine, second: Engine, sidecar: Sidecar, reference: Reference, text: Prompt
) -> None:
    tokens = text.tokens[:600]
    salts = [{"salt": "a"}, {"salt": "b"}, {"salt_bytes": 10 << 20}]
    salted = [Prompt(tokens, **salt) for salt in salts]
    with storing(sidecar, 6):
        answers = second.generate([Prompt(tokens), *salted])
    assert cached(answers) == [512, 0, 0, 0]
    reference.check([Prompt(tokens)] * 4, answers)
    others = [Prompt(tokens, salt="c"), Prompt(tokens, salt_bytes=(10 << 20) + 1)]
    answers = first.generate([*salted, *others])
    assert cached(answers) == [512, 512, 512, 0, 0]
    reference.check([Prompt(tokens)] * 5, answers)
