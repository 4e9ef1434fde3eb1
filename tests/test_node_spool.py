"""The spool: one node at a time, and a series in one state, whole, wherever the node is killed."""

import fcntl
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from anatomynet.client import node_spool
from anatomynet.client.node_spool import (
    NODE_LOCK,
    PARKED,
    READY,
    STATES,
    JobRecord,
    Spool,
    now_text,
    read_record,
    write_record,
)
from anatomynet.engine.errors import NodeError

# Ends a process at its n-th change of the disk, for every n; then lets another go on from there. A sender sends again
# what it has no acknowledgement of; drawing and sending are stood in for, all the rest is the node's own.
KILLED_EVERYWHERE = """
import os, sys
from pathlib import Path
from anatomynet.client import node
from anatomynet.client import node_delivery
from anatomynet.client.node_arrivals import Arrivals, Instance
from anatomynet.client.node_config import Destination
from anatomynet.client.node_spool import Spool, STATES
from tests.dicom_nodes import node_config

KILLED = 9
CHANGES = ("rename", "replace", "unlink", "link", "mkdir", "rmdir", "fsync")
REAL = {name: getattr(os, name) for name in CHANGES}
SERIES = [Instance("1.2", f"1.2.{n}", b"slice %d" % n) for n in range(4)]

def kill_at(count):
    def counted(real):
        def change(*args, **kwargs):
            nonlocal count
            if count == 0:
                os._exit(KILLED)
            count -= 1
            return real(*args, **kwargs)
        return change
    for name in CHANGES:
        setattr(os, name, counted(REAL[name]))
    # A process that ends loses nothing that it has written: syncing is for the power.
    os.fsync = counted(lambda descriptor: None)

def run(folder):
    told = os.open(folder / "told", os.O_CREAT | os.O_APPEND | os.O_RDWR)
    def tell(line):
        os.write(told, (line + "\\n").encode())
    def was_told(line):
        return line in (folder / "told").read_text().splitlines()
    def draw(job, config, clock):
        part = job.folder / "results.part"
        node.shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        (part / "rs.dcm").write_text(f"{len(list(job.ct.iterdir()))} {os.urandom(8).hex()}")
        part.rename(job.results)
        return "stub"
    def deliver(files, destination, **_):
        (file,) = files
        tell("sent " + file.read_text())
    node.write_results, node_delivery.deliver = draw, deliver
    spool = Spool(folder / "spool")
    spool.prepare()
    arrivals = Arrivals(spool, most_instances=100)
    destinations = (Destination("planning", "TPS", "127.0.0.1", 104),)
    worker = node.Node(node_config(spool.folder, destinations=destinations), spool, arrivals)
    for batch in (SERIES[:3], SERIES[3:]):
        sender = object()
        if not was_told(f"released {batch[0].sop_instance_uid}"):
            for instance in batch:
                arrivals.receive(instance, source="CT", sender=sender)
                tell(f"acknowledged {instance.sop_instance_uid}")
            arrivals.release(sender)
            tell(f"released {batch[0].sop_instance_uid}")
        while worker.step():
            pass

def in_child(folder, count):
    child = os.fork()
    if child == 0:
        kill_at(count)
        run(folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def check(folder):
    spool = Spool(folder / "spool")
    told = (folder / "told").read_text().splitlines()
    jobs = spool.jobs("sent")
    left = {state: [path.name for path in (spool.folder / state).iterdir()] for state in STATES if state != "sent"}
    assert not any(left.values()), left
    last = jobs[-1]
    assert sorted(path.read_bytes() for path in last.ct.iterdir()) == [each.data for each in SERIES]
    sent = [line.split()[1:] for line in told if line.startswith("sent")]
    assert sent[-1] == (last.results / "rs.dcm").read_text().split(), sent
    # What is sent twice is the same object; nobody gets more objects than there were series to draw.
    assert [slices for slices, _ in dict.fromkeys(map(tuple, sent))] in (["3", "4"], ["4"]), sent

root, count = Path(sys.argv[1]), 0
while True:
    folder = root / str(count)
    folder.mkdir()
    status = in_child(folder, count)
    assert status in (0, KILLED), status
    assert in_child(folder, -1) == 0
    check(folder)
    if status == 0:
        break
    count += 1
print(count)
"""
FEWEST_MOMENTS = 50


def test_killed_at_any_change_of_the_disk_loses_and_repeats_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(tmp_path)]
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > FEWEST_MOMENTS


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    return spool


def test_folders_are_for_their_owner_alone(spool: Spool) -> None:
    assert {(spool.folder / state).stat().st_mode & 0o777 for state in (*STATES, ".")} == {0o700}


def test_a_spool_open_to_others_is_refused(spool: Spool) -> None:
    spool.folder.chmod(0o755)
    with pytest.raises(NodeError, match="chmod 700"):
        spool.prepare()


def test_one_node_at_a_time(spool: Spool) -> None:
    assert spool.node_pid() == ""
    with spool.owned():
        assert spool.node_pid()
        with pytest.raises(NodeError, match="another node, pid"), Spool(spool.folder).owned():
            pass
    assert spool.node_pid() == ""


def test_a_look_at_the_status_does_not_keep_a_node_from_starting(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`node_pid` locks the file for a moment: a node that started then took it for another node."""
    with (spool.folder / NODE_LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(file, fcntl.LOCK_UN))
        with spool.owned():
            assert spool.node_pid() == str(os.getpid())


def test_a_series_that_another_process_moves_meanwhile_is_passed_over(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked, ready = (spool.folder / state / "series-1-2_1" for state in (PARKED, READY))
    parked.mkdir()
    write_record(parked, JobRecord(source="CT"))

    def put_back(folder: Path) -> JobRecord:
        if parked.is_dir():
            parked.rename(ready)  # as `--retry` does
        return read_record(folder)

    monkeypatch.setattr(node_spool, "read_record", put_back)
    assert spool.generations("series-1-2") == []
    assert [job.state for job in spool.generations("series-1-2")] == [READY]


def test_a_damaged_record_is_told(spool: Spool) -> None:
    folder = spool.folder / READY / "series-1-2_1"
    folder.mkdir()
    record = JobRecord(source="CT", since=now_text(), notes=("a",))
    write_record(folder, record)
    assert read_record(folder) == record
    (folder / "job.json").write_text('{"source":')
    (job,) = spool.jobs(READY, PARKED)
    assert job.record.problem == "job.json was damaged"


@pytest.mark.parametrize(
    "edited",
    [
        {"since": "yesterday"},
        {"since": "2026-01-02T03:04:05"},  # of which time zone?
        {"since": 20260102},
        {"slices": "many"},
        {"starts": None},
        {"notes": "one"},
        {"delivered": [1]},
    ],
    ids=str,
)
def test_a_record_that_was_edited_to_what_no_node_writes_is_damaged(spool: Spool, edited: dict[str, object]) -> None:
    folder = spool.folder / READY / "series-1-2_1"
    folder.mkdir()
    write_record(folder, JobRecord(source="CT", since=now_text(), delivered=("planning",)))
    path = folder / "job.json"
    whole = json.loads(path.read_bytes())
    path.write_text(json.dumps(whole | {"from_a_newer_version": 1}))
    assert read_record(folder).problem == ""
    path.write_text(json.dumps(whole | edited))
    record = read_record(folder)
    assert record.problem == "job.json was damaged"
    assert datetime.fromisoformat(record.since) <= datetime.now(UTC)
