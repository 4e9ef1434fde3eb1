"""deploy/kubernetes/proxy: who reaches whom, and a real nginx that starts with what its pod mounts."""

import base64
import http.client
import ipaddress
import json
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import threading
import time
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anatomynet.client.access import API_KEY_HEADER
from tests.manifests import DEPLOY, PROXY, ROOT, documents, needs_kubectl, only, pod_specs
from tests.tls_proxy import (
    API_KEY,
    CLIENT_NAME,
    HOST,
    Certificates,
    find_nginx,
    make_certificates,
    started_nginx,
)
from tests.triton_servers import free_ports

grpc = pytest.importorskip("grpc")

# What SECURITY.md says that it must be past.
OLDEST_NGINX = (1, 30, 7)
# The first that asks for the servers' names anew.
RESOLVING_NGINX = (1, 27, 3)


# --- who reaches whom


def pods_of(name: str) -> dict[str, str]:
    """A Deployment's labels."""
    labels: dict[str, str] = only("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    return labels


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted: dict[str, str] = selector["matchLabels"]
    return wanted.items() <= labels.items()


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget", "NetworkPolicy"])
@pytest.mark.parametrize(("name", "other"), [("anatomynet", PROXY), (PROXY, "anatomynet")])
def test_each_speaks_of_its_own_pods(kind: str, name: str, other: str) -> None:
    spec = only(kind, name)["spec"]
    selector = {"matchLabels": spec["selector"]} if kind == "Service" else spec.get("selector", spec.get("podSelector"))
    assert selects(selector, pods_of(name))
    assert not selects(selector, pods_of(other))


def test_only_the_proxy_reaches_the_servers_from_outside_the_namespace() -> None:
    inside, metrics = only("NetworkPolicy")["spec"]["ingress"]
    assert [peer.keys() for peer in inside["from"]] == [{"podSelector"}]  # this namespace's alone
    assert inside["ports"] == [{"port": 8001}]
    assert selects(inside["from"][0]["podSelector"], pods_of(PROXY))
    assert not selects(inside["from"][0]["podSelector"], pods_of("anatomynet"))
    assert metrics["ports"] == [{"port": 8002}]
    assert all(peer["namespaceSelector"]["matchLabels"] for peer in metrics["from"])


def test_the_proxy_reaches_the_servers_and_their_names_alone() -> None:
    spec = only("NetworkPolicy", PROXY)["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [{"ports": [{"port": 8443}]}]
    servers, names = spec["egress"]
    assert selects(servers["to"][0]["podSelector"], pods_of("anatomynet"))
    assert servers["ports"] == [{"port": 8001}]
    assert {port["port"] for port in names["ports"]} == {53}


def test_the_service_leads_from_private_networks_to_where_nginx_listens() -> None:
    spec = only("Service", PROXY)["spec"]
    (listens,) = re.findall(r"^ *listen (\d+) ssl", (DEPLOY / "nginx" / "nginx.conf").read_text(), re.MULTILINE)
    (port,) = spec["ports"]
    (inside,) = pod_specs()["Proxy"]["containers"][0]["ports"]
    assert (port["port"], port["targetPort"], inside["containerPort"]) == (int(listens), inside["name"], int(listens))
    assert all(ipaddress.ip_network(network).is_private for network in spec["loadBalancerSourceRanges"])


def test_the_proxy_asks_for_every_pod_of_the_headless_service() -> None:
    service, namespace = only("Service"), only("Namespace")["metadata"]["name"]
    (grpc_port,) = [port["port"] for port in service["spec"]["ports"] if port["name"] == "grpc"]
    directives = nginx_directives((DEPLOY / "nginx" / "servers.kubernetes").read_text())
    (server,) = [words for words in directives if words[0] == "server"]
    assert server[1] == f"{service['metadata']['name']}.{namespace}.svc.cluster.local:{grpc_port}"
    assert "resolve" in server
    assert "resolver" in [words[0] for words in directives]


def nginx_directives(text: str) -> list[list[str]]:
    return [d.split() for d in re.sub(r"#.*", "", text).split(";") if d.strip()]


def test_the_proxy_is_pinned_past_the_fixes() -> None:
    images = documents(DEPLOY / "kubernetes" / "kustomization.yaml")[0]["images"]
    (tag,) = [image["newTag"] for image in images if image["name"] == "nginx"]
    assert tuple(map(int, tag.split("."))) >= OLDEST_NGINX
    assert f"nginx >= {'.'.join(map(str, OLDEST_NGINX))}" in (ROOT / "SECURITY.md").read_text()


def test_a_new_proxy_waits_for_the_longest_volume_of_the_old() -> None:
    pod = pod_specs()["Proxy"]
    (longest,) = re.findall(r"grpc_read_timeout (\d+)s;", (DEPLOY / "nginx" / "nginx.conf").read_text())
    waits = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > waits + int(longest)


# --- nginx, with what the pod mounts


def mounted_files() -> dict[str, tuple[str, str]]:
    """Of the proxy's configuration: path below its mount -> the Secret and key, or "" and the file in deploy/nginx."""
    (generator,) = documents(DEPLOY / "nginx" / "kustomization.yaml")[0]["configMapGenerator"]
    projected = pod_specs()["Proxy"]["volumes"][0]["projected"]
    found: dict[str, tuple[str, str]] = {}
    for source in projected["sources"]:
        if "configMap" in source:
            assert source["configMap"]["name"] == generator["name"]
            found |= {file.split("=")[0]: ("", file.split("=")[-1]) for file in generator["files"]}
        else:
            secret = source["secret"]
            found |= {item["path"]: (secret["name"], item["key"]) for item in secret["items"]}
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def site_files(made: Certificates) -> dict[tuple[str, str], Path]:
    """What a site puts into its Secrets: Secret and key -> file."""
    (made.folder / "api-keys").write_text(f'"{API_KEY}" {CLIENT_NAME};\n')
    return {
        (f"{PROXY}-tls", "tls.crt"): made.certificate("server"),
        (f"{PROXY}-tls", "tls.key"): made.key("server"),
        (f"{PROXY}-clients", "clients.pem"): made.certificate("ca"),
        (f"{PROXY}-clients", "api-keys"): made.folder / "api-keys",
    }


@dataclass(frozen=True)
class MountedProxy:
    """What the proxy's pod finds at its mounts, laid below a folder; `command` is the manifest's, of this nginx."""

    folder: Path
    command: list[str]
    port: int

    @property
    def configuration(self) -> Path:
        return Path(self.command[self.command.index("-c") + 1])


@pytest.fixture
def mounted(site_files: dict[tuple[str, str], Path], tmp_path: Path) -> MountedProxy:
    (container,) = pod_specs()["Proxy"]["containers"]
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    (port,) = free_ports(1)
    for place in places.values():
        (tmp_path / place.strip("/")).mkdir(parents=True)
    for path, (secret, key) in mounted_files().items():
        there = tmp_path / places["configuration"].strip("/") / path
        there.parent.mkdir(exist_ok=True)
        text = (site_files[secret, key] if secret else DEPLOY / "nginx" / key).read_text()
        there.write_text(as_here(text, path, {place: f"{tmp_path}{place}" for place in places.values()}, port))
    name, *options = [
        word.replace(places["configuration"], f"{tmp_path}{places['configuration']}") for word in container["command"]
    ]
    assert name == "nginx"
    return MountedProxy(tmp_path, [find_nginx(), *options], port)


def as_here(text: str, path: str, places: dict[str, str], port: int) -> str:
    """Other places and a free port; no cluster's DNS; and for an nginx that asks for no names anew, an address."""
    if path == "nginx.conf":
        for shipped, here in {**places, "listen 8443 ": f"listen 127.0.0.1:{port} "}.items():
            assert shipped in text, shipped
            text = text.replace(shipped, here)
    if path == "servers":
        text = re.sub(r"\bkube-dns\.\S+", "127.0.0.1", text)
        if nginx_version() < RESOLVING_NGINX:
            text = re.sub(r"^resolver .*$|\bresolve\b", "", text, flags=re.MULTILINE)
            text = re.sub(r"\banatomynet\.\S+:", "127.0.0.1:", text)
    return text


def nginx_version() -> tuple[int, ...]:
    said = subprocess.run([find_nginx(), "-v"], check=True, capture_output=True, text=True).stderr
    (version,) = re.findall(r"nginx/([\d.]+)", said)
    return tuple(map(int, version.split(".")))


def test_nginx_takes_what_the_pod_mounts(mounted: MountedProxy) -> None:
    judged = subprocess.run([*mounted.command, "-t"], capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stderr


@pytest.mark.parametrize("path", sorted(set(mounted_files()) - {"nginx.conf"}))
def test_nginx_wants_each_file_that_the_pod_mounts(mounted: MountedProxy, path: str) -> None:
    (mounted.configuration.parent / path).unlink()
    judged = subprocess.run([*mounted.command, "-t"], capture_output=True, text=True, check=False)
    assert judged.returncode != 0
    assert path in judged.stderr


def test_all_that_nginx_writes_lies_where_it_may(mounted: MountedProxy) -> None:
    """What it made at its start, of all that the pod mounts; the rest of its root is read-only."""
    before = set(mounted.folder.rglob("*"))
    with started_nginx(mounted.configuration, mounted.folder, mounted.port):
        made = set(mounted.folder.rglob("*")) - before
    scratch = mounted.folder / "tmp" / "anatomynet-nginx"
    made.discard(mounted.folder / "nginx.log")  # the test's own
    assert made
    assert all(path.is_relative_to(scratch) for path in made), made
    written = re.findall(r"^ *(?:pid|\w+_temp_path) (\S+);", mounted.configuration.read_text(), re.MULTILINE)
    assert len(written) == 6
    assert all(Path(path).is_relative_to(scratch) for path in written)


@pytest.mark.parametrize("probe", ["readinessProbe", "livenessProbe"])
def test_who_has_no_certificate_is_refused_and_that_tells_the_kubelet(mounted: MountedProxy, probe: str) -> None:
    """As it asks: HTTP/1.1 over TLS, any certificate taken, 200 to 399 is well. No server stands behind this proxy."""
    asked = pod_specs()["Proxy"]["containers"][0][probe]["httpGet"]
    assert (asked["scheme"], asked["port"]) == ("HTTPS", "https")
    trusting = ssl._create_unverified_context()
    with started_nginx(mounted.configuration, mounted.folder, mounted.port):
        connection = http.client.HTTPSConnection("127.0.0.1", mounted.port, timeout=10, context=trusting)
        connection.request("GET", asked["path"])
        answer = connection.getresponse()
        connection.close()
    assert 200 <= answer.status < 400
    assert answer.headers["grpc-status"] == "16"


def test_what_has_begun_is_finished_when_the_pod_is_stopped(
    mounted: MountedProxy, made: Certificates, tmp_path: Path
) -> None:
    """By SIGQUIT, which nginx's image names as its signal; in the place of a server, one that answers when told."""
    begun, finish = threading.Event(), threading.Event()

    def answer(request: bytes, _context: object) -> bytes:
        begun.set()
        finish.wait(30)
        return request

    method = "/inference.GRPCInferenceService/ModelInfer"
    service, name = method.strip("/").split("/")
    handler = grpc.method_handlers_generic_handler(service, {name: grpc.unary_unary_rpc_method_handler(answer)})
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[handler])
    (mounted.configuration.parent / "servers").write_text(
        f"server 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')};"
    )
    server.start()
    files = (made.certificate("ca"), made.key("client"), made.certificate("client"))
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    with (
        (tmp_path / "log").open("wb") as log,
        grpc.secure_channel(f"{HOST}:{mounted.port}", credentials) as channel,
        subprocess.Popen(mounted.command, stdout=log, stderr=log) as process,
    ):
        try:
            options = {"metadata": [(API_KEY_HEADER, API_KEY)], "timeout": 30, "wait_for_ready": True}
            asked = channel.unary_unary(method).future(b"voxels", **options)
            assert begun.wait(20), (tmp_path / "log").read_text()
            process.send_signal(signal.SIGQUIT)
            time.sleep(0.5)
            assert process.poll() is None
            finish.set()
            assert asked.result() == b"voxels"
            assert process.wait(30) == 0
        finally:
            finish.set()
            process.terminate()
    server.stop(None)


@needs_kubectl
def test_readme_makes_the_secrets_that_the_proxy_mounts(
    site_files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    for path, named in mounted_files().items():
        if named[0]:
            shutil.copy(site_files[named], tmp_path / Path(path).name)
    commands = re.findall(
        r"^    (kubectl -n anatomynet create secret (?:.*\\\n)*.*)$", (DEPLOY / "README.md").read_text(), re.MULTILINE
    )
    made = {}
    for command in commands:
        words = [*shlex.split(command), "--dry-run=client", "-o", "json"]
        secret = json.loads(subprocess.run(words, cwd=tmp_path, check=True, capture_output=True).stdout)
        for key, value in secret["data"].items():
            made[secret["metadata"]["name"], key] = base64.b64decode(value)
    assert made == {named: file.read_bytes() for named, file in site_files.items()}
    assert set(made) == {named for named in mounted_files().values() if named[0]}
