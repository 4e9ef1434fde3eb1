"""Ports of the tests' servers: nobody else takes one between its choice and its server's start."""

from pathlib import Path

import pytest

from tests.triton_servers import free_ports, ports_of

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
