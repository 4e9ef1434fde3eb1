"""The part `labels` of benchmarks.gpu: what the trained checkpoint draws on a GPU that it does not draw in FP32."""

import dataclasses

import numpy as np
import torch

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.gpu_runtime import GpuRuntime
from anatomynet.engine.network import AnatomyNet, ServedNetwork
from anatomynet.export.parity import Reference, worst_margin
from benchmarks.gpu_trial import Row, Trial, median_seconds


def measure_labels(trial: Trial) -> None:
    """The trained checkpoint on the phantom, in FP32 and as the GPU computes it: as it is, and at native resolution,
    for which it was not trained, but where the sums are longest."""
    network, config = load_checkpoint()
    for name, stride in (("as trained", config.in_plane_stride), ("at stride 1", 1)):
        rows = trial.result.setdefault("labels", {"model": config.name})
        rows[name] = changed_labels(trial, network, dataclasses.replace(config, in_plane_stride=stride))


def changed_labels(trial: Trial, network: AnatomyNet, config: ModelConfig) -> Row:
    """Share of labels, the worst margin among these (the export's gate), DSC of each structure, and confidence, against
    FP32; median seconds, both copies included."""
    with torch.inference_mode():
        served = ServedNetwork(network, config).to(trial.device).eval()
        hu = torch.from_numpy(trial.hu).to(trial.device)
        expected, expected_confidence = (t.cpu().numpy() for t in served(hu))
        coarse = served.network(served.network_input_from_hu(hu)).cpu()
    reference = Reference(served.cpu(), trial.hu, coarse, expected)
    own = GpuRuntime(network.cpu(), config, device=trial.device)
    labels, confidence = own.infer(trial.hu)
    count = config.classes
    common = np.bincount(expected[expected == labels], minlength=count)
    both = np.bincount(expected.ravel(), minlength=count) + np.bincount(labels.ravel(), minlength=count)
    dsc = {name: 2 * int(common[i]) / int(both[i]) for i, name in enumerate(config.structures, 1) if both[i]}
    return {
        "changed_share": float((labels != expected).mean()),
        "worst_margin": worst_margin(reference, labels != expected),
        "dsc": dsc,
        "confidence_difference": float(np.abs(confidence - expected_confidence).max()),
        "seconds": median_seconds(lambda: own.infer(trial.hu), trial),
    }
