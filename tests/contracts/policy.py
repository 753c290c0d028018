"""What every eviction policy keeps."""

from hypothesis import given
from hypothesis import strategies as st

from kvtier.tiers.base import Policy

STEPS = st.lists(st.tuples(st.sampled_from(["add", "touch", "remove"]), st.integers(0, 60)))


class PolicyContract:
    """Subclass it and name the policy."""

    def make(self) -> Policy[int]:
        raise NotImplementedError

    @given(STEPS)
    def test_victims_are_exactly_the_chunks_held(self, steps: list[tuple[str, int]]) -> None:
        policy, held = self.make(), set[int]()
        for step, chunk in steps:
            if step == "add" and chunk not in held:
                policy.added(chunk)
                held.add(chunk)
            elif step == "touch" and chunk in held:
                policy.touched(chunk)
            elif step == "remove" and chunk in held:
                policy.removed(chunk)
                held.remove(chunk)
            victims = list(policy.victims())
            assert len(victims) == len(held)
            assert set(victims) == held

    @given(st.sets(st.integers(0, 300), max_size=200), st.data())
    def test_victims_may_be_removed_while_they_are_named(
        self, chunks: set[int], data: st.DataObject
    ) -> None:
        policy = self.make()
        for chunk in sorted(chunks):
            policy.added(chunk)
        seen = []
        kept = set()
        for chunk in policy.victims():
            seen.append(chunk)
            if data.draw(st.booleans()):
                policy.removed(chunk)
            else:
                kept.add(chunk)
        assert sorted(seen) == sorted(chunks)
        assert set(policy.victims()) == kept
