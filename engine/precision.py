"""bfloat16 where it is the faster one: for training; what serves computes in the precision of its file."""

import torch


def computes_bfloat16(device_type: str) -> bool:
    """Whether this device does so faster than float32: a CPU without AVX-512 imitates it, ten times slower."""
    return device_type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_bfloat16(device_type: str, *, wanted: bool = True) -> torch.autocast:
    """Convolutions in bfloat16 within this context, if `wanted` and where that is fast; else nothing changes."""
    # Without the cache of converted weights, which a recording on a GPU could not fill anew.
    enabled = wanted and computes_bfloat16(device_type)
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled, cache_enabled=False)
