"""The benchmark of load: whose queue it looks at."""

from benchmarks.load import waiting_volumes

# As a real Triton 2.51 lists them.
METRICS = """# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="anatomynet_region",version="1"} 1
nv_inference_pending_request_count{model="anatomynet",version="1"} 7
"""


def test_the_region_finders_queue_does_not_count() -> None:
    assert waiting_volumes(METRICS) == 7
