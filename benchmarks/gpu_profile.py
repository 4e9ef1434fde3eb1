"""The part `profile` of benchmarks.gpu: where the GPU's time goes, by kernel."""

import torch

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.gpu_runtime import GpuRuntime
from benchmarks.gpu_trial import WARM_UPS, Trial


def measure_profile(trial: Trial) -> None:
    """Where the GPU's time goes: milliseconds of a volume, by kernel."""
    runtime = GpuRuntime(*load_checkpoint(trial.checkpoint), device=trial.device)
    hu = torch.from_numpy(trial.hu).to(trial.device)
    kinds = [torch.profiler.ProfilerActivity.CUDA if trial.on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode():
        for _ in range(WARM_UPS):
            runtime.labels_on_device(hu)
        with torch.profiler.profile(activities=kinds) as profile:
            runtime.labels_on_device(hu)
            if trial.on_gpu:
                torch.cuda.synchronize()
    events = profile.key_averages()
    spent = {
        e.key[:160]: (e.self_device_time_total if trial.on_gpu else e.self_cpu_time_total, e.count) for e in events
    }
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:30]
    trial.result["profile"] = [{"kernel": key, "ms": us / 1000, "calls": calls} for key, (us, calls) in longest]
