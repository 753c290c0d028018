"""The manifests in deploy/ are valid by the published schemas, and in them kvtier and vLLM find
each other. Nothing here needs Docker, a cluster or a network."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft202012Validator

from kvtier.cli import _parser, main
from kvtier.config import Config, load
from kvtier.connectors.vllm.settings import Settings
from kvtier.errors import ConfigError, InvalidRequest
from tests.deploy.manifests import (
    DEPLOY,
    ROOT,
    Manifest,
    as_bytes,
    compose,
    documents,
    kubernetes,
)

Capture = pytest.CaptureFixture[str]
Change = Callable[[dict[str, Any]], object]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMPOSE_SCHEMA = Draft202012Validator(get_builtin_schema("vendor.compose-spec"))
# Native sidecars are on by default from 1.29 on.
KUBERNETES_VERSIONS = ["1.29", "1.33", kubernetes_validate.latest_version()]
DOCKERFILES = ["Dockerfile", "vllm.Dockerfile"]


@pytest.fixture(params=[compose, kubernetes], ids=["compose", "kubernetes"])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    read: Callable[[], Manifest] = request.param
    return read()


@pytest.fixture
def config(manifest: Manifest, tmp_path: Path, capsys: Capture) -> Config:
    """What the service makes of the manifest's command line."""
    assert main([*manifest.kvtier.arguments, "--print-config"]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    return load(printed, {}, [])


# ── The schemas ───────────────────────────────────────────────────────────────────────────────────


def test_the_compose_file_is_valid() -> None:
    (file,) = documents("compose.yaml")
    assert [error.message for error in COMPOSE_SCHEMA.iter_errors(file)] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file["services"]["kvtier"].update(stop_grace_perod="60s"),
        lambda file: file["services"]["vllm"]["depends_on"]["kvtier"].update(condition="healthy"),
        lambda file: file["services"]["vllm"]["volumes"][0].update(type=7),
        lambda file: file["volumes"]["shared"].update(driver_options={}),
    ],
    ids=["key", "choice", "type", "volume"],
)
def test_a_typo_in_the_compose_file_is_found(change: Change) -> None:
    (file,) = copy.deepcopy(documents("compose.yaml"))
    change(file)
    assert not COMPOSE_SCHEMA.is_valid(file)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("document", documents("kubernetes.yaml"), ids=lambda each: each["kind"])
def test_the_kubernetes_objects_are_valid(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize(
    "change",
    [
        lambda pod: pod["initContainers"][0].update(restartpolicy="Always"),
        lambda pod: pod["containers"][0]["volumeMounts"][0].update(mountpath="/run/kvtier"),
        lambda pod: pod["containers"][0]["ports"][0].update(containerPort="http"),
        lambda pod: pod.pop("containers"),
    ],
    ids=["key", "deep key", "type", "missing"],
)
def test_a_typo_in_the_kubernetes_objects_is_found(change: Change, version: str) -> None:
    deployment = copy.deepcopy(documents("kubernetes.yaml")[0])
    change(deployment["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, version, strict=True)


# ── kvtier and vLLM find each other ───────────────────────────────────────────────────────────────


def test_both_mount_the_same_memory(manifest: Manifest, config: Config) -> None:
    assert manifest.shared_is_memory
    assert manifest.kvtier.mounts["shared"] == manifest.vllm.mounts["shared"]
    assert str(config.cpu.directory) == manifest.kvtier.mounts["shared"]


def test_both_name_the_same_socket(manifest: Manifest, config: Config) -> None:
    settings = Settings.parse(manifest.transfer["kv_connector_extra_config"])
    assert settings.target == config.server.listen
    socket = Path(config.server.listen.removeprefix("unix://"))
    assert str(socket.parent) == manifest.vllm.mounts["shared"]


def test_the_probe_asks_the_same_socket(manifest: Manifest, config: Config) -> None:
    program, *arguments = manifest.probe
    assert (program, arguments[0]) == ("kvtier", "stats")
    assert _parser(arguments).parse_args(arguments).target == config.server.listen


def test_both_run_as_the_images_user(manifest: Manifest) -> None:
    assert manifest.kvtier.user == manifest.vllm.user
    assert not manifest.kvtier.user.startswith("0")
    for name in DOCKERFILES:
        users = re.findall(
            r"^USER (.+)$", (DEPLOY / name).read_text(encoding="utf-8"), re.MULTILINE
        )
        assert users[-1] == manifest.kvtier.user


def test_vllm_is_given_the_connector(manifest: Manifest) -> None:
    given = {**manifest.transfer, "kv_connector_extra_config": None}
    assert given == {
        "kv_connector": "KvtierConnector",
        "kv_connector_module_path": "kvtier.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": None,
    }
    assert importlib.util.find_spec(given["kv_connector_module_path"]) is not None


def test_a_setting_that_is_not_there_is_found(manifest: Manifest) -> None:
    extra = {**manifest.transfer["kv_connector_extra_config"], "targt": "unix:///s"}
    with pytest.raises(InvalidRequest, match="targt"):
        Settings.parse(extra)
    with pytest.raises(ConfigError, match="capcity"):
        load(None, {}, ["cpu.capcity=8GiB"])


# ── Sizes and times ───────────────────────────────────────────────────────────────────────────────


def test_the_arena_fits_its_volume_and_the_memory_limit(manifest: Manifest, config: Config) -> None:
    assert config.cpu.capacity < manifest.shared_bytes < manifest.memory_limit_bytes


def test_the_disk_tier_lies_on_its_volume(manifest: Manifest, config: Config) -> None:
    assert config.disk.directory is not None
    assert config.disk.directory.is_relative_to(manifest.kvtier.mounts["disk"])


@pytest.mark.parametrize("manifest", [kubernetes], indirect=True)
def test_the_disk_tier_fits_its_claim(config: Config) -> None:
    claim = documents("kubernetes.yaml")[1]
    storage = as_bytes(claim["spec"]["resources"]["requests"]["storage"])
    assert config.disk.capacity < storage


def test_there_is_time_to_write_what_ram_holds(manifest: Manifest, config: Config) -> None:
    assert config.server.shutdown_flush_s < manifest.grace_s


# ── Never in the way ──────────────────────────────────────────────────────────────────────────────


def test_vllm_starts_and_serves_without_kvtier() -> None:
    (file,) = documents("compose.yaml")
    assert file["services"]["vllm"]["depends_on"]["kvtier"]["required"] is False
    pod = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]
    (sidecar,) = pod["initContainers"]
    assert sidecar["restartPolicy"] == "Always"  # or else vLLM would wait for its end
    assert not {"startupProbe", "readinessProbe"} & sidecar.keys()


def test_no_service_sets_variables_for_either() -> None:
    deployment, *_, service = documents("kubernetes.yaml")
    assert deployment["spec"]["template"]["spec"]["enableServiceLinks"] is False
    assert not re.match("vllm|kvtier", service["metadata"]["name"])


# ── The images ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_images_are_built_from_all_folders(name: str) -> None:
    lines = (DEPLOY / f"{name}.dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    assert {"kvtier", "pyproject.toml", "constraints.txt", *folders} <= sent
    assert all((ROOT / path).exists() for path in sent)


def test_vllms_image_has_what_the_client_needs_and_no_more() -> None:
    text = (DEPLOY / "vllm.Dockerfile").read_text(encoding="utf-8")
    installed = set(re.findall(r'"([\w-]+[<>=][^"]*)"', text))
    needed = set(PROJECT["project"]["dependencies"])
    assert installed <= needed
    modules = {"grpcio-health-checking": "grpc_health", "grpcio-reflection": "grpc_reflection"}
    left_out = [re.split("[<>=]", each)[0] for each in needed - installed]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({[modules.get(m, m) for m in left_out]}))\n"
        "import kvtier.client, kvtier.connectors.vllm.settings\n"
        "assert not {'torch', 'vllm'} & sys.modules.keys()"
    )
    environ = {"PYTHONPATH": str(ROOT), "PATH": os.environ.get("PATH", "")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=60)
