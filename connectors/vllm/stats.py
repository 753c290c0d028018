"""The connector's counts as vLLM's statistics and Prometheus metrics."""

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvtier.connectors.vllm.tally import COUNTS


class KvtierStats(KVConnectorStats):  # type: ignore[misc]
    """Counts of an interval, by their names in COUNTS."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: Any) -> "KvtierStats":
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 3) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class KvtierMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """One counter `vllm:kvtier_NAME` for each count."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        metrics = {
            name: counter(name=f"vllm:kvtier_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTS.items()
        }
        self._counters = {
            engine: {name: metric.labels(*values) for name, metric in metrics.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self._counters[engine_idx][name].inc(value)
