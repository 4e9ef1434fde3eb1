"""What is received is on disk before it is acknowledged, and a series is complete only when it can be."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import ImplicitVRLittleEndian

from anatomynet.client.node_arrivals import KNOWN, REPLACED, STARTED, STORED, Arrivals, Instance, arriving_folders
from anatomynet.client.node_spool import PARKED, READY, RECEIVED, SEGMENTED, SENT, Job, Spool, series_key
from anatomynet.engine.errors import NodeError, OutputError
from tests.dicom_nodes import instance_from
from tests.dicom_studies import edit, write_study
from tests.full_disk import largest_file

SOURCE = "CT_SIM"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def instances(series: list[Path]) -> list[Instance]:
    return [instance_from(path) for path in series]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    return spool


def arrivals_of(spool: Spool) -> Arrivals:
    """As after a start of the node."""
    return Arrivals(spool, most_instances=100)


def receive(arrivals: Arrivals, instances: list[Instance], sender: object = "association") -> list[str]:
    return [arrivals.receive(instance, source=SOURCE, sender=sender) for instance in instances]


def completed(arrivals: Arrivals, instances: list[Instance], sender: object = "association") -> Job:
    """Received in an association that is released."""
    receive(arrivals, instances, sender)
    arrivals.release(sender)
    (key,) = arrivals.settled(quiet_seconds=0, after_release=0)
    return complete(arrivals, key)


def complete(arrivals: Arrivals, key: str) -> Job:
    job = arrivals.complete(key, quiet_seconds=0, after_release=0)
    assert job
    return job


def data_of(job: Job) -> list[bytes]:
    return sorted(path.read_bytes() for path in job.ct.iterdir())


def test_file_and_folders_are_synced_before_it_returns(
    spool: Spool, instances: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    inodes: list[int] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        inodes.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    receive(arrivals_of(spool), instances[:1])
    folder = spool.folder / RECEIVED / series_key(instances[0].series_instance_uid)
    (file,) = (folder / "ct").iterdir()
    assert file.read_bytes() == instances[0].data
    assert file.stat().st_ino in inodes
    assert file not in synced  # before it got its name
    assert synced[-1] == folder / "ct"
    assert {folder, spool.folder / RECEIVED} <= set(synced)


def test_a_released_series_is_ready_whole(spool: Spool, instances: list[Instance]) -> None:
    arrivals = arrivals_of(spool)
    assert receive(arrivals, instances[:2]) == [STARTED, STORED]
    job = completed(arrivals, instances)
    assert (job.state, job.generation, job.record.slices) == (READY, 1, len(instances))
    assert data_of(job) == sorted(each.data for each in instances)
    assert not list((spool.folder / RECEIVED).iterdir())


def test_quiet_is_longer_before_the_release(spool: Spool, instances: list[Instance]) -> None:
    arrivals = arrivals_of(spool)
    receive(arrivals, instances)
    assert not arrivals.settled(quiet_seconds=60, after_release=0)
    arrivals.release("another association")
    assert not arrivals.settled(quiet_seconds=60, after_release=0)
    arrivals.release("association")
    assert arrivals.settled(quiet_seconds=60, after_release=0)


def test_the_same_instance_twice_is_one(spool: Spool, instances: list[Instance], series: list[Path]) -> None:
    arrivals = arrivals_of(spool)
    receive(arrivals, instances)
    assert receive(arrivals, instances) == [KNOWN] * len(instances)
    job = completed(arrivals, instances)
    for state in (SEGMENTED, SENT):
        job = spool.move(job, state)
        assert receive(arrivals, instances) == [KNOWN] * len(instances)
    assert not arrivals.settled(quiet_seconds=0, after_release=0)


def test_the_same_instance_in_another_encoding_is_known(
    spool: Spool, instances: list[Instance], series: list[Path], tmp_path: Path
) -> None:
    dataset = pydicom.dcmread(series[0])
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.save_as(tmp_path / "implicit.dcm", implicit_vr=True, little_endian=True)
    arrivals = arrivals_of(spool)
    receive(arrivals, instances[:1])
    assert (tmp_path / "implicit.dcm").read_bytes() != series[0].read_bytes()
    assert receive(arrivals, [instance_from(tmp_path / "implicit.dcm")]) == [KNOWN]


def test_a_changed_instance_replaces_the_first(
    spool: Spool, instances: list[Instance], series: list[Path], tmp_path: Path
) -> None:
    changed = tmp_path / "changed.dcm"
    shutil.copy(series[0], changed)
    edit(changed, StudyDescription="corrected")
    arrivals = arrivals_of(spool)
    first = spool.move(completed(arrivals, instances), SENT)
    assert receive(arrivals, [instance_from(changed)], "later") == [REPLACED]
    arrivals.release("later")
    second = complete(arrivals, first.key)
    assert (second.state, second.generation, second.record.slices) == (READY, 2, len(instances))
    assert changed.read_bytes() in data_of(second)
    assert data_of(first) == sorted(each.data for each in instances)


@pytest.mark.parametrize("state", [READY, SEGMENTED, PARKED])
def test_late_slices_supersede_what_nobody_got(spool: Spool, instances: list[Instance], state: str) -> None:
    arrivals = arrivals_of(spool)
    job = completed(arrivals, instances[:4])
    if state != READY:
        job = spool.move(job, state)
    again = completed(arrivals, instances[4:])
    assert (again.generation, again.record.slices, again.record.notes) == (2, len(instances), ())
    assert [each.folder for each in spool.generations(job.key)] == [again.folder]


def test_late_slices_after_contours_were_sent_are_told(spool: Spool, instances: list[Instance]) -> None:
    arrivals = arrivals_of(spool)
    job = spool.move(completed(arrivals, instances[:4]), SENT, delivered=("planning",))
    again = completed(arrivals, instances[4:])
    (note,) = again.record.notes
    assert note.startswith(f"drawn on {len(instances)} slices; contours on 4 were sent")
    assert [each.state for each in spool.generations(job.key)] == [SENT, READY]


def test_a_job_that_only_some_destinations_have_is_kept_as_sent(spool: Spool, instances: list[Instance]) -> None:
    arrivals = arrivals_of(spool)
    spool.move(completed(arrivals, instances[:4]), SEGMENTED, delivered=("one",))
    again = completed(arrivals, instances[4:])
    assert again.record.notes
    old, _ = spool.generations(again.key)
    assert (old.state, old.record.problem) == (SENT, "superseded before every destination had it")


def test_an_association_that_broke_parks_the_series(spool: Spool, instances: list[Instance]) -> None:
    arrivals = arrivals_of(spool)
    receive(arrivals, instances[:4])
    arrivals.lose("association")
    (key,) = arrivals.settled(quiet_seconds=0, after_release=60)
    job = complete(arrivals, key)
    assert job.state == PARKED
    assert "the association that brought it broke after 4 slices; send the series again" in job.record.problem
    again = completed(arrivals, instances, "another")  # what is there counts too: sending again is the way to mend it
    assert (again.state, again.record.slices) == (READY, len(instances))


def test_a_slice_that_comes_after_the_series_was_settled_keeps_it_growing(
    spool: Spool, instances: list[Instance]
) -> None:
    """Should its association break then, there is still something to park."""
    arrivals = arrivals_of(spool)
    receive(arrivals, instances[:4], "first")
    arrivals.release("first")
    (key,) = arrivals.settled(quiet_seconds=60, after_release=0)
    receive(arrivals, instances[4:5], "late")
    assert arrivals.complete(key, quiet_seconds=60, after_release=0) is None
    arrivals.lose("late")
    assert complete(arrivals, key).state == PARKED


def test_a_series_that_is_complete_as_somebody_looks_is_passed_over(
    spool: Spool, instances: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = arrivals_of(spool)
    receive(arrivals, instances[:4])
    (spool.folder / RECEIVED / "stray.txt").write_text("put here by hand")
    folder = spool.folder / RECEIVED / series_key(instances[0].series_instance_uid)
    assert [(key, slices) for key, _, slices, _ in arriving_folders(spool)] == [(folder.name, 4)]
    scandir = os.scandir

    def renamed_before(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path) == folder / "ct":
            folder.rename(spool.folder / READY / f"{folder.name}_1")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", renamed_before)
    assert not list(arriving_folders(spool))


def test_the_rest_in_time_mends_a_break(spool: Spool, instances: list[Instance]) -> None:
    arrivals = arrivals_of(spool)
    receive(arrivals, instances[:4], "first")
    receive(arrivals, instances[3:4], "beside it")
    arrivals.lose("first")
    arrivals.release("beside it")  # brought nothing since
    assert not arrivals.settled(quiet_seconds=60, after_release=0)
    assert completed(arrivals, instances[4:], "second").state == READY


@pytest.mark.parametrize("released", [True, False])
def test_a_restart_knows_what_was_released(spool: Spool, instances: list[Instance], released: bool) -> None:
    arrivals = arrivals_of(spool)
    receive(arrivals, instances)
    if released:
        arrivals.release("association")
    again = arrivals_of(spool)
    (key,) = again.settled(quiet_seconds=0, after_release=0)
    assert complete(again, key).state == (READY if released else PARKED)


def test_too_many_instances_are_refused(spool: Spool, instances: list[Instance]) -> None:
    arrivals = Arrivals(spool, most_instances=2)
    receive(arrivals, instances[:2])
    with pytest.raises(NodeError, match="more than 2 instances"):
        receive(arrivals, instances[2:3])
    assert receive(arrivals, instances[:2]) == [KNOWN, KNOWN]


def test_a_full_disk_leaves_what_was_there(spool: Spool, instances: list[Instance]) -> None:
    arrivals = arrivals_of(spool)
    receive(arrivals, instances[:2])
    with largest_file(100), pytest.raises(OutputError):
        receive(arrivals, instances[2:3])
    job = completed(arrivals, instances)
    assert data_of(job) == sorted(each.data for each in instances)


def test_a_disk_full_from_the_start_leaves_nothing_to_complete(spool: Spool, instances: list[Instance]) -> None:
    arrivals = arrivals_of(spool)
    with largest_file(1), pytest.raises(OutputError):
        receive(arrivals, instances[:1])
    assert not arrivals.settled(quiet_seconds=0, after_release=0)
    assert not arrivals_of(spool).settled(quiet_seconds=0, after_release=0)
    assert completed(arrivals, instances).record.slices == len(instances)
