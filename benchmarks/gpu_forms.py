"""The part `forms` of benchmarks.gpu: the same network in PyTorch, from Hounsfield units on the GPU to labels there.

A row of the table is measured here for the other parts too that have forms of their own: gpu_graphs, gpu_compiled.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import click
import torch
from torch import Tensor, nn

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.folding import folded
from anatomynet.engine.gpu_operations import Operations, TorchOperations
from anatomynet.engine.gpu_runtime import GpuRuntime
from anatomynet.engine.network import AnatomyNet, ServedNetwork
from anatomynet.engine.padding import padded_network
from benchmarks.gpu_trial import Row, Trial, guarded, median_seconds

CHANNELS_MULTIPLE = 8  # what tensor cores want of FP16
LAST = torch.channels_last_3d
OWN = "FP16, tensor-core form"

Form = Callable[[Tensor], Tensor]


class InPrecision(nn.Module):
    """A network in its own precision and layout, with FP32 around it."""

    def __init__(self, network: nn.Module, precision: torch.dtype, layout: torch.memory_format) -> None:
        super().__init__()
        self.network = network.to(dtype=precision, memory_format=layout)  # type: ignore[call-overload]
        self.precision, self.layout = precision, layout

    def forward(self, x: Tensor) -> Tensor:
        """Float (1, 1, z, y, x) -> logits, float."""
        logits: Tensor = self.network(x.to(dtype=self.precision, memory_format=self.layout))
        return logits.float()


def measure_forms(trial: Trial) -> None:
    """Median seconds, peak memory of the GPU, and the share of labels that FP32 draws otherwise."""
    network, config = load_checkpoint(trial.checkpoint)
    for name, build in forms_of(network, config, trial.device):
        guarded(trial, f"form {name}", partial(measure_form, trial, name, build))


def measure_baseline(trial: Trial) -> None:
    """The first of the forms, without which no other has its share of changed labels."""
    name, build = next(forms_of(*load_checkpoint(trial.checkpoint), trial.device))
    guarded(trial, f"form {name}", partial(measure_form, trial, name, build))


def measure_form(trial: Trial, name: str, build: Callable[[], Form]) -> None:
    """One row of the table of forms; the first is what the others are held against."""
    hu = torch.from_numpy(trial.hu).to(trial.device)
    if trial.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        form = build()
        start = time.perf_counter()
        labels = form(hu).clone()
        if trial.on_gpu:
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        if not trial.reference:
            trial.reference.append(labels.cpu())
        row: Row = {
            "seconds": median_seconds(lambda: form(hu), trial),
            "first_seconds": first,
            "changed_share": float((labels.cpu() != trial.reference[0]).double().mean()),
        }
    if trial.on_gpu:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    trial.result.setdefault("forms", {})[name] = row
    click.echo(f"{name}: {row['seconds']:.4f} s", err=True)


def forms_of(network: AnatomyNet, config: ModelConfig, device: str) -> Iterator[tuple[str, Callable[[], Form]]]:
    """Names and what builds each; one is built once the one before has gone from memory."""
    half, usual = (torch.float16 if device == "cuda" else torch.float32), torch.contiguous_format
    plain, padded = partial(folded, network), partial(padded_network, network, CHANNELS_MULTIPLE)

    def usual_form(source: Callable[[], nn.Module], precision: torch.dtype, layout: torch.memory_format) -> Form:
        served = ServedNetwork(InPrecision(source(), precision, layout), config).to(device).eval()
        return lambda hu: served(hu)[0]

    def own(operations: Callable[[], Operations] | None = None, *, tune: bool = False) -> Form:
        chosen = operations() if operations else None
        return GpuRuntime(network, config, device=device, tune=tune, operations=chosen).labels_on_device

    def kernels() -> Operations:
        from anatomynet.engine.gpu_kernels import KernelOperations  # where Triton's compiler is

        return KernelOperations()

    yield "FP32", lambda: usual_form(plain, torch.float32, usual)
    yield OWN, own
    yield f"{OWN}, cuDNN's convolutions", lambda: own(kernels)
    yield f"{OWN}, cuDNN's convolutions, tuned", lambda: own(kernels, tune=True)
    yield f"{OWN}, no kernels", lambda: own(TorchOperations)
    yield "FP16, padded, channels last", lambda: usual_form(padded, half, LAST)
    yield "FP16, channels last", lambda: usual_form(plain, half, LAST)
    yield "FP16, padded channels", lambda: usual_form(padded, half, usual)
    yield "FP16", lambda: usual_form(plain, half, usual)
