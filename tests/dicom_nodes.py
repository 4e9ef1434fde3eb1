"""Real DICOM nodes for tests: ours as a process, dcmtk's tools, Orthanc; and the series they send each other."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pydicom
import pytest

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.node_arrivals import Instance
from anatomynet.client.node_config import NodeConfig, Peer
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.volume import CTVolume
from tests.dicom_studies import PATIENT, edit
from tests.triton_servers import free_ports
from tests.waiting import wait_until

CLIENT = Path(sys.executable).with_name("anatomynet-client")
NODE_TITLE, CALLER = "ANATOMYNET", "CT_SIM"
START_TIMEOUT_S = 60
SMALL = VolumeGeometry((48, 128, 128), (2.0, 2.0, 4.0))


@functools.cache
def small_phantom() -> CTVolume:
    """A phantom coarse enough to be drawn in half a second."""
    return make_phantom(SMALL)[0]


def write_series(folder: Path, *, seed: int) -> list[Path]:
    """One series of a patient, its slices from the feet up; another seed is another series."""
    write_ct_series(folder, small_phantom(), seed=seed)
    paths = sorted(folder.iterdir())
    for path in paths:
        edit(path, **PATIENT)
    return paths


def instance_from(path: Path) -> Instance:
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    return Instance(str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID), path.read_bytes())


def node_config(spool: Path, **changes: Any) -> NodeConfig:
    """Settings of a node on this machine that waits for nothing."""
    values: dict[str, Any] = {
        "ae_title": NODE_TITLE,
        "port": 0,
        "bind": "127.0.0.1",
        "spool": spool,
        "peers": (Peer(CALLER, ip_network("127.0.0.1")),),
        "quiet_seconds": 0.0,
        "quiet_seconds_after_release": 0.0,
        "retry_seconds": 0.0,
        "timeout_seconds": 10.0,
        "smallest_free_gb": 0.0,
    }
    return NodeConfig(**{**values, **changes})


class NodeProcess:
    """`anatomynet-client listen` in a folder of its own, to be killed and started again."""

    def __init__(self, folder: Path, *, destination_port: int, **settings: object) -> None:
        (self.port,) = free_ports(1)
        self.spool = folder / "spool"
        self.config = folder / "node.toml"
        self.log = folder / "node.log"
        self.process: subprocess.Popen[bytes] | None = None
        values = {
            "ae_title": NODE_TITLE,
            "port": self.port,
            "bind": "127.0.0.1",
            "spool": str(self.spool),
            "quiet_seconds": 3.0,
            "quiet_seconds_after_release": 0.5,
            "retry_seconds": 0.5,
            "smallest_free_gb": 0.0,
            **settings,
        }
        self.config.write_text(
            "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
            + f'\n[[peer]]\nae_title = "{CALLER}"\naddress = "127.0.0.1"\n'
            + '[[peer]]\nae_title = "ORTHANC"\naddress = "127.0.0.0/8"\n'
            + '[[destination]]\nname = "planning"\nae_title = "ORTHANC"\nhost = "127.0.0.1"\n'
            + f"port = {destination_port}\n"
        )

    def start(self) -> None:
        before = len(self.lines("listening"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([CLIENT, "listen", "--config", self.config], stdout=log, stderr=log)
        wait_until(lambda: len(self.lines("listening")) > before, f"a node that listens:\n{self.text}")

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Its exit status after SIGTERM."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=START_TIMEOUT_S)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def lines(self, event: str) -> list[str]:
        """Of the log."""
        return [line for line in self.text.splitlines() if f"Z {event} " in line or line.endswith(f"Z {event}")]

    def status(self, *options: str) -> list[str]:
        run = subprocess.run(
            [CLIENT, "listen", "--config", self.config, *(options or ["--status"])],
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.splitlines()

    def folders(self, state: str) -> list[Path]:
        return sorted((self.spool / state).iterdir())


def dcmtk(name: str) -> str:
    """Path of a tool of dcmtk; pynetdicom has some of the same names."""
    own = Path(sys.executable).parent
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != own)
    return found_or_skipped(name, "dcmtk", path)


def found_or_skipped(name: str, package: str, path: str | None = None) -> str:
    found = shutil.which(name, path=path)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed: apt install {package}")
    return found


def send(
    port: int, paths: Sequence[Path], *, calling: str = CALLER, called: str = NODE_TITLE, options: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    """storescu of dcmtk, as a scanner would."""
    command = [dcmtk("storescu"), "-v", "-aet", calling, "-aec", called, *options, "127.0.0.1", str(port)]
    return subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Orthanc:
    """A real archive."""

    dicom_port: int
    http_port: int

    def ask(self, path: str, body: object = None, *, method: str = "GET", data: bytes | None = None) -> Any:
        """One call of its REST interface."""
        content = json.dumps(body).encode() if body is not None else data
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}/{path}", content, method=method)
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def structure_sets(self, study_instance_uid: str) -> list[str]:
        """SOPInstanceUIDs of a study's RTSTRUCTs."""
        query = {"Level": "Instance", "Expand": True}
        criteria = {"StudyInstanceUID": study_instance_uid, "Modality": "RTSTRUCT"}
        found = self.ask("tools/find", {**query, "Query": criteria}, method="POST")
        return [instance["MainDicomTags"]["SOPInstanceUID"] for instance in found]


@contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    """Orthanc on loopback, with a database of its own."""
    program = found_or_skipped("Orthanc", "orthanc", os.environ["PATH"] + os.pathsep + "/usr/sbin")
    dicom_port, http_port = free_ports(2)
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        "DicomAlwaysAllowStore": True,
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "OverwriteInstances": False,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, folder / "orthanc.json"], stdout=log, stderr=log)
    orthanc = Orthanc(dicom_port, http_port)
    try:
        wait_until(lambda: _answers(orthanc), "an Orthanc that answers")
        yield orthanc
    finally:
        process.terminate()
        process.wait(timeout=30)


def _answers(orthanc: Orthanc) -> bool:
    try:
        orthanc.ask("system")
    except (urllib.error.URLError, ConnectionError):
        return False
    return True
