"""What benchmarks of a server read in its metrics, and where they say that a volume's time goes."""

from itertools import chain
from pathlib import Path

import click
import pytest

from benchmarks.gpu_served import ask_at_once, connections
from benchmarks.served import metric_of, phantom_hu, write_shipped_repository
from benchmarks.volume_steps import CLIENT_CALLS, KEEP, SERVER_STEPS, TAKE
from tests.triton_servers import has_server, running_server

# As a real Triton 2.51 lists them.
METRICS = """# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="anatomynet_region",version="1"} 1
nv_inference_pending_request_count{model="anatomynet",version="1"} 7
"""
REPEATS = 3


def test_the_region_finders_queue_does_not_count() -> None:
    assert metric_of(METRICS, "nv_inference_pending_request_count") == 7


def test_a_metric_that_is_not_there_is_told() -> None:
    with pytest.raises(click.ClickException, match=r"^no nv_inference_queue_duration_us of anatomynet among the"):
        metric_of(METRICS, "nv_inference_queue_duration_us")


@pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")
def test_the_steps_of_a_volume_add_up_on_both_sides(tmp_path: Path) -> None:
    hu = phantom_hu((24, 64, 64))
    repository = write_shipped_repository(tmp_path / "repository")
    with running_server(repository, folder=tmp_path) as server, connections(server.url, 2) as clients:
        clients[0].infer(hu)
        # Triton may leave one for half a second in its queue: hence several times.
        pairs = [[ask_at_once(server, clients[:count], hu, REPEATS) for count in (1, 2)] for _ in range(3)]
    for row in chain.from_iterable(pairs):
        inside, outside = row["server_ms"], row["client_ms"]
        assert [*inside] == [*SERVER_STEPS]
        assert [*outside] == [TAKE, *CLIENT_CALLS, KEEP]
        assert min(*inside.values(), *outside.values()) > 0
        # A mean over the block's requests alone: of all since the server's start it would be longer than the longest.
        assert sum(inside.values()) - inside["all"] <= inside["all"] < 1000 * row["max"]
        assert max(outside.values()) < 1000 * row["max"]
    assert any(both["server_ms"]["queue"] > alone["server_ms"]["queue"] for alone, both in pairs)
