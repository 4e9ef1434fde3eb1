"""A real nginx with the configuration that ships, before real servers; openssl makes the certificates."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from anatomynet.client.access import Access, read_access
from tests.triton_servers import free_ports

CONFIGURATION = Path(__file__).resolve().parent.parent / "deploy" / "nginx" / "nginx.conf"
# What the proxy of a test knows of its clients.
API_KEY, CLIENT_NAME = "5eed" * 16, "planning"
HOST = "localhost"
START_TIMEOUT_S = 60.0
EXPIRED, VALID = "20200101000000Z", "20991231235959Z"


@dataclass(frozen=True)
class Certificates:
    """PEM files in a folder: two CAs ("ca", "other-ca"), and certificates by what they are, each with its key."""

    folder: Path

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def options(self, client: str = "client", *, ca: str = "ca") -> list[str]:
        """Of anatomynet-client."""
        files = {
            "--tls-ca": self.certificate(ca),
            "--tls-cert": self.certificate(client),
            "--tls-key": self.key(client),
        }
        return [word for name, path in files.items() for word in (name, str(path))]

    def access(self, api_key: str = API_KEY) -> Access:
        """Of a client that the proxy knows."""
        return read_access(
            tls_ca=self.certificate("ca"),
            tls_cert=self.certificate("client"),
            tls_key=self.key("client"),
            environment={"ANATOMYNET_API_KEY": api_key} if api_key else {},
        )


def make_certificates(folder: Path) -> Certificates:
    """For a proxy at localhost: "server" and "expired-server"; for clients "client", "expired", "lost", "stranger"."""
    made = Certificates(folder)
    for ca in ("ca", "other-ca"):
        openssl("req", "-x509", *new_key(made, ca), "-subj", f"/CN={ca}", "-days", "2", "-out", made.certificate(ca))
        (folder / f"{ca}.index").touch()
    for name, ca, use, until in (
        ("server", "ca", f"subjectAltName=DNS:{HOST}", VALID),
        ("expired-server", "ca", f"subjectAltName=DNS:{HOST}", EXPIRED),
        ("client", "ca", "extendedKeyUsage=clientAuth", VALID),
        ("expired", "ca", "extendedKeyUsage=clientAuth", EXPIRED),
        ("lost", "ca", "extendedKeyUsage=clientAuth", VALID),
        ("stranger", "other-ca", "extendedKeyUsage=clientAuth", VALID),
    ):
        issue(made, name, ca=ca, use=use, until=until)
    return made


def new_key(made: Certificates, name: str) -> list[str | Path]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", made.key(name)]


def issue(made: Certificates, name: str, *, ca: str, use: str, until: str) -> None:
    """`openssl ca`, since only that takes dates of the past."""
    request, settings = made.folder / f"{name}.csr", made.folder / f"{name}.conf"
    settings.write_text(
        f"[ca]\ndefault_ca = c\n[c]\ndatabase = {made.folder}/{ca}.index\nnew_certs_dir = {made.folder}\n"
        f"default_md = sha256\npolicy = p\nrand_serial = yes\n[p]\ncommonName = supplied\n[e]\n{use}\n"
    )
    openssl("req", "-new", *new_key(made, name), "-subj", f"/CN={name}", "-out", request)
    signed: list[str | Path] = [
        "-cert",
        made.certificate(ca),
        "-keyfile",
        made.key(ca),
        "-in",
        request,
        "-out",
        made.certificate(name),
    ]
    dates = ["-startdate", "20190101000000Z", "-enddate", until]
    openssl("ca", "-batch", "-notext", "-config", settings, "-extensions", "e", *dates, *signed)


def revoke(made: Certificates, name: str, *, ca: str = "ca") -> Path:
    """Takes a certificate back; the CA's list of those."""
    listed, settings = made.folder / f"{ca}.crl", made.folder / f"{name}.conf"
    signer: list[str | Path] = ["-config", settings, "-cert", made.certificate(ca), "-keyfile", made.key(ca)]
    openssl("ca", *signer, "-revoke", made.certificate(name))
    openssl("ca", *signer, "-gencrl", "-crldays", "2", "-out", listed)
    return listed


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def find_nginx() -> str:
    """The program; Debian keeps it where only root looks."""
    program = shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("nginx is not installed: apt install nginx")
    return program


@dataclass(frozen=True)
class Proxy:
    """`log` is nginx's own of requests."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"


@contextmanager
def running_proxy(
    folder: Path,
    certificates: Certificates,
    servers: Sequence[str],
    *,
    server_certificate: str = "server",
    changes: Mapping[str, str] | None = None,
) -> Iterator[Proxy]:
    """nginx with the shipped configuration, on a free port of this machine, before servers at HOST:PORT.

    Args:
        folder: for all that it reads and writes.
        changes: other values than the shipped ones; each must stand in the file.
    """
    (port,) = free_ports(1)
    site = folder / "site"
    (site / "tls").mkdir(parents=True)
    (folder / "run").mkdir()
    for name, source in {
        "server.pem": certificates.certificate(server_certificate),
        "server.key": certificates.key(server_certificate),
        "clients.pem": certificates.certificate("ca"),
    }.items():
        shutil.copy(source, site / "tls" / name)
    (site / "api-keys").write_text(f'"{API_KEY}" {CLIENT_NAME};\n')
    (site / "servers").write_text("".join(f"server {url} max_fails=1 fail_timeout=5s;\n" for url in servers))
    text = CONFIGURATION.read_text()
    places = {
        "/etc/anatomynet": str(site),
        "/tmp/anatomynet-nginx": str(folder / "run"),
        "/dev/stdout": str(folder / "requests.log"),
        "listen 8443 ": f"listen 127.0.0.1:{port} ",
    }
    for shipped, here in {**(changes or {}), **places}.items():
        assert shipped in text, shipped
        text = text.replace(shipped, here)
    (site / "nginx.conf").write_text(text)
    with started_nginx(site / "nginx.conf", folder, port):
        yield Proxy(port, folder / "requests.log")


@contextmanager
def started_nginx(configuration: Path, folder: Path, port: int) -> Iterator[None]:
    """nginx with a configuration, which listens at a port of this machine inside the block."""
    command: list[str | Path] = [find_nginx(), "-c", configuration, "-p", folder, "-g", "daemon off;"]
    with (folder / "nginx.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _listens(port):
                running = process.poll() is None and time.monotonic() < deadline
                assert running, (folder / "nginx.log").read_text()
                time.sleep(0.02)
            yield
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
