"""The vLLM connector: `kv_connector_module_path` is `kvtier.connectors.vllm`."""

from typing import TYPE_CHECKING, Any

__all__ = ["KvtierConnector"]

if TYPE_CHECKING:
    from kvtier.connectors.vllm.connector import KvtierConnector


def __getattr__(name: str) -> Any:
    # On first use: the settings and everything else that decides can be used without an engine.
    if name == "KvtierConnector":
        from kvtier.connectors.vllm.connector import KvtierConnector  # noqa: PLC0415

        return KvtierConnector
    raise AttributeError(f"module 'kvtier.connectors.vllm' has no attribute {name!r}")
