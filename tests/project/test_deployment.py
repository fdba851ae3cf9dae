"""The manifests of docs/deployment.md: valid, consistent, and without privileges; the metrics that it names exist."""

import copy
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from vllm.ray.ray_env import get_env_vars_to_copy
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.executor.ray_env_utils import get_driver_env_vars
from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

from vllm_aasd.counters import METRICS, PREFIX
from vllm_aasd.engine import unsupported
from vllm_aasd.engine.worker import AASDWorker

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deployment.md").read_text()
MANIFESTS = {
    manifest["kind"]: manifest
    for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for manifest in yaml.safe_load_all(block)
}
POD = MANIFESTS["Deployment"]["spec"]["template"]
KUBERNETES = "1.34"


@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "Deployment", "Service"])
def test_a_manifest_is_valid(kind):
    kubernetes_validate.validate(MANIFESTS[kind], KUBERNETES, strict=True)
    wrong = copy.deepcopy(MANIFESTS[kind])
    wrong["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_names_that_one_manifest_uses_are_those_that_another_gives():
    labels = POD["metadata"]["labels"].items()
    for selector in (
        MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["Service"]["spec"]["selector"],
        MANIFESTS["PodMonitor"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    (container,) = POD["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    probes = [container[name]["httpGet"]["port"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    asked = [port["targetPort"] for port in MANIFESTS["Service"]["spec"]["ports"]]
    scraped = [endpoint["port"] for endpoint in MANIFESTS["PodMonitor"]["spec"]["podMetricsEndpoints"]]
    assert {*probes, *asked, *scraped} == ports
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in POD["spec"]["volumes"]
        if len(volume) == 2 and "persistentVolumeClaim" in volume
    ]
    assert claims == [MANIFESTS["PersistentVolumeClaim"]["metadata"]["name"]]


def test_pods_have_no_privileges_and_write_to_volumes_only():
    pod = POD["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["initContainers"] + pod["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounted.values()) <= volumes
        for name, path in ((entry["name"], entry["value"]) for entry in container["env"]):
            assert any(path == at or path.startswith(f"{at}/") for at in mounted), f"{name} is read-only"


def test_the_metrics_that_are_compared_exist():
    import vllm.v1.metrics.loggers
    import vllm.v1.spec_decode.metrics

    ours = {PREFIX + metric.name for metric in METRICS}
    theirs = "".join(Path(of.__file__).read_text() for of in (vllm.v1.metrics.loggers, vllm.v1.spec_decode.metrics))
    named = set(re.findall(r"\b(?:vllm|aasd):[a-z]\w+", PAGE))
    assert len(named) > 4
    for name in named:
        bare = re.sub(r"_(total|sum|count)$", "", name)
        assert bare in ours or f'"{bare}"' in theirs, name


def test_what_the_page_says_of_variables_on_ray_holds(monkeypatch):
    ours = {"AASD_CACHE_ROOT", "VLLM_PLUGINS"}
    for name in ours:
        monkeypatch.setenv(name, "value")
    assert ours <= set(get_driver_env_vars(WORKER_SPECIFIC_ENV_VARS))
    assert ours & get_env_vars_to_copy() == {"VLLM_PLUGINS"}
    (setting,) = re.findall(r"`(VLLM_RAY_\w+)=AASD_CACHE_ROOT`", PAGE)
    monkeypatch.setenv(setting, "AASD_CACHE_ROOT")
    assert ours <= get_env_vars_to_copy()


def test_a_worker_on_another_node_finds_our_class_by_its_name():
    for name in (unsupported.CPU_WORKER, unsupported.GPU_WORKER):
        assert issubclass(resolve_obj_by_qualname(name), AASDWorker)
