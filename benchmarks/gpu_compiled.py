"""The part `compiled` of benchmarks.gpu: the network through torch.compile."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor, nn

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.folding import folded
from anatomynet.engine.network import ServedNetwork
from anatomynet.engine.padding import padded_network
from benchmarks.gpu_forms import CHANNELS_MULTIPLE, LAST, Form, InPrecision, measure_form
from benchmarks.gpu_trial import Trial, guarded


def measure_compiled(trial: Trial) -> None:
    """torch.compile, which takes up to half a minute a form: as long as there is time."""
    network, config = load_checkpoint(trial.checkpoint)
    for name, source in (("plain", folded(network)), ("padded", padded_network(network, CHANNELS_MULTIPLE))):
        left = trial.stop - time.monotonic()
        if left <= 0:
            raise click.ClickException("no time was left")
        row = f"FP16, {name}, channels last, torch.compile"
        build = partial(compiled_form, source, config, trial.device)
        guarded(trial, f"form {row}", partial(measure_form, trial, row, build), limit_s=left)


def compiled_form(network: nn.Module, config: ModelConfig, device: str) -> Form:
    """The whole served graph through torch.compile."""
    half = torch.float16 if device == "cuda" else torch.float32
    served = ServedNetwork(InPrecision(network, half, LAST), config).to(device).eval()
    return partial(_labels_of, torch.compile(served, dynamic=False))


def _labels_of(module: Callable[[Tensor], Any], hu: Tensor) -> Tensor:
    labels: Tensor = module(hu)[0]
    return labels
