"""deploy/: manifests against their schemas, the container's start on the real server, alarms on its real metrics."""

import base64
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anatomynet import __version__
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.errors import ServerError
from anatomynet.export.triton_models import LARGEST_QUEUE, QUEUE_TIMEOUT_S
from tests.manifests import (
    DEPLOY,
    KUBERNETES,
    KUSTOMIZATIONS,
    MANIFESTS,
    PROXY,
    ROOT,
    documents,
    needs_kubectl,
    only,
    pod_specs,
)
from tests.random_network import smooth_hu
from tests.triton_servers import RunningServer, has_server, model_process, running_server, unwatched
from tests.waiting import wait_until

yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")
referencing = pytest.importorskip("referencing")
grpc = pytest.importorskip("tritonclient.grpc")
InferenceServerException = pytest.importorskip("tritonclient.utils").InferenceServerException

SERVE = DEPLOY / "container" / "serve"
CONTAINERFILE = (DEPLOY / "container" / "Containerfile").read_text()
README = (DEPLOY / "README.md").read_text()
# The last of the releases that fixed what SECURITY.md lists.
OLDEST_TRITON = (26, 7)
KEY = "anatomynet-admin-key"
SECRET = "known-to-this-test"
LOCAL = tuple(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics"))
SLOW_SHAPE = (32, 192, 192)
CLIENTS = LARGEST_QUEUE + 8
COMPUTED_US = 'nv_inference_compute_infer_duration_us{model="anatomynet",version="1"}'
QUEUED_US = 'nv_inference_queue_duration_us{model="anatomynet",version="1"}'
SUCCESSES = 'nv_inference_request_success{model="anatomynet",version="1"}'
needs_server = pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")
# In CI the tests fail without it, since apt has it.
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None and not os.environ.get("CI"), reason="no promtool here: Debian's prometheus"
)


def test_a_node_starts_when_the_clock_is_set() -> None:
    """It deletes by the clock: what it parks before, in a year long past, would be days old a moment later."""
    unit = (DEPLOY / "systemd" / "anatomynet-listen.service").read_text()
    for setting in ("After", "Wants"):
        assert re.search(rf"^{setting}=.*\btime-sync\.target\b", unit, re.MULTILINE)


# --- Kubernetes and KServe


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_manifest_follows_kubernetes_own_schema(path: Path) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_schema_finds_a_field_that_is_none() -> None:
    broken = only("Deployment")
    broken["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@pytest.mark.parametrize("folder", sorted({path.parent for path in MANIFESTS}), ids=lambda p: p.name)
def test_kustomization_lists_every_manifest(folder: Path) -> None:
    listed = documents(folder / "kustomization.yaml")[0]["resources"]
    assert sorted(name for name in listed if name.endswith(".yaml")) == [
        p.name for p in MANIFESTS if p.parent == folder
    ]


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda p: p.parent.name)
def test_kustomize_may_take_what_is_listed(path: Path) -> None:
    """Its rules: files from below the folder alone; other folders, but none that contains the one that names it."""
    kustomization, folder = documents(path)[0], path.parent
    generated = [file.split("=")[-1] for g in kustomization.get("configMapGenerator", []) for file in g["files"]]
    for name in kustomization.get("resources", []) + generated:
        listed = (folder / name).resolve()
        if listed.is_dir():
            assert (listed / "kustomization.yaml").is_file(), name
            assert not folder.is_relative_to(listed), name
        else:
            assert listed.is_file(), name
            assert listed.is_relative_to(folder), name


def test_with_a_gpu_it_follows_the_schema_too() -> None:
    kustomization = documents(DEPLOY / "kubernetes-gpu" / "kustomization.yaml")[0]
    ((operation,),) = [yaml.safe_load(patch["patch"]) for patch in kustomization["patches"]]
    deployment: Any = only("Deployment")
    place: Any = deployment
    *steps, last = [step.replace("~1", "/") for step in operation["path"].split("/")[1:]]
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[last] = operation["value"]
    kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
    limits = deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1


@needs_kubectl
@pytest.mark.parametrize("folder", ["kubernetes", "kubernetes-gpu"])
def test_kubectl_builds_it(folder: str) -> None:
    """Every manifest, the proxy's configuration as it lies in deploy/nginx, and each pod with its image and its GPU."""
    command = ["kubectl", "kustomize", str(DEPLOY / folder)]
    built = list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True).stdout))
    for document in built:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "anatomynet"
    (configuration,) = [d for d in built if d["kind"] == "ConfigMap"]
    nginx = DEPLOY / "nginx"
    assert configuration["data"] == {
        "nginx.conf": (nginx / "nginx.conf").read_text(),
        "servers": (nginx / "servers.kubernetes").read_text(),
    }
    pods = {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in built if d["kind"] == "Deployment"}
    assert len(built) == len(MANIFESTS) + 1
    limits = {name: pod["containers"][0]["resources"]["limits"] for name, pod in pods.items()}
    assert limits["anatomynet"].get("nvidia.com/gpu") == (1 if folder == "kubernetes-gpu" else None)
    assert "nvidia.com/gpu" not in limits[PROXY]
    assert all(":" in pod["containers"][0]["image"] for pod in pods.values())
    built_as = f"anatomynet-server:{__version__}" + ("-gpu" if folder == "kubernetes-gpu" else "")
    assert pods["anatomynet"]["containers"][0]["image"] == built_as
    assert f" -t {built_as} " in README
    (configuration_volume, _) = pods[PROXY]["volumes"]
    named = [
        source["configMap"]["name"] for source in configuration_volume["projected"]["sources"] if "configMap" in source
    ]
    assert named == [configuration["metadata"]["name"]]


def inference_service_errors(service: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where it breaks KServe's schema, joined with Kubernetes' own where that repeats it."""
    schema = json.loads((ROOT / "tests" / "kserve_inference_service.json").read_text())
    schemas = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    definitions = json.loads((schemas / f"v{KUBERNETES}.0-local-strict" / "_definitions.json").read_text())
    registry = referencing.Resource.from_contents(definitions) @ referencing.Registry()
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    return [tuple(map(str, error.absolute_path)) for error in validator.iter_errors(service)]


def test_inference_service_follows_the_schema_of_kserve_and_of_a_pod() -> None:
    (service,) = documents(DEPLOY / "kserve.yaml")
    assert inference_service_errors(service) == []
    (container,) = service["spec"]["predictor"]["containers"]
    assert container["name"] == "kserve-container"  # the name by which KServe finds it


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ((), "status", {"url": "http://here"}),
        (("spec",), "replicas", 2),
        (("spec", "predictor"), "maxReplica", 8),
        (("spec", "predictor"), "minReplicas", "2"),
        (("spec", "predictor"), "batcher", {"maxBatchsize": 2}),
        (("spec", "predictor"), "autoScaling", {"metrics": [{"resource": {"name": "cpu"}}]}),
        (("spec", "predictor"), "autoScaling", {"behavior": {"scaleUp": {"policies": [{"type": "Pods"}]}}}),
        (("spec", "predictor", "securityContext"), "runAsUser", "1000"),
        (("spec", "predictor", "containers", 0), "livenessProb", {}),
    ],
)
def test_the_schema_of_kserve_finds_what_is_wrong(place: tuple[str | int, ...], name: str, value: object) -> None:
    (service,) = documents(DEPLOY / "kserve.yaml")
    where: Any = service
    for step in place:
        where = where[step]
    where[name] = value
    (found, *_) = inference_service_errors(service)
    assert found[: len(place)] == tuple(map(str, place))


@pytest.mark.parametrize("owner", ["Deployment", "InferenceService", "Proxy"])
def test_pod_can_do_nothing_but_serve(owner: str) -> None:
    pod = pod_specs()[owner]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    places = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    writable = {place for place, volume in places.items() if "emptyDir" in volume}
    assert writable == ({"/tmp/anatomynet-nginx"} if owner == "Proxy" else {"/dev/shm", "/tmp"})
    assert set(places) - writable == ({"/etc/anatomynet"} if owner == "Proxy" else set())
    if owner != "Proxy":
        assert places["/dev/shm"]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("owner", ["Deployment", "InferenceService"])
def test_pod_is_judged_by_a_real_inference_and_not_for_being_busy(owner: str) -> None:
    (container,) = pod_specs()[owner]["containers"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] == "/v2/models/anatomynet/ready"
    liveness = container["livenessProbe"]
    assert liveness["timeoutSeconds"] > QUEUE_TIMEOUT_S
    shell, option, script = liveness["exec"]["command"]
    for status, alive in ((0, True), (1, True), (2, False)):
        told = re.sub(r"^anatomynet-client [^;]+", f"(exit {status})", script)
        assert told != script
        assert (subprocess.run([shell, option, told], check=False).returncode == 0) == alive


def test_clients_find_every_pod() -> None:
    service, deployment = only("Service"), only("Deployment")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in pod_specs()["Deployment"]["containers"][0]["ports"]}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports


def test_autoscaler_reads_what_prometheus_records() -> None:
    (metric,) = only("HorizontalPodAutoscaler")["spec"]["metrics"]
    (rule,) = documents(DEPLOY / "prometheus" / "adapter.yaml")[0]["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    recorded = {rule["record"] for rule in alarm_rules() if "record" in rule}
    assert set(re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])) <= recorded


# --- the container


def test_the_image_is_pinned_past_the_fixes() -> None:
    (tag,) = re.findall(r"^ARG TRITON=\S+/tritonserver:(\d+\.\d+)-py3$", CONTAINERFILE, re.MULTILINE)
    assert tuple(map(int, tag.split("."))) >= OLDEST_TRITON
    assert "26.07" in (ROOT / "SECURITY.md").read_text()


def test_the_container_runs_as_nobody_and_copies_what_is_there() -> None:
    lines = CONTAINERFILE.replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith(("#", " "))]
    last = max(i for i, step in enumerate(steps) if step[0] == "FROM")
    (user,) = [rest for name, rest in steps[last:] if name == "USER"]
    assert user == "1000:1000"
    assert not any(name == "RUN" for name, _ in steps[last:])
    allowed = (DEPLOY / "container" / "Containerfile.dockerignore").read_text().splitlines()
    for name, rest in steps:
        if name == "COPY" and "--from" not in rest:
            *sources, _ = [word for word in shlex.split(rest) if not word.startswith("--")]
            for source in sources:
                assert source == "triton_repo/" or (ROOT / source).exists(), source
                assert f"!{source.rstrip('/')}" in allowed


def stage(name: str) -> str:
    """What a stage of the image does, a step a line."""
    (text,) = re.findall(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM )", CONTAINERFILE, re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.replace("\\\n", " ").splitlines() if not line.startswith("#"))


def test_the_image_for_a_gpu_has_what_compiles_its_kernels() -> None:
    assert "apt-get" not in stage("server-cpu")
    assert {"gcc", "libc6-dev", "python3-dev"} <= set(stage("server-gpu").split())


@pytest.mark.parametrize(("cuda", "status"), [('"13.0"', 0), ("None", 1)], ids=["for CUDA", "for CPUs"])
def test_the_image_for_a_gpu_takes_no_pytorch_for_cpus(cuda: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"class version:\n    cuda = {cuda}\n")
    (program,) = re.findall(r"python -c '([^']+)'", stage("packages-gpu"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, check=False, stderr=subprocess.DEVNULL)
    assert run.returncode == status


def test_kernels_are_kept_where_the_image_may_write_and_run_them() -> None:
    """Docker's --tmpfs lets nothing be run unless it is told to; a pod's emptyDir does."""
    (cache,) = re.findall(r"\bTRITON_CACHE_DIR=(\S+)", CONTAINERFILE)
    assert Path(cache).parent == Path("/tmp")
    (command,) = re.findall(r"^    docker run --gpus.*?anatomynet-server:\S+$", README, re.DOTALL | re.MULTILINE)
    assert "--tmpfs /tmp:exec " in command
    (container,) = pod_specs()["Deployment"]["containers"]
    assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.fixture(scope="module")
def served(random_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """What the container's entry point starts, from a repository that nobody may write."""
    if not has_server():
        pytest.skip("no tritonserver here: pip install 'anatomynet[serve]'")
    folder = tmp_path_factory.mktemp("served")
    repository = shutil.copytree(random_repository, folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (repository, *repository.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    os.environ["ANATOMYNET_ADMIN_KEY"] = SECRET
    try:
        with running_server(repository, *LOCAL, folder=folder, program=SERVE) as server:
            yield server
    finally:
        del os.environ["ANATOMYNET_ADMIN_KEY"]
        for path in (repository, *repository.rglob("*")):
            path.chmod(0o755)


# What each closed API answers over HTTP: path, body.
CLOSED = {
    "model-repository": ("/v2/repository/index", b"{}"),
    "load": ("/v2/repository/models/anatomynet/load", b"{}"),
    "unload": ("/v2/repository/models/anatomynet/unload", b"{}"),
    "shared-memory": ("/v2/systemsharedmemory/status", None),
    "cuda-shared-memory": ("/v2/cudasharedmemory/status", None),
    "trace": ("/v2/trace/setting", None),
    "logging": ("/v2/logging", None),
}
OPEN = ("/v2", "/v2/health/ready", "/v2/models/anatomynet", "/v2/models/anatomynet/config")


def http_status(server: RunningServer, path: str, body: bytes | None = None, key: str = "") -> int:
    request = urllib.request.Request(server.http_url + path, body, {KEY: key} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("api", CLOSED)
def test_closed_to_who_has_no_key(served: RunningServer, api: str) -> None:
    path, body = CLOSED[api]
    assert http_status(served, path, body) == 403
    assert http_status(served, path, body, "guessed") == 403


@pytest.mark.parametrize("api", ["model-repository", "shared-memory", "trace", "logging"])
def test_open_to_who_has_the_key(served: RunningServer, api: str) -> None:
    assert http_status(served, *CLOSED[api], SECRET) == 200


@pytest.mark.parametrize("path", OPEN)
def test_open_to_clients(served: RunningServer, path: str) -> None:
    assert http_status(served, path) == 200


def test_closed_over_grpc_too(served: RunningServer) -> None:
    with grpc.InferenceServerClient(served.url) as client:
        for ask in (
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_trace_settings,
            client.get_log_settings,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                ask()
            ask(headers={f"triton-grpc-protocol-{KEY}": SECRET})


def test_no_model_is_loaded_with_the_key_either(served: RunningServer) -> None:
    """Model control mode none: what was exported and proven is what is served, until the container is another."""
    config = {"backend": "python", "max_batch_size": 0}
    code = base64.b64encode(b"raise SystemExit").decode()
    body = json.dumps({"parameters": {"config": json.dumps(config), "file:1/model.py": code}}).encode()
    for model, action in (("anatomynet", "unload"), ("planted", "load")):
        assert http_status(served, f"/v2/repository/models/{model}/{action}", body, SECRET) >= 400
    assert http_status(served, "/v2/models/anatomynet/ready") == 200


def test_volumes_are_drawn_through_it(served: RunningServer) -> None:
    hu = smooth_hu((9, 47, 131))
    with TritonRuntime(served.url) as runtime:
        assert runtime.infer(hu)[0].shape == hu.shape
        assert "by gRPC" in runtime.description
        assert not runtime.is_shared_memory_open()


def test_the_log_says_nothing_of_who_is_drawn(served: RunningServer) -> None:
    """Names cannot reach the server; what a client might call a request stays out of the log as well."""
    marked = "DOE^JANE"
    ct = grpc.InferInput("CT", (4, 64, 64), "INT16")  # refused as too small: an error is where a log would talk
    ct.set_data_from_numpy(np.full((4, 64, 64), -12345, np.int16))
    with grpc.InferenceServerClient(served.url) as client, pytest.raises(InferenceServerException):
        client.infer("anatomynet", [ct], request_id=marked)
    log = served.log.read_text()
    assert re.search(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ I ", log, re.MULTILINE)
    assert marked not in log
    assert "-12345" not in log


# --- Prometheus


def alarm_rules() -> list[dict[str, Any]]:
    groups = documents(DEPLOY / "prometheus" / "rules.yaml")[0]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "prometheus" / "dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def scraped(server: RunningServer) -> dict[str, float]:
    """Series and value, as Prometheus would find them."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {series: float(value) for series, value in pairs}


@pytest.fixture(scope="module")
def scrapes(random_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """A real server's metrics: at rest, after some volumes, with its queue full, and with its model dead."""
    if not has_server():
        pytest.skip("no tritonserver here: pip install 'anatomynet[serve]'")
    folder = tmp_path_factory.mktemp("metrics")
    repository = shutil.copytree(random_repository, folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--metrics-config=summary_latencies=true", "--exit-timeout-secs=1")
    with running_server(repository, *options, folder=folder, status=1, program=unwatched(folder)) as server:
        wait_until(lambda: listens(server.metrics_port), "its metrics: their port opens after READY")
        found = {"at rest": scraped(server)}
        with TritonRuntime(server.url, shared_memory="off") as runtime:
            # Triton may leave one for half a second in its queue, and the next: little beside what all of them compute.
            deadline = time.monotonic() + 60
            while not enough_computed(scraped(server)) and time.monotonic() < deadline:
                runtime.infer(smooth_hu((8, 32, 32)))
            found["after volumes"] = scraped(server)
            found["full"] = scrape_when_full(server)
            os.kill(model_process(server.process.pid), signal.SIGKILL)
            for _ in range(2):
                with pytest.raises(ServerError):
                    runtime.infer(smooth_hu((8, 32, 32)))
        found["dead"] = scraped(server)
    return found


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def enough_computed(metrics: dict[str, float]) -> bool:
    """That a pause in the queue is little beside it."""
    return metrics[COMPUTED_US] > max(1.5e6, metrics[QUEUED_US])


def scrape_when_full(server: RunningServer) -> dict[str, float]:
    """Metrics after a queue was full and is empty again, but for what they said of its length."""
    ct = grpc.InferInput("CT", SLOW_SHAPE, "INT16")
    ct.set_data_from_numpy(smooth_hu(SLOW_SHAPE))
    stop, before, answered = threading.Event(), scraped(server)[SUCCESSES], itertools.count()

    def ask_and_ask() -> None:
        with grpc.InferenceServerClient(server.url) as client:
            while not stop.is_set():
                try:
                    client.infer("anatomynet", [ct])
                    next(answered)
                except InferenceServerException:
                    stop.wait(0.05)

    clients = [threading.Thread(target=ask_and_ask) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        pending, deadline = 0.0, time.monotonic() + 30
        while pending < LARGEST_QUEUE and time.monotonic() < deadline:
            pending = scraped(server)['nv_inference_pending_request_count{model="anatomynet",version="1"}']
    finally:
        stop.set()
        for client in clients:
            client.join()
    total = before + next(answered)
    wait_until(lambda: scraped(server)[SUCCESSES] >= total)  # Triton counts a moment after its answer has left
    return scraped(server) | {'nv_inference_pending_request_count{model="anatomynet",version="1"}': pending}


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\bnv_\w+", expression))


@needs_server
def test_every_metric_exists_on_the_real_server(scrapes: dict[str, dict[str, float]]) -> None:
    exist = {series.split("{")[0] for series in scrapes["after volumes"]}
    expressions = [rule["expr"] for rule in alarm_rules()] + dashboard_expressions()
    used = set().union(*map(metrics_of, expressions))
    assert len(used) > 10
    assert used <= exist
    recorded = {rule["record"] for rule in alarm_rules() if "record" in rule}
    assert {name for e in expressions for name in re.findall(r"anatomynet:\w+:\w+", e)} <= recorded


@needs_promtool
def test_rules_and_dashboard_parse(tmp_path: Path) -> None:
    panels = [{"record": f"panel:{i}", "expr": e} for i, e in enumerate(dashboard_expressions())]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    files = [DEPLOY / "prometheus" / "rules.yaml", tmp_path / "panels.yaml"]
    subprocess.run(["promtool", "check", "rules", *files], check=True, capture_output=True)


@needs_promtool
def test_scrape_configuration_is_one(tmp_path: Path) -> None:
    """But for how pods are found: Debian's promtool is built without Kubernetes."""
    configuration = documents(DEPLOY / "prometheus" / "scrape.yaml")[0]
    (job,) = configuration["scrape_configs"]
    (found_by,) = job.pop("kubernetes_sd_configs")
    assert found_by == {"role": "pod", "namespaces": {"names": [only("Namespace")["metadata"]["name"]]}}
    assert f'job="{job["job_name"]}"' in next(rule["expr"] for rule in alarm_rules() if "up{" in rule["expr"])
    (tmp_path / "scrape.yaml").write_text(yaml.safe_dump(configuration))
    subprocess.run(["promtool", "check", "config", tmp_path / "scrape.yaml"], check=True, capture_output=True)


def fired(tmp_path: Path, before: dict[str, float], after: dict[str, float], *, up: int = 1) -> set[str]:
    """The alarms of a server whose metrics go from one scrape to the other each minute, for half an hour."""
    labels = 'instance="server:8002",job="anatomynet"'
    series = [{"series": f"up{{{labels}}}", "values": f"{up}x30"}]
    for name, value in after.items():
        named = name.replace("}", f",{labels}}}") if "{" in name else f"{name}{{{labels}}}"
        start = before.get(name, 0.0)
        grows = 0 if "pending" in name or "summary" in name or not name.startswith("nv_inf") else value - start
        first = value if "pending" in name else start
        series.append({"series": named, "values": f"{first:g}+{grows:g}x30" if np.isfinite(value) else "0x30"})
    names = [rule["alert"] for rule in alarm_rules() if "alert" in rule]
    raised = set()
    for name in names:
        quiet = {"eval_time": "25m", "alertname": name, "exp_alerts": []}
        test = {
            "rule_files": [str(DEPLOY / "prometheus" / "rules.yaml")],
            "evaluation_interval": "1m",
            "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": [quiet]}],
        }
        (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
        run = subprocess.run(
            ["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0 or "got:[" in run.stdout + run.stderr.replace(" ", ""), run.stdout + run.stderr
        if run.returncode:
            raised.add(name)
    return raised


@needs_server
@needs_promtool
def test_alarms_on_what_the_real_server_showed(scrapes: dict[str, dict[str, float]], tmp_path: Path) -> None:
    rest, volumes, full, dead = (scrapes[name] for name in ("at rest", "after volumes", "full", "dead"))
    assert fired(tmp_path, rest, rest) == set()
    assert fired(tmp_path, rest, volumes) == set()
    assert fired(tmp_path, volumes, full) == {"AnatomyNetQueueNearlyFull", "AnatomyNetQueueTooLong"}
    assert fired(tmp_path, full, dead) == {"AnatomyNetModelFails"}
    assert fired(tmp_path, rest, rest, up=0) == {"AnatomyNetDown"}
    waiting = rest | {'nv_inference_pending_request_count{model="anatomynet",version="1"}': 2.0}
    assert fired(tmp_path, waiting, waiting) == {"AnatomyNetStalled"}
    rejected = rest | {'nv_inference_request_failure{model="anatomynet",reason="REJECTED",version="1"}': 1.0}
    assert fired(tmp_path, rest, rejected) == {"AnatomyNetGivesUpOnVolumes"}
