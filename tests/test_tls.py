"""A client through the proxy that ships: real nginx, real certificates, a real server behind it."""

import os
import random
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from anatomynet.client.access import API_KEY_HEADER, API_KEY_VARIABLE, Access
from anatomynet.client.address import address_from_url
from anatomynet.client.channel import open_client
from anatomynet.client.cli import main
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.node import check_settings
from anatomynet.client.node_config import load_node_config
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.errors import ServerBusyError, ServerError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.engine.volume import CTVolume
from tests.garbage import grpc_garbage, http_garbage, say
from tests.random_network import CALIBRATION_SHAPE, smooth_hu
from tests.tls_proxy import (
    API_KEY,
    CLIENT_NAME,
    HOST,
    Certificates,
    Proxy,
    make_certificates,
    revoke,
    running_proxy,
    started_nginx,
)
from tests.triton_servers import RunningServer, free_ports
from tests.waiting import wait_until

plain_grpc = pytest.importorskip("grpc")
GenericRpcHandler: Any = plain_grpc.GenericRpcHandler
utils = pytest.importorskip("tritonclient.utils")

COMMAND = Path(sys.executable).with_name("anatomynet-client")
SHAPE = (24, 96, 128)
SMALL = (8, 32, 32)
# More than the proxy's burst, each a few milliseconds of computing.
FLOOD = 8
SHORT_S = 20.0
FUZZ_SEED = 1808
FUZZED = 500
# What a client has no need of: each would be answered by the server itself.
CLOSED = (
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "CudaSharedMemoryStatus",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "ModelStatistics",
    "TraceSetting",
    "LogSettings",
    "ModelStreamInfer",
    "NoSuchMethod",
)
# A proxy that says what is wrong by HTTP's status alone, as most do.
BARE_PROXY = """
pid {folder}/nginx.pid; error_log stderr; events {{}}
http {{
  access_log {folder}/bare.log; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port} http2; location / {{ return {status}; }} }}
}}
"""


@pytest.fixture(scope="module")
def embedded(random_onnx_files: tuple[Path, Path]) -> Runtime:
    return load_runtime(random_onnx_files[0])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def proxy(
    triton_server: RunningServer, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    with running_proxy(tmp_path_factory.mktemp("proxy"), certificates, [triton_server.url]) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls") / "study"
    geometry = VolumeGeometry(CALIBRATION_SHAPE, (1.0, 1.0, 2.5))
    write_ct_series(folder, CTVolume(smooth_hu(CALIBRATION_SHAPE), geometry))
    return folder


def info(*arguments: object, key: str = API_KEY) -> Result:
    environment = {API_KEY_VARIABLE: key or None}
    return CliRunner().invoke(main, ["info", *map(str, arguments), "--wait", "60"], env=environment)


# --- it works


def test_a_volume_through_the_proxy(proxy: Proxy, certificates: Certificates, embedded: Runtime) -> None:
    hu = smooth_hu(SHAPE)
    with TritonRuntime(proxy.url, access=certificates.access()) as runtime:
        label_map, confidence = runtime.infer(hu)
        assert f"at {proxy.url}, by gRPC" in runtime.description
        assert not runtime.is_shared_memory_open()
    np.testing.assert_array_equal(label_map, embedded.infer(hu)[0])
    np.testing.assert_array_equal(confidence, embedded.infer(hu)[1])


@pytest.mark.parametrize("way", ["environment", "file"])
def test_a_study_through_the_proxy_and_no_key_in_the_list_of_processes(
    proxy: Proxy, certificates: Certificates, study: Path, tmp_path: Path, way: str
) -> None:
    (tmp_path / "key").write_text(API_KEY)
    environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    options = ["--api-key-file", str(tmp_path / "key")] if way == "file" else []
    if way == "environment":
        environment[API_KEY_VARIABLE] = API_KEY
    command: list[str | Path] = [
        COMMAND,
        "segment",
        study,
        "--output",
        tmp_path / "rs.dcm",
        "--url",
        proxy.url,
        *certificates.options(),
    ]
    with subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        command_line = Path(f"/proc/{process.pid}/cmdline").read_text()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (tmp_path / "rs.dcm").is_file()
    assert f"at {proxy.url}, by gRPC" in output
    assert API_KEY not in command_line + output + errors + (tmp_path / "rs.dcm").read_bytes().decode("latin-1")


def test_no_option_takes_the_key_itself(proxy: Proxy) -> None:
    assert info("--url", proxy.url, "--api-key", API_KEY).exit_code == 2


def test_info_says_that_no_memory_is_shared(proxy: Proxy, certificates: Certificates) -> None:
    result = info("--url", proxy.url, *certificates.options())
    assert result.exit_code == 0, result.output
    assert "shared memory: closed" in result.output


def test_a_node_draws_through_the_proxy(proxy: Proxy, certificates: Certificates, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "key").write_text(API_KEY)
    names = {"ca": "tls_ca", "client": "tls_cert"}
    lines = [f'{option} = "{certificates.certificate(name)}"' for name, option in names.items()]
    settings = [
        'ae_title = "ANATOMYNET"\nport = 11112\nspool = "spool"',
        f'urls = ["{proxy.url}"]\napi_key_file = "key"\ntls_key = "{certificates.key("client")}"',
        *lines,
        '[[peer]]\nae_title = "CT"\naddress = "127.0.0.1"',
    ]
    (tmp_path / "node.toml").write_text("\n".join(settings))
    config = load_node_config(tmp_path / "node.toml")
    assert config.api_key_file == tmp_path / "key"
    before = proxy.log.read_text().count("ModelConfig 200")
    check_settings(config)
    wait_until(lambda: proxy.log.read_text().count("ModelConfig 200") > before, "a question in the proxy's log")
    (tmp_path / "key").write_text("")
    with pytest.raises(ServerError, match="key holds no API key"):  # not a server that is away, and may come back
        check_settings(config)


# --- what is refused, and how that is told


@dataclass(frozen=True)
class Refusal:
    """What is wrong with a call, and what is said of it."""

    message: str
    client: str | None = "client"
    ca: str = "ca"
    key: str = API_KEY
    host: str = HOST


REFUSALS = {
    "CA that does not match": Refusal(r"CERTIFICATE_VERIFY_FAILED: .*not from a CA of --tls-ca", ca="other-ca"),
    "name that does not match": Refusal(r"certificate is for another name: give --url the name", host="127.0.0.1"),
    "no certificate": Refusal(r"client certificate: NONE; give this client's with --tls-cert", client=None),
    "certificate expired": Refusal(r"client certificate: FAILED:certificate has expired; .*renew", client="expired"),
    "certificate of another CA": Refusal(r"does not take that of --tls-cert: its administrator", client="stranger"),
    "no API key": Refusal(r"API key missing or unknown; give the right one by --api-key-file or ANATOMY", key=""),
    "wrong API key": Refusal(r"API key missing or unknown; give the right one by --api-key-file", key="0" * 64),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line_at_once(proxy: Proxy, certificates: Certificates, refusal: Refusal) -> None:
    ca = ["--tls-ca", certificates.certificate(refusal.ca)]
    options = certificates.options(refusal.client, ca=refusal.ca) if refusal.client else ca
    start = time.monotonic()
    result = info("--url", f"https://{refusal.host}:{proxy.port}", *options, key=refusal.key)
    assert result.exit_code == 1
    assert re.search(refusal.message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert not refusal.key or refusal.key not in result.output
    assert time.monotonic() - start < SHORT_S  # of 60 s to wait for a server that is starting


def test_without_a_ca_only_public_ones_count(proxy: Proxy) -> None:
    assert "without --tls-ca only public CAs count" in info("--url", proxy.url).stderr


def test_a_proxy_whose_certificate_has_expired(
    triton_server: RunningServer, certificates: Certificates, tmp_path: Path
) -> None:
    with running_proxy(tmp_path, certificates, [triton_server.url], server_certificate="expired-server") as proxy:
        error = info("--url", proxy.url, *certificates.options()).stderr
    assert "certificate has expired; a certificate is past its date" in error
    assert error.count("\n") == 1


def test_a_certificate_that_was_lost_is_refused_once_it_is_listed(
    triton_server: RunningServer, certificates: Certificates, tmp_path: Path
) -> None:
    listed = revoke(certificates, "lost")
    asked_for = {"# ssl_crl /etc/anatomynet/tls/revoked.pem;": f"ssl_crl {listed};"}
    with running_proxy(tmp_path, certificates, [triton_server.url], changes=asked_for) as proxy:
        error = info("--url", proxy.url, *certificates.options("lost")).stderr
        assert "certificate revoked; it does not take that of --tls-cert" in error
        with TritonRuntime(proxy.url, access=certificates.access()) as runtime:
            assert runtime.infer(smooth_hu(SMALL))[0].shape == SMALL


def test_plain_text_to_a_port_of_tls(proxy: Proxy) -> None:
    result = info("--url", f"{HOST}:{proxy.port}")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "wants TLS: expected another port, or --url https://HOST:PORT" in result.stderr


def test_tls_to_a_port_of_plain_text(triton_server: RunningServer, certificates: Certificates) -> None:
    result = info("--url", f"https://{HOST}:{triton_server.grpc_port}", *certificates.options())
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "it speaks no TLS" in result.stderr


def test_no_memory_is_shared_through_a_proxy(proxy: Proxy, certificates: Certificates) -> None:
    result = info("--url", proxy.url, *certificates.options(), "--shared-memory", "on")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "may stand for several servers" in result.stderr


def test_old_tls_is_refused(proxy: Proxy) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as connection,
        pytest.raises(ssl.SSLError, match="alert protocol version"),
    ):
        old.wrap_socket(connection)


@pytest.mark.parametrize("method", CLOSED)
def test_only_what_drawing_needs_is_open(proxy: Proxy, certificates: Certificates, method: str) -> None:
    access = certificates.access()
    credentials = plain_grpc.ssl_channel_credentials(access.ca, access.key, access.certificate)
    with plain_grpc.secure_channel(f"{HOST}:{proxy.port}", credentials) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        with pytest.raises(plain_grpc.RpcError) as caught:
            call(b"", metadata=((API_KEY_HEADER, API_KEY),), timeout=10)
    assert caught.value.code() is plain_grpc.StatusCode.PERMISSION_DENIED


def test_who_asks_too_often_is_told_and_served_later(
    triton_server: RunningServer, certificates: Certificates, tmp_path: Path
) -> None:
    """At a rate that a machine under load exceeds as well."""
    hu, told, answers, rarely = smooth_hu(SMALL), list[str](), [], {"rate=120r/m": "rate=12r/m", "burst=20": "burst=2"}
    with (
        running_proxy(tmp_path, certificates, [triton_server.url], changes=rarely) as proxy,
        TritonRuntime(proxy.url, access=certificates.access(), retries=False) as hasty,
        TritonRuntime(proxy.url, access=certificates.access(), tell=told.append) as patient,
    ):
        for _ in range(FLOOD):
            with suppress(ServerBusyError):
                answers.append(hasty.infer(hu)[0])
        assert 0 < len(answers) < FLOOD
        answers.append(patient.infer(hu)[0])
    assert any("over the rate limit; it was asked too often" in line and "trying again" in line for line in told)
    for label_map in answers:
        np.testing.assert_array_equal(label_map, answers[0])


def test_a_volume_that_is_too_large_is_refused_once(
    triton_server: RunningServer, certificates: Certificates, tmp_path: Path
) -> None:
    told: list[str] = []
    smaller = {"client_max_body_size 1g": "client_max_body_size 1m"}
    with (
        running_proxy(tmp_path, certificates, [triton_server.url], changes=smaller) as proxy,
        TritonRuntime(proxy.url, access=certificates.access(), tell=told.append) as runtime,
    ):
        with pytest.raises(ServerError, match="larger than this proxy takes") as caught:
            runtime.infer(smooth_hu((48, 256, 256)))
        assert runtime.infer(smooth_hu(SMALL))[0].shape == SMALL
    assert "\n" not in str(caught.value)
    assert told == []


def test_no_server_behind_the_proxy(certificates: Certificates, tmp_path: Path) -> None:
    with running_proxy(tmp_path, certificates, [f"127.0.0.1:{free_ports(1)[0]}"]) as proxy:
        told: list[str] = []
        with pytest.raises(ServerError, match="no server answers behind this proxy"):
            TritonRuntime(proxy.url, access=certificates.access(), wait_s=1.0, tell=told.append)
    assert "trying again" in told[0]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "as where no certificate that it knows"),
        (401, "give the right one by --api-key-file"),
        (403, "does not let this client in"),
        (413, "takes no volume of this size"),
    ],
)
def test_other_proxies_refusals_are_final(tmp_path: Path, status: int, message: str) -> None:
    told: list[str] = []
    with bare_proxy(tmp_path, status) as url, pytest.raises(ServerError, match=message) as caught:
        TritonRuntime(url, wait_s=60.0, tell=told.append)
    assert told == []
    assert f"status: {status}" in str(caught.value)


@pytest.mark.parametrize(("status", "error"), [(429, ServerBusyError), (503, ServerError), (502, ServerError)])
def test_other_proxies_that_are_busy_are_asked_again_for_a_while(
    tmp_path: Path, status: int, error: type[ServerError]
) -> None:
    told: list[str] = []
    start = time.monotonic()
    with bare_proxy(tmp_path, status) as url, pytest.raises(error, match=f"status: {status}"):
        TritonRuntime(url, wait_s=3.0, tell=told.append)
    assert 1 <= len(told) <= 6
    assert time.monotonic() - start < SHORT_S


@contextmanager
def bare_proxy(folder: Path, status: int) -> Iterator[str]:
    (port,) = free_ports(1)
    configuration = folder / "nginx.conf"
    configuration.write_text(BARE_PROXY.format(folder=folder, port=port, status=status))
    with started_nginx(configuration, folder, port):
        yield f"127.0.0.1:{port}"


def test_garbage_at_the_proxy(proxy: Proxy, certificates: Certificates, embedded: Runtime) -> None:
    """In plain text, where a handshake is due; and from a client that it knows, after one."""
    rng = random.Random(FUZZ_SEED)
    good = b'{"inputs":[]}'
    for _ in range(FUZZED):
        say(proxy.port, grpc_garbage(rng) if rng.random() < 0.5 else http_garbage(rng, good, len(good)))
    known = ssl.create_default_context(cafile=certificates.certificate("ca"))
    known.load_cert_chain(certificates.certificate("client"), certificates.key("client"))
    known.set_alpn_protocols(["h2"])
    for _ in range(FUZZED):
        with (
            socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection,
            known.wrap_socket(connection, server_hostname=HOST) as secured,
            suppress(OSError),
        ):
            secured.settimeout(0.02)
            secured.sendall(grpc_garbage(rng))
            secured.recv(4096)
    hu = smooth_hu(SMALL)
    with TritonRuntime(proxy.url, access=certificates.access()) as runtime:
        np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])


# --- what is sent, and what is written down


def test_the_log_names_nobody(proxy: Proxy, certificates: Certificates) -> None:
    before = proxy.log.read_text().count("grpc=16")
    with TritonRuntime(proxy.url, access=certificates.access()) as runtime:
        runtime.infer(smooth_hu(SMALL))
    info("--url", proxy.url, *certificates.options(), key="f00d" * 16)
    wait_until(lambda: proxy.log.read_text().count("grpc=16") > before, "who was refused, in the proxy's log")
    log = proxy.log.read_text()
    infers = [line for line in log.splitlines() if "ModelInfer 200" in line]
    assert infers
    assert f'client="{CLIENT_NAME}"' in infers[-1]
    assert re.search(r"in=\d+ out=\d+ seconds=[\d.]+ server=127\.0\.0\.1:\d+ tls=TLSv1\.[23]$", infers[-1])
    for secret in (API_KEY, "f00d" * 16, "CN="):
        assert secret not in log


class Listener(GenericRpcHandler):  # type: ignore[misc]
    """Stands where a server does, and keeps the headers of what it is asked."""

    def __init__(self) -> None:
        self.headers: list[dict[str, Any]] = []

    def service(self, details: Any) -> None:
        self.headers.append(dict(details.invocation_metadata))


@contextmanager
def listening(certificates: Certificates | None = None) -> Iterator[tuple[Listener, int]]:
    """The listener and its port; through TLS where there are certificates."""
    listener = Listener()
    with futures.ThreadPoolExecutor(1) as threads:
        server = plain_grpc.server(threads, handlers=[listener])
        if certificates:
            pair = (certificates.key("server").read_bytes(), certificates.certificate("server").read_bytes())
            port = server.add_secure_port(f"{HOST}:0", plain_grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(f"{HOST}:0")
        server.start()
        try:
            yield listener, port
        finally:
            server.stop(None).wait()


def test_the_key_ends_at_the_proxy(certificates: Certificates, tmp_path: Path) -> None:
    with (
        listening() as (listener, port),
        running_proxy(tmp_path, certificates, [f"{HOST}:{port}"]) as proxy,
        pytest.raises(ServerError),
    ):
        TritonRuntime(proxy.url, access=certificates.access())
    assert listener.headers
    assert all(API_KEY_HEADER not in headers for headers in listener.headers)


@pytest.mark.parametrize("secure", [True, False])
def test_the_key_goes_with_every_call_and_never_in_plain_text(certificates: Certificates, secure: bool) -> None:
    access = Access(ca=certificates.access().ca, api_key=API_KEY)
    with listening(certificates if secure else None) as (listener, port):
        client = open_client(address_from_url(f"{'https://' if secure else ''}{HOST}:{port}"), access)
        for call in (client.get_server_metadata, lambda: client.get_model_config("anatomynet")):
            with pytest.raises(utils.InferenceServerException, match="not found"):
                call()
        client.close()
    assert [headers.get(API_KEY_HEADER) for headers in listener.headers] == [API_KEY if secure else None] * 2


def test_no_thread_of_grpcs_asks_python_for_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that was refused hung when it was closed: that thread held a lock of gRPC's."""
    monkeypatch.setattr(plain_grpc, "metadata_call_credentials", lambda *_: pytest.fail("asked for by a thread"))
    with open_client(address_from_url("https://localhost:1"), Access(api_key=API_KEY)) as client:
        assert client.plugin()
    with open_client(address_from_url("localhost:1"), Access(api_key=API_KEY)) as client:
        assert not client.plugin()


def test_several_threads_use_one_connection(proxy: Proxy, certificates: Certificates, embedded: Runtime) -> None:
    volumes = [smooth_hu(SMALL, seed=seed) for seed in range(4)]
    with (
        TritonRuntime(proxy.url, access=certificates.access()) as runtime,
        futures.ThreadPoolExecutor(len(volumes)) as pool,
    ):
        answers = list(pool.map(runtime.infer, volumes))
    for hu, (labels, _) in zip(volumes, answers, strict=True):
        np.testing.assert_array_equal(labels, embedded.infer(hu)[0])
