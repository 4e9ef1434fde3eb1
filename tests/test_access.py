"""client/access.py: what is wrong with a file is told in one line before anything is sent, and no secret is told."""

import subprocess
from pathlib import Path

import pytest

from anatomynet.client.access import API_KEY_VARIABLE, Access, read_access
from anatomynet.client.address import address_from_url
from anatomynet.client.connection import ServerOptions, access_to, choose_runtime
from anatomynet.engine.errors import ServerError
from tests.tls_proxy import Certificates, make_certificates

SECRET = "5eed1808" * 8


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "api-key"
    path.write_text(f"{SECRET}\n")
    return path


def test_reads_what_it_is_given(certificates: Certificates, key_file: Path) -> None:
    access = read_access(
        tls_ca=certificates.certificate("ca"),
        tls_cert=certificates.certificate("client"),
        tls_key=certificates.key("client"),
        api_key_file=key_file,
    )
    assert access.ca == certificates.certificate("ca").read_bytes()
    assert access.certificate == certificates.certificate("client").read_bytes()
    assert access.key == certificates.key("client").read_bytes()
    assert access.api_key == SECRET
    assert access.given == ("--tls-ca", "--tls-cert", "--tls-key", "--api-key-file")


def test_a_file_of_the_key_goes_before_the_variable(key_file: Path) -> None:
    environment = {API_KEY_VARIABLE: "another"}
    assert read_access(environment=environment).api_key == "another"
    assert read_access(api_key_file=key_file, environment=environment).api_key == SECRET
    assert read_access(environment={}) == Access()


def test_secrets_are_not_shown(certificates: Certificates, key_file: Path) -> None:
    access = read_access(
        tls_cert=certificates.certificate("client"), tls_key=certificates.key("client"), api_key_file=key_file
    )
    assert SECRET not in repr(access)
    assert "PRIVATE" not in repr(access)


BAD_FILES = {
    "CA not PEM": ({"tls_ca": "text"}, "text is not PEM: expected a certificate of a CA"),
    "CA is a key": ({"tls_ca": "client.key"}, r"client\.key is not PEM: expected a certificate of a CA"),
    "CA is DER": ({"tls_ca": "client.der"}, r"client\.der is not PEM"),
    "CA missing": ({"tls_ca": "nowhere"}, "nowhere cannot be read .No such file"),
    "CA is a folder": ({"tls_ca": "."}, "cannot be read .Is a directory"),
    "empty": ({"tls_ca": "empty"}, "empty is not PEM"),
    "certificate not PEM": ({"tls_cert": "text", "tls_key": "client.key"}, "text is not PEM: .* of this client"),
    "key not PEM": ({"tls_cert": "client.pem", "tls_key": "text"}, "text is not PEM: expected the private key of"),
    "key missing": ({"tls_cert": "client.pem", "tls_key": "nowhere"}, "nowhere cannot be read"),
    "another's key": (
        {"tls_cert": "client.pem", "tls_key": "server.key"},
        r"server\.key is not the key of .*client\.pem",
    ),
    "key encrypted": ({"tls_cert": "client.pem", "tls_key": "encrypted.key"}, r"encrypted, .*openssl pkey"),
    "key alone": ({"tls_key": "client.key"}, "without its certificate: give --tls-cert"),
    "certificate alone": ({"tls_cert": "client.pem"}, "without its key: give --tls-key"),
    "API key of two words": ({"api_key_file": "text"}, "text holds no API key"),
    "API key empty": ({"api_key_file": "empty"}, "empty holds no API key"),
    "API key missing": ({"api_key_file": "nowhere"}, "nowhere cannot be read"),
}


@pytest.mark.parametrize(("files", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line(certificates: Certificates, files: dict[str, str], message: str) -> None:
    folder = certificates.folder
    (folder / "text").write_text("no certificate at all\n")
    (folder / "empty").write_text("")
    encrypt: list[str | Path] = ["openssl", "pkey", "-in", folder / "client.key", "-aes256", "-passout", "pass:secret"]
    subprocess.run([*encrypt, "-out", folder / "encrypted.key"], check=True)
    to_der: list[str | Path] = [
        "openssl",
        "x509",
        "-in",
        folder / "client.pem",
        "-outform",
        "DER",
        "-out",
        folder / "client.der",
    ]
    subprocess.run(to_der, check=True)
    with pytest.raises(ServerError, match=message) as caught:
        read_access(**{name: folder / file for name, file in files.items()}, environment={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["", " ", "two words", "line\nbreak", "naïve", "x\x00y"])
def test_a_variable_that_is_no_key(key: str) -> None:
    with pytest.raises(ServerError, match=f"{API_KEY_VARIABLE} is no API key") as caught:
        read_access(environment={API_KEY_VARIABLE: key})
    assert not key.strip() or key not in str(caught.value)


# --- never in plain text


def test_what_is_for_tls_is_not_passed_over(key_file: Path) -> None:
    for urls in (("localhost:8001",), ("https://localhost:8443", "localhost:8001")):
        with pytest.raises(ServerError, match=r"localhost:8001 is spoken to in plain text, and --api-key-file"):
            choose_runtime(ServerOptions(urls=urls, api_key_file=key_file))
    with pytest.raises(ServerError, match="--api-key-file without a server: expected --url https"):
        choose_runtime(ServerOptions(api_key_file=key_file))


def test_a_key_of_the_environment_is_for_those_servers_that_speak_tls() -> None:
    """It may be there for other servers: a plain one is asked without it; see test_tls.py for what is sent."""
    read_access(environment={API_KEY_VARIABLE: SECRET}).check_fits(address_from_url("localhost:8001"))


@pytest.mark.parametrize("value", ["", "two words", SECRET])
def test_a_variable_is_looked_at_only_where_it_would_be_sent(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Compose files and the like set it, empty, where there is no key."""
    monkeypatch.setenv(API_KEY_VARIABLE, value)
    for urls in ((), ("localhost:8001",)):
        assert access_to(ServerOptions(urls=urls)) == Access()
    secure = ServerOptions(urls=("localhost:8001", "https://localhost:8443"))
    if value == SECRET:
        assert access_to(secure).api_key == SECRET
        return
    with pytest.raises(ServerError, match=f"{API_KEY_VARIABLE} is no API key"):
        access_to(secure)
