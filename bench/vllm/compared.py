"""Connectors for measuring, in one engine process: kvtier, nothing, or a bare local copy.

Run inside the engine's environment. The bare copy is the best that any cache outside the engine can
do: it knows beforehand what it holds, and copies the blocks out of this process' own memory.
"""

from enum import Enum
from typing import Any

import torch

from kvtier.connectors.vllm.connector import KvtierConnector, Orders
from kvtier.connectors.vllm.orders import StepOrders


class Mode(Enum):
    """What answers the engine."""

    KVTIER = "kvtier"
    NOTHING = "nothing"
    LOCAL = "local copy"


class Switch:
    """The mode of this process' engine, and what the local copy holds: the blocks of one prompt,
    layer by layer."""

    def __init__(self) -> None:
        self.mode = Mode.KVTIER
        self.caches: dict[str, torch.Tensor] = {}
        self.copied: list[torch.Tensor] = []
        self.blocks: list[int] = []  # to be filled in this step
        self.given: list[int] = []  # of the request that was given blocks last

    def remember(self) -> None:
        """Copy the last request's blocks out, as the local copy to be loaded."""
        self.copied = [block.clone() for block in self._words(self.given)]

    def restore(self) -> None:
        """Copy them back into the blocks that the engine has given."""
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            self._words(self.blocks), self.copied
        )
        self.blocks = []

    def _words(self, blocks: list[int]) -> list[torch.Tensor]:
        """Blocks of all layers as 8-byte integers, the fastest way torch copies them."""
        layers = [cache.view(torch.int64) for cache in self.caches.values()]
        return [layer[block] for layer in layers for block in blocks]


switch = Switch()


class ComparedConnector(KvtierConnector):
    """kvtier's connector, which `switch` can turn off or replace."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        switch.caches = kv_caches

    def on_new_request(self, request: Any) -> None:
        if switch.mode is Mode.KVTIER:
            super().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if switch.mode is Mode.LOCAL:
            return request.num_tokens - 1 - num_computed_tokens, False
        if switch.mode is Mode.NOTHING:
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if switch.mode is Mode.LOCAL:
            switch.blocks = list(blocks.get_block_ids()[0]) if num_external_tokens else []
        elif switch.mode is Mode.KVTIER:
            super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        if switch.mode is Mode.KVTIER:
            return super().build_connector_meta(scheduler_output)
        return Orders(StepOrders(0))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if switch.mode is Mode.KVTIER:
            super().start_load_kv(forward_context, **kwargs)
        elif switch.mode is Mode.LOCAL and switch.blocks:
            switch.restore()
