"""The manifests in deploy/, read into what both kinds have in common."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvtier.config import parse_bytes

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
_SECONDS = {"s": 1, "m": 60}


def documents(name: str) -> list[dict[str, Any]]:
    """The YAML documents of one manifest."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def option(arguments: list[str], name: str) -> str:
    """The value that follows an option."""
    return arguments[arguments.index(name) + 1]


@dataclass(frozen=True)
class Container:
    """One container: its arguments, its user, and where it mounts which volume."""

    arguments: list[str]
    user: str
    mounts: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """kvtier and vLLM as one manifest runs them. `probe` is the command that asks kvtier."""

    kvtier: Container
    vllm: Container
    probe: list[str]
    shared_is_memory: bool
    shared_bytes: int
    memory_limit_bytes: int
    grace_s: float

    @property
    def transfer(self) -> dict[str, Any]:
        """What vLLM is given as --kv-transfer-config."""
        given: dict[str, Any] = json.loads(option(self.vllm.arguments, "--kv-transfer-config"))
        return given


def compose() -> Manifest:
    """deploy/compose.yaml."""
    (file,) = documents("compose.yaml")
    kvtier, vllm = file["services"]["kvtier"], file["services"]["vllm"]
    shared = file["volumes"]["shared"]["driver_opts"]
    size = dict(part.partition("=")[::2] for part in shared["o"].split(","))["size"]
    return Manifest(
        kvtier=_of_compose(kvtier),
        vllm=_of_compose(vllm),
        probe=kvtier["healthcheck"]["test"][1:],
        shared_is_memory=shared["type"] == "tmpfs",
        shared_bytes=as_bytes(size),
        memory_limit_bytes=as_bytes(kvtier["mem_limit"]),
        grace_s=_seconds(kvtier["stop_grace_period"]),
    )


def kubernetes() -> Manifest:
    """deploy/kubernetes.yaml."""
    pod = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]
    (kvtier,), (vllm,) = pod["initContainers"], pod["containers"]
    (shared,) = (each["emptyDir"] for each in pod["volumes"] if each["name"] == "shared")
    return Manifest(
        kvtier=_of_pod(pod, kvtier),
        vllm=_of_pod(pod, vllm),
        probe=kvtier["livenessProbe"]["exec"]["command"],
        shared_is_memory=shared["medium"] == "Memory",
        shared_bytes=as_bytes(shared["sizeLimit"]),
        memory_limit_bytes=as_bytes(kvtier["resources"]["limits"]["memory"]),
        grace_s=pod["terminationGracePeriodSeconds"],
    )


def _of_compose(service: dict[str, Any]) -> Container:
    mounts = {each["source"]: each["target"] for each in service["volumes"]}
    return Container(service["command"], service["user"], mounts)


def _of_pod(pod: dict[str, Any], container: dict[str, Any]) -> Container:
    context = {**pod["securityContext"], **container["securityContext"]}
    return Container(
        container["args"],
        f"{context['runAsUser']}:{context['runAsGroup']}",
        {each["name"]: each["mountPath"] for each in container["volumeMounts"]},
    )


def as_bytes(text: str) -> int:
    """A size as Docker, the kernel or Kubernetes writes it: they all mean binary units here."""
    return parse_bytes(re.sub(r"[gG]i?$", "GiB", text))


def _seconds(text: str) -> float:
    return float(text[:-1]) * _SECONDS[text[-1]]
