"""Full collections: when the service pauses, and at the latest after an hour."""

import gc

import pytest

from kvtier.service.collection import IdleCollection


@pytest.fixture
def made() -> tuple[list[int], list[int], IdleCollection]:
    """What has happened so far, the collections there were, and who decides on them."""
    happened, collected = [0], [0]

    def collect() -> None:
        collected[0] += 1

    return happened, collected, IdleCollection(lambda: happened[0], collect)


def test_it_collects_once_in_each_pause(made: tuple[list[int], list[int], IdleCollection]) -> None:
    happened, collected, idle = made
    for _ in range(3):
        idle.tick()
    assert collected == [0], "nothing has happened yet"
    for pause in range(1, 4):
        for _ in range(5):
            happened[0] += 1
            idle.tick()
        assert collected == [pause - 1]
        for _ in range(5):
            idle.tick()
        assert collected == [pause]


def test_without_a_pause_it_collects_after_an_hour(
    made: tuple[list[int], list[int], IdleCollection],
) -> None:
    happened, collected, idle = made
    for tick in range(1, 361):
        happened[0] += 1
        idle.tick()
        assert collected == [tick // 120]


async def test_the_interpreter_does_not_do_it_meanwhile() -> None:
    before = gc.get_threshold()
    idle = IdleCollection(lambda: 0)
    idle.start()
    try:
        assert gc.get_threshold()[:2] == before[:2]
        assert gc.get_threshold()[2] > 10**6
    finally:
        idle.close()
    assert gc.get_threshold() == before
