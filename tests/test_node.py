"""The node as a whole: CT from Orthanc and dcmtk, contours to Orthanc, and a node that is killed in between."""

import errno
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
from click.testing import CliRunner
from pydicom.uid import RTStructureSetStorage
from pynetdicom import AE, evt
from pynetdicom.events import Event

from anatomynet.client.cli import main
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.node import MOST_STARTS, Node, retry_parked, status_lines
from anatomynet.client.node_arrivals import Arrivals
from anatomynet.client.node_config import Destination
from anatomynet.client.node_spool import PARKED, READY, RECEIVED, RECORD_NAME, SENT, TRASH, Job, Spool
from anatomynet.engine.errors import NodeError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume
from tests.dicom_nodes import (
    CALLER,
    NodeProcess,
    Orthanc,
    instance_from,
    node_config,
    running_orthanc,
    send,
    write_series,
)
from tests.dicom_studies import words_of_patient
from tests.triton_servers import RunningServer, free_ports
from tests.waiting import wait_until

ENDPOINT = "127.0.0.1"
# pynetdicom leaves a socket to the garbage collector where nobody listens.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as orthanc:
        yield orthanc


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("study"), seed=1)


@contextmanager
def started(node: NodeProcess) -> Iterator[NodeProcess]:
    node.start()
    try:
        yield node
    finally:
        if node.process and node.process.poll() is None:
            node.kill()


def study_uid(paths: list[Path]) -> str:
    return str(pydicom.dcmread(paths[0], stop_before_pixels=True).StudyInstanceUID)


# The node as a process.


def test_ct_from_orthanc_contours_to_orthanc(orthanc: Orthanc, series: list[Path], tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, destination_port=orthanc.dicom_port, output_types=["rtstruct", "seg"])
    for path in series:
        orthanc.ask("instances", data=path.read_bytes(), method="POST")
    where = {"AET": "ANATOMYNET", "Host": ENDPOINT, "Port": node.port}
    orthanc.ask("modalities/node", where, method="PUT")
    (archived,) = orthanc.ask(
        "tools/find", {"Level": "Series", "Query": {"StudyInstanceUID": study_uid(series)}}, method="POST"
    )
    with started(node):
        orthanc.ask("modalities/node/store", {"Resources": [archived], "Synchronous": True}, method="POST")
        wait_until(lambda: node.lines("done"), "contours that are sent")
        (status,) = [line for line in node.status() if line.startswith("sent")]
        assert f"{len(series)} slices from ORTHANC" in status
        assert status.endswith("sent to planning")
        (uid,) = orthanc.structure_sets(study_uid(series))
        (folder,) = node.folders(SENT)
        kept = pydicom.dcmread(folder / "results" / "contours.rtstruct.dcm")
        assert kept.SOPInstanceUID == uid
        assert (folder / "results" / "contours.seg.dcm").is_file()
        assert {"running" in node.status()[0], node.stop()} == {True, 0}
    assert node.lines("stopped")
    assert "not running" in node.status()[0]
    _assert_private(node, series)


def _assert_private(node: NodeProcess, series: list[Path]) -> None:
    """Nothing of a patient in the log, nothing for other users on disk."""
    told = node.text + "\n".join(node.status())
    whole_uids = {study_uid(series), *(str(instance_from(path).sop_instance_uid) for path in series)}
    assert not [word for word in (*words_of_patient(), *whole_uids) if word in told]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in node.spool.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_two_series_at_once_each_twice(orthanc: Orthanc, tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, destination_port=orthanc.dicom_port)
    both = [write_series(tmp_path / f"study{seed}", seed=seed) for seed in (2, 3)]
    with started(node):
        senders = [threading.Thread(target=send, args=(node.port, paths)) for paths in both * 2]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        wait_until(lambda: len(node.lines("done")) == 2, "two series")
        assert all(send(node.port, paths).returncode == 0 for paths in both)
        assert node.stop() == 0
    assert len(node.lines("drawn")) == 2
    assert all(len(orthanc.structure_sets(study_uid(paths))) == 1 for paths in both)


@pytest.mark.parametrize("moment", ["receiving", "complete", "drawing", "segmented"])
def test_killed_and_started_again(orthanc: Orthanc, tmp_path: Path, moment: str) -> None:
    """What was acknowledged is there, what was not is sent again, and Orthanc gets one RTSTRUCT."""
    seed = 10 + ["receiving", "complete", "drawing", "segmented"].index(moment)
    paths = write_series(tmp_path / "study", seed=seed)
    node = NodeProcess(tmp_path, destination_port=orthanc.dicom_port, quiet_seconds_after_release=1.0)
    seen: dict[str, Callable[[], object]] = {
        "receiving": lambda: len(list(node.spool.glob("received/*/ct/CT*"))) > 5,
        "complete": lambda: node.lines("released"),
        "drawing": lambda: list(node.spool.glob("ready/*/results.part")),
        "segmented": lambda: node.lines("drawn"),
    }
    with started(node):
        sender = threading.Thread(target=send, args=(node.port, paths))
        sender.start()
        wait_until(seen[moment], moment)
        node.kill()
        sender.join()
        acknowledged = {path.name for path in node.spool.rglob("CT-*.dcm")}
        if moment != "receiving":
            assert len(acknowledged) == len(paths)
        node.start()
        if moment == "receiving":
            assert acknowledged
            assert send(node.port, paths).returncode == 0
        wait_until(lambda: node.lines("done"), "contours that are sent")
        assert node.stop() == 0
    (folder,) = node.folders(SENT)
    assert {path.name for path in (folder / "ct").iterdir()} >= acknowledged
    assert len(list((folder / "ct").iterdir())) == len(paths)
    assert len(orthanc.structure_sets(study_uid(paths))) == 1


def test_killed_after_the_destination_took_it_sends_the_same_object_again(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "study", seed=20)
    (port,) = free_ports(1)
    node = NodeProcess(tmp_path, destination_port=port)
    taken: list[str] = []

    def store(event: Event) -> int:
        taken.append(str(event.dataset.SOPInstanceUID))
        if len(taken) == 1:
            assert node.process
            os.kill(node.process.pid, signal.SIGKILL)  # before it hears that it was stored
        return 0

    ae = AE(ae_title="ORTHANC")
    ae.add_supported_context(RTStructureSetStorage)
    server = ae.start_server((ENDPOINT, port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    assert server
    try:
        with started(node):
            assert send(node.port, paths).returncode == 0
            wait_until(lambda: node.process and node.process.poll() is not None, "a node that is killed")
            node.start()
            wait_until(lambda: node.lines("done"), "contours that are sent")
            assert node.stop() == 0
    finally:
        server.shutdown()
    assert len(taken) == 2
    assert len(set(taken)) == 1
    assert len(node.lines("drawn")) == 1


def test_one_that_is_taken_and_one_that_is_missing_are_one_line(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, destination_port=1)
    with started(node):
        second = CliRunner().invoke(main, ["listen", "--config", str(node.config)])
    assert second.exit_code == 1
    assert "another node, pid" in second.stderr
    missing = CliRunner().invoke(main, ["listen", "--config", str(tmp_path / "none.toml")])
    assert (missing.exit_code, len(missing.stderr.splitlines())) == (1, 1)
    both = CliRunner().invoke(main, ["listen", "--config", str(node.config), "--status", "--retry"])
    assert both.exit_code == 2


# Has the main thread signalled where it waits between steps, in the middle of the wait.
SIGNALLED_AS_IT_WAITS = """
import os, signal, sys, threading, time
from pathlib import Path
from anatomynet.client import node
from tests.dicom_nodes import node_config

waits = []

def signalled(real):
    def wait(*args, **kwargs):
        if waits and threading.current_thread() is threading.main_thread():
            waits.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)
    return wait

threading.Condition.wait, time.sleep = signalled(threading.Condition.wait), signalled(time.sleep)
node.check_settings = lambda config: None
node._stepped = lambda _: waits.append(True)
node.run_node(node_config(Path(sys.argv[1])))
"""


def test_a_signal_in_the_middle_of_its_wait_ends_it(tmp_path: Path) -> None:
    """An Event's wait holds a lock that its `set` waits for: once the node heard of no signal any more but SIGKILL."""
    command = [sys.executable, "-c", SIGNALLED_AS_IT_WAITS, str(tmp_path / "spool")]
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[-1].endswith("Z stopped")


# The node's steps, in this process.


class Bench:
    """A node without its SCP: what is received is handed over, and `work` does all there is to do."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.spool = Spool(folder / "spool")
        self.spool.prepare()
        self.config = node_config(self.spool.folder, **changes)
        self.arrivals = Arrivals(self.spool, most_instances=self.config.most_instances)
        self.node = Node(self.config, self.spool, self.arrivals)

    def receive(self, paths: list[Path], *, released: bool = True) -> None:
        sender = object()
        for path in paths:
            self.arrivals.receive(instance_from(path), source=CALLER, sender=sender)
        (self.arrivals.release if released else self.arrivals.lose)(sender)

    def work(self) -> None:
        while self.node.step():
            pass

    def jobs(self, state: str) -> list[Job]:
        return self.spool.jobs(state)


def to(port: int) -> dict[str, Any]:
    return {"destinations": (Destination("planning", "ORTHANC", ENDPOINT, port),)}


def test_late_slices_are_drawn_anew_and_told(orthanc: Orthanc, tmp_path: Path) -> None:
    paths = write_series(tmp_path / "study", seed=30)
    bench = Bench(tmp_path, **to(orthanc.dicom_port))
    bench.receive(paths[:36])
    bench.work()
    bench.receive(paths[36:])
    bench.work()
    first, second = bench.jobs(SENT)
    assert (first.record.slices, second.record.slices) == (36, len(paths))
    results = [pydicom.dcmread(job.results / "contours.rtstruct.dcm") for job in (first, second)]
    assert sorted(orthanc.structure_sets(study_uid(paths))) == sorted(str(each.SOPInstanceUID) for each in results)
    note = "contours on 36 were sent before the series grew or changed: discard those"
    assert all(note in roi.ROIDescription for roi in results[1].StructureSetROISequence)
    assert not any(note in roi.get("ROIDescription", "") for roi in results[0].StructureSetROISequence)


def test_a_series_that_grows_again_is_not_drawn_or_sent_meanwhile(series: list[Path], tmp_path: Path) -> None:
    bench = Bench(tmp_path, quiet_seconds=3600.0)
    bench.receive(series[:40])
    assert bench.node.step()  # complete
    bench.arrivals.receive(instance_from(series[40]), source=CALLER, sender="open")
    assert not bench.node.step()
    assert len(bench.jobs(READY)) == 1


def test_a_study_that_is_refused_is_parked_until_the_missing_slice_comes(series: list[Path], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.receive(series[:20] + series[21:])
    bench.work()
    (job,) = bench.jobs(PARKED)
    assert job.record.problem.startswith("missing slices, 1 in all")
    (line,) = [line for line in status_lines(bench.spool) if line.startswith("parked")]
    assert "missing slices, 1 in all" in line
    assert len(retry_parked(bench.spool, line.split()[1][-4:])) == 1
    bench.work()
    assert len(bench.jobs(PARKED)) == 1
    bench.receive(series[20:21])
    bench.work()
    (job,) = bench.jobs(SENT)
    assert (job.record.slices, job.record.problem) == (len(series), "")
    assert not bench.jobs(PARKED)


def test_half_a_study_is_drawn_only_when_a_person_says_so(series: list[Path], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.receive(series[:40], released=False)
    bench.work()
    (job,) = bench.jobs(PARKED)
    assert "broke after 40 slices" in job.record.problem
    retry_parked(bench.spool)
    bench.work()
    (job,) = bench.jobs(SENT)
    drawn = pydicom.dcmread(job.results / "contours.rtstruct.dcm")
    assert "slices may be missing at its ends" in drawn.StructureSetROISequence[0].ROIDescription


def test_a_destination_that_is_away_is_tried_so_often_and_not_more(orthanc: Orthanc, tmp_path: Path) -> None:
    paths = write_series(tmp_path / "study", seed=31)
    (nobody,) = free_ports(1)
    bench = Bench(tmp_path, attempts=3, **to(nobody))
    bench.receive(paths)
    bench.work()
    (job,) = bench.jobs(PARKED)
    assert "is not there" in job.record.problem
    assert "(after 3 attempts)" in job.record.problem
    uid = pydicom.dcmread(job.results / "contours.rtstruct.dcm").SOPInstanceUID
    assert "put back" in retry_parked(bench.spool)[0]
    bench.node = Node(replace(bench.config, **to(orthanc.dicom_port)), bench.spool, bench.arrivals)
    bench.work()
    assert bench.jobs(SENT)[0].record.delivered == ("planning",)
    assert orthanc.structure_sets(study_uid(paths)) == [uid]


def test_of_two_destinations_the_one_that_has_it_is_not_asked_again(orthanc: Orthanc, tmp_path: Path) -> None:
    paths = write_series(tmp_path / "study", seed=32)
    (nobody,) = free_ports(1)
    away = Destination("away", "TPS", ENDPOINT, nobody)
    bench = Bench(tmp_path, attempts=2, destinations=(away, *to(orthanc.dicom_port)["destinations"]))
    bench.receive(paths)
    bench.work()
    (job,) = bench.jobs(PARKED)
    assert job.record.delivered == ("planning",)
    assert len(orthanc.structure_sets(study_uid(paths))) == 1
    (line,) = [line for line in status_lines(bench.spool) if line.startswith("parked")]
    assert "sent to planning; away (TPS at" in line


def test_a_server_that_is_away_parks_too(series: list[Path], tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    bench = Bench(tmp_path, attempts=2, urls=(f"{ENDPOINT}:{nobody}",))
    bench.receive(series)
    bench.work()
    (job,) = bench.jobs(PARKED)
    assert "no Triton server at" in job.record.problem
    assert "(after 2 attempts)" in job.record.problem


def test_a_server_draws(triton_server: RunningServer, tmp_path: Path) -> None:
    from tests.random_network import CALIBRATION_SHAPE, smooth_hu

    geometry = VolumeGeometry(CALIBRATION_SHAPE, (1.0, 1.0, 2.5))
    write_ct_series(tmp_path / "study", CTVolume(smooth_hu(CALIBRATION_SHAPE), geometry))
    bench = Bench(tmp_path, urls=(triton_server.url,))
    bench.receive(sorted((tmp_path / "study").iterdir()))
    bench.work()
    (job,) = bench.jobs(SENT)
    assert "Triton" in (job.results / "report.json").read_text()


def test_a_study_that_ends_the_node_again_and_again_is_parked(series: list[Path], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.receive(series)
    bench.node.step()
    (job,) = bench.jobs(READY)
    bench.spool.save(job, starts=MOST_STARTS)
    bench.work()
    assert "begun 5 times and ended the node each time" in bench.jobs(PARKED)[0].record.problem


def test_what_is_old_enough_is_deleted(series: list[Path], tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep_days=1.0, keep_parked_days=0.0)
    bench.receive(series)
    bench.work()
    long_ago = (datetime.now(UTC) - timedelta(days=2)).isoformat()
    bench.spool.save(bench.jobs(SENT)[0], since=long_ago)
    bench.receive(series[:5], released=False)
    bench.node = Node(bench.config, bench.spool, bench.arrivals)
    bench.work()
    bench.node.step()
    assert not bench.jobs(SENT)
    assert not list((bench.spool.folder / TRASH).iterdir())


def test_a_damaged_record_does_not_keep_the_node_from_tidying(series: list[Path], tmp_path: Path) -> None:
    """Once it ended the node, and every one started after it."""
    bench = Bench(tmp_path, keep_days=1.0, keep_parked_days=1.0)
    bench.receive(series)
    bench.work()
    (job,) = bench.jobs(SENT)
    for text in ('{"source":', '{"notes": null}'):
        (job.folder / "job.json").write_text(text)
        bench.node = Node(bench.config, bench.spool, bench.arrivals)
        bench.node.step()
        assert [kept.record.problem for kept in bench.jobs(SENT)] == ["job.json was damaged"]
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(job.folder / "job.json", (long_ago, long_ago))
    bench.node = Node(bench.config, bench.spool, bench.arrivals)
    bench.node.step()
    assert not bench.jobs(SENT)


@pytest.mark.parametrize("state", [RECEIVED, READY, SENT, TRASH])
def test_a_stray_file_does_not_keep_the_node_from_drawing(series: list[Path], tmp_path: Path, state: str) -> None:
    """Once it ended every step before it began."""
    stray = tmp_path / "spool" / state / "Name^of_a_patient.dcm"
    stray.parent.mkdir(parents=True, mode=0o700)
    (tmp_path / "spool").chmod(0o700)
    stray.write_text("put here by hand")
    bench = Bench(tmp_path)
    bench.receive(series[:5], released=False)
    bench.work()
    assert len(bench.jobs(PARKED)) == 1
    assert stray.exists() == (state in (READY, SENT))
    assert [line for line in status_lines(bench.spool) if "a stray file" in line] == (
        [f"failure: a stray file in {stray.parent}: move it elsewhere"] if stray.exists() else []
    )


def test_retry_by_another_user_is_refused_in_one_line(
    series: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root it once gave the node a record that it could not read, and kept it from drawing."""
    bench = Bench(tmp_path)
    bench.receive(series[:5], released=False)
    bench.work()
    user = bench.spool.folder.owner()
    monkeypatch.setattr(os, "geteuid", lambda: bench.spool.folder.stat().st_uid + 1)
    with pytest.raises(NodeError, match=f"run it as {user}$"):
        retry_parked(bench.spool)
    assert len(bench.jobs(PARKED)) == 1


def test_a_spool_that_this_user_may_not_enter_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)

    def is_dir(self: Path) -> bool:
        raise of_another_user(self)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(NodeError, match="run it as the node's user"):
        list(status_lines(bench.spool))


def of_another_user(path: Path) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_record_that_cannot_be_read_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    both = [write_series(tmp_path / f"study{seed}", seed=seed) for seed in (1, 2)]
    bench = Bench(tmp_path)
    bench.receive(both[0])
    assert bench.node.step()
    (unreadable,) = (job.folder / RECORD_NAME for job in bench.jobs(READY))
    read = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self == unreadable:
            raise of_another_user(self)
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    bench.receive(both[1])
    bench.work()
    assert len(bench.jobs(SENT)) == 1
    assert caplog.text.count("cannot be read: Permission denied") == 1
    (line,) = [line for line in status_lines(bench.spool) if line.startswith("failure")]
    assert line.endswith(f"in {bench.spool.folder / READY} cannot be read: Permission denied; whose is it?")


def test_a_series_that_cannot_be_completed_does_not_keep_the_others(
    series: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    bench.receive(series[:5], released=False)
    bench.receive(write_series(tmp_path / "study", seed=2)[:5], released=False)
    first, second = bench.arrivals.settled(quiet_seconds=0.0, after_release=0.0)
    generations = bench.spool.generations

    def generations_of(key: str) -> list[Job]:
        if key == first:
            raise of_another_user(bench.spool.folder / key)
        return generations(key)

    monkeypatch.setattr(bench.spool, "generations", generations_of)
    bench.work()
    assert [job.key for job in bench.jobs(PARKED)] == [second]
    monkeypatch.undo()
    bench.work()
    assert {job.key for job in bench.jobs(PARKED)} == {first, second}


def test_what_cannot_be_deleted_is_told_once_and_the_rest_is_done(
    series: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(tmp_path)
    for name in ("one", "two"):
        (bench.spool.folder / TRASH / name).mkdir()
    remove = shutil.rmtree

    def rmtree(path: Path) -> None:
        if path.name == "one":
            raise of_another_user(path)
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    bench.receive(series[:5], released=False)
    bench.work()
    assert len(bench.jobs(PARKED)) == 1
    assert [path.name for path in (bench.spool.folder / TRASH).iterdir()] == ["one"]
    assert caplog.text.count("cannot be deleted: Permission denied") == 1


def test_retry_of_nothing_is_told(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('ae_title="A"\nport=1\nspool="spool"\n[[peer]]\nae_title="B"\naddress="127.0.0.1"\n')
    result = CliRunner().invoke(main, ["listen", "--config", str(config), "--status"])
    assert result.exit_code == 1
    assert "no spool at" in result.stderr
    Spool(tmp_path / "spool").prepare()
    assert CliRunner().invoke(main, ["listen", "--config", str(config), "--retry"]).exit_code == 0
    result = CliRunner().invoke(main, ["listen", "--config", str(config), "--retry", "1234"])
    assert (result.exit_code, "nothing that ends in 1234 is parked" in result.stderr) == (1, True)
