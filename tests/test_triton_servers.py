"""Ports of the tests' servers: nobody else takes one between its choice and its server's start."""

from pathlib import Path

import pytest

from tests.triton_servers import STARTS, free_ports, has_server, ports_of, running_server

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not OUTGOING.exists(), reason="the range of outgoing ports is read from Linux's /proc")
def test_ports_are_none_that_an_outgoing_connection_may_take() -> None:
    first, last = map(int, OUTGOING.read_text().split())
    assert not [port for port in free_ports(50) if first <= port <= last]


def test_no_port_is_given_twice() -> None:
    ports = free_ports(50) + free_ports(50)
    assert len(set(ports)) == 100


def test_processes_of_a_run_share_no_port() -> None:
    assert not set(ports_of(0, 2)) & set(ports_of(1, 2))
    assert set(ports_of(0, 2)) | set(ports_of(1, 2)) == set(ports_of(0, 1))


def ending(folder: Path, times: int) -> Path:
    """A program that ends before it has become a server, as often as that."""
    program = folder / "program"
    program.write_text(
        f"""#!/bin/sh
echo >> {folder}/starts
[ $(wc -l < {folder}/starts) -gt {times} ] || {{ echo "in vain"; exit 1; }}
exec tritonserver --model-repository="$ANATOMYNET_REPOSITORY" "$@"
"""
    )
    program.chmod(0o755)
    return program


@pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")
def test_a_server_that_ends_before_it_is_ready_is_launched_anew_and_told(
    random_repository: Path, tmp_path: Path
) -> None:
    program = ending(tmp_path, STARTS - 1)
    with (
        pytest.warns(match=r"did not become ready:\nin vain") as told,
        running_server(random_repository, folder=tmp_path, program=program) as server,
    ):
        assert server.process.poll() is None
    assert len(told) == STARTS - 1


def test_one_that_always_does_fails_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.warns(match="did not become ready"),
        pytest.raises(AssertionError, match=r"did not become ready:\nin vain"),
        running_server(tmp_path, folder=tmp_path, program=ending(tmp_path, STARTS)),
    ):
        pass
