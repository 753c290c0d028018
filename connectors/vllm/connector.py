"""vLLM's connector interface over the two sides: `Scheduling` and `Working`.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvtierConnector",
        "kv_connector_module_path": "kvtier.connectors.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"target": "unix:///tmp/kvtier.sock"}}'

vLLM makes one connector for its scheduler and one for each worker. Each worker sorts its layers
into parts and tells the scheduler's connector about them in the handshake, so that both always
speak of the same spaces. Written for vLLM 0.32.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_events import BlockStored
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import RequestStatus

from kvtier.client import Client, connect
from kvtier.connectors.vllm.device_copies import open_copies
from kvtier.connectors.vllm.extras import Extras
from kvtier.connectors.vllm.identity import (
    block_tokens_of,
    images_by_content,
    layers_of,
    model_of,
    refuse_unsupported,
    shard_of,
)
from kvtier.connectors.vllm.loader import Stored
from kvtier.connectors.vllm.lookups import Lookups
from kvtier.connectors.vllm.orders import StepOrders, StepReport
from kvtier.connectors.vllm.paged import Pages
from kvtier.connectors.vllm.parts import Part, check_layer, parts_of
from kvtier.connectors.vllm.scheduling import Scheduling
from kvtier.connectors.vllm.settings import Settings
from kvtier.connectors.vllm.stats import KvtierMetrics, KvtierStats
from kvtier.connectors.vllm.working import Working, asks_by_layer
from kvtier.kernels.device import Device

logger = logging.getLogger("vllm.kvtier")

MEDIUM = "KVTIER"
# An engine takes many times as long to start; without this the first requests would find nothing.
_START_WAIT_S = 1.0


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """A step's orders, as vLLM carries them to the workers."""

    orders: StepOrders


@dataclass
class Report(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """A worker's report, as vLLM carries it to the scheduler."""

    report: StepReport

    def aggregate(self, other: "Report") -> "Report":
        return Report(self.report.merged(other.report))


@dataclass
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """The parts that a worker keeps."""

    parts: tuple[Part, ...] = field(default=())


class KvtierConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The class that `--kv-transfer-config` names."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = Settings.parse(self._kv_transfer_config.kv_connector_extra_config)
        self._cache = kv_cache_config
        self._scheduling: Scheduling | None = None
        self._working: Working | None = None
        self._lookups: Lookups | None = None
        self._parts: tuple[Part, ...] = ()
        self._clients: list[Client] = []
        self._device: Device | None = None
        refuse_unsupported(vllm_config, kv_cache_config)
        for layer in layers_of(kv_cache_config, {}):
            check_layer(layer, self._settings.chunk_tokens)
        if role is KVConnectorRole.SCHEDULER and not self._recomputes:
            logger.warning(
                'kvtier: kv_load_failure_policy is "%s": a load that fails ends its request with '
                'an error. Set "kv_load_failure_policy": "recompute" in --kv-transfer-config.',
                self._kv_transfer_config.kv_load_failure_policy,
            )

    @property
    def _recomputes(self) -> bool:
        return bool(self._kv_transfer_config.kv_load_failure_policy == "recompute")

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: what is not stored is computed another time

    def shutdown(self) -> None:
        if self._working is not None:
            self._working.close()
        if self._lookups is not None:
            self._lookups.close()
        for client in self._clients:
            client.close()
        if self._device is not None:
            self._device.close()

    @property
    def working(self) -> Working | None:
        """The worker's side, once its caches are registered."""
        return self._working

    # ── the worker's side ─────────────────────────────────────────────────────────────────────────

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        shard, writer = shard_of(
            self._vllm_config, self._cache, get_tp_group().rank_in_group,
            get_pp_group().rank_in_group,
        )  # fmt: skip
        model = model_of(self._vllm_config, self._settings)
        packing = self._packing(kv_caches)
        self._parts = parts_of(
            layers_of(self._cache, packing), model, shard, self._settings.chunk_tokens
        )
        counts = [self._cache.num_blocks] * len(self._cache.kv_cache_groups)
        pages = [Pages(part, kv_caches, counts) for part in self._parts]
        copies, self._device = open_copies(pages)
        stored = [
            Stored(part, each, self._connect(part, None), writer)
            for part, each in zip(self._parts, pages, strict=True)
        ]
        block_tokens = block_tokens_of(self._cache)[0]
        self._working = Working(
            stored,
            copies,
            self._settings.deadline_ms / 1000,
            block_tokens,
            self._settings.lookup_wait_ms / 1000,
        )
        for each in stored:
            space = each.part.space
            found = "connected" if each.client.wait_ready(_START_WAIT_S) else "no service yet"
            logger.info(
                "kvtier: %s in chunks of %d bytes: %s", space.model, space.layout.nbytes, found
            )

    def get_handshake_metadata(self) -> Handshake | None:
        return Handshake(self._parts) if self._parts else None

    def handle_preemptions(self, kv_connector_metadata: Orders) -> None:
        if self._working is not None:
            self._working.before_writing(kv_connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._working is not None:
            orders = self._get_connector_metadata().orders
            self._working.load(orders, by_layer=asks_by_layer(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._device is not None and self._working is not None:
            self._working.before_layer(layer_name)  # else all are loaded before the forward

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass  # chunks hold all layers, so they are gathered once, after the forward

    def wait_for_save(self) -> None:
        if self._working is not None:
            self._working.offload(self._get_connector_metadata().orders)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._working is None:
            return KVConnectorTransferResults()
        arrivals = self._working.arrivals()
        return KVConnectorTransferResults(
            finished_recving=arrivals.finished, failed_recving=arrivals.failed
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._working.bad_blocks() if self._working is not None else set()

    def build_connector_worker_meta(self) -> Report | None:
        report = self._working.report() if self._working is not None else None
        return Report(report) if report is not None else None

    # ── the scheduler's side ──────────────────────────────────────────────────────────────────────

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        parts = {part.digest: part for _, each in sorted(metadata.items()) for part in each.parts}
        working = _worker_in_this_process()
        if working is not None and working.clients.keys() == parts.keys():
            self._lookups = Lookups(working.clients)
        else:
            working = None
            # It only asks: on the inline path no arena is mapped.
            clients = {digest: self._connect(part, "inline") for digest, part in parts.items()}
            self._clients = list(clients.values())
            for client in self._clients:
                client.wait_ready(_START_WAIT_S)
            self._lookups = Lookups(clients)
        extras = Extras(
            generate_block_hash_extra_keys,
            self._settings.chunk_tokens,
            images_by_content=images_by_content(self._vllm_config),
        )
        self._scheduling = Scheduling(
            list(parts.values()),
            block_tokens_of(self._cache),
            self._lookups,
            self._settings,
            extras.of,
            working.prepare if working is not None else None,
        )
        events = self._vllm_config.kv_events_config
        self._scheduling.stored.watched = events is not None and events.enable_kv_cache_events

    def on_new_request(self, request: Any) -> None:
        # A streaming session's tokens are taken back and replaced: they have no stable keys.
        if self._scheduling is not None and not request.resumable:
            self._scheduling.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduling is None:
            return 0, False
        return self._scheduling.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduling is not None:
            self._scheduling.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        if self._scheduling is None or num_external_tokens == 0:
            return {}
        ram = self._scheduling.from_ram(request, num_external_tokens)
        counts = {CacheHitSource.HOST: ram, CacheHitSource.DISK: num_external_tokens - ram}
        return {source: tokens for source, tokens in counts.items() if tokens}

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        if self._scheduling is None:
            return Orders(StepOrders(0))
        return Orders(self._scheduling.plan(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._scheduling is not None and report is not None:
            self._scheduling.received(report.report)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduling is not None:
            broken = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)
            self._scheduling.finished(request, block_ids, whole=request.status not in broken)
        return False, None  # the blocks are the engine's again: see fence.py

    def take_events(self) -> Iterable[BlockStored]:
        return list(self._events())

    def _events(self) -> Iterator[BlockStored]:
        stored = self._scheduling.stored.take() if self._scheduling is not None else []
        for chunk in stored:
            yield BlockStored(
                block_hashes=[chunk.key],
                parent_block_hash=chunk.parent,
                token_ids=chunk.tokens,
                block_size=self._settings.chunk_tokens,
                lora_id=None,
                medium=MEDIUM,
                lora_name=chunk.lora_name,
            )

    def reset_cache(self) -> bool:
        if self._scheduling is not None:
            self._scheduling.start_over()
            worker = _worker_in_this_process()
            if worker is not None:
                worker.forget()  # the engine may give the blocks' memory back before its next step
        return True

    # ── both ──────────────────────────────────────────────────────────────────────────────────────

    def get_kv_connector_stats(self) -> KvtierStats | None:
        side = self._scheduling or self._working
        counts = side.tally.take() if side is not None else {}
        return KvtierStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvtierStats:
        return KvtierStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvtierMetrics:
        return KvtierMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _packing(self, caches: dict[str, torch.Tensor]) -> dict[str, str]:
        """What decides how each layer's back end arranges a block: itself and, on a CPU, what the
        CPU can do."""
        layers = self._vllm_config.compilation_config.static_forward_context
        names = {}
        for name, cache in caches.items():
            layer = layers.get(name)
            names[name] = layer.get_attn_backend().get_name() if layer is not None else ""
            if cache.device.type == "cpu":
                able = torch.cpu.get_capabilities()
                kind = "amx" if able.get("amx_tile") else torch.backends.cpu.get_cpu_capability()
                names[name] += f" {able.get('architecture')} {kind}"
        return names

    def _connect(self, part: Part, path: str | None) -> Client:
        return connect(
            self._settings.target,
            part.space,
            deadline_s=self._settings.deadline_ms / 1000,
            path=path,
            name=f"vllm {self._role.name.lower()}",
            device=self._device,
        )


def _worker_in_this_process() -> Working | None:
    """The worker's side, where it shares the scheduler's process: an engine of one worker."""
    worker = get_kv_transfer_group() if has_kv_transfer_group() else None
    return worker.working if isinstance(worker, KvtierConnector) else None
