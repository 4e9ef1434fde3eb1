"""The part `graphs` of benchmarks.gpu: engine.gpu_runtime's network, recorded as a CUDA graph."""

from functools import partial

import click
import torch
from torch import Tensor

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.gpu_runtime import GpuRuntime
from anatomynet.engine.network import AnatomyNet
from benchmarks.gpu_forms import OWN, Form, measure_form
from benchmarks.gpu_trial import WARM_UPS, Trial, guarded


def measure_graphs(trial: Trial) -> None:
    """CUDA graphs, last but for what takes long: a recording that fails may leave the process unfit for more.

    Raises:
        click.ClickException: no GPU.
    """
    if not trial.on_gpu:
        raise click.ClickException("a CUDA graph takes a GPU")
    network, config = load_checkpoint(trial.checkpoint)
    build = partial(graph_form, network, config)
    guarded(trial, "form CUDA graph", partial(measure_form, trial, f"{OWN}, CUDA graph", build))


def graph_form(network: AnatomyNet, config: ModelConfig) -> Form:
    """engine.gpu_runtime's, recorded."""
    return cuda_graph(GpuRuntime(network, config).labels_on_device)


def cuda_graph(form: Form) -> Form:
    """Recorded at the first volume, replayed for every one of the same size."""
    recorded: list[tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = []

    def replay(hu: Tensor) -> Tensor:
        if not recorded:
            given = hu.clone()
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a graph may not be the first to ask for memory and algorithms
                for _ in range(WARM_UPS):
                    form(given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                labels = form(given)
            recorded.append((graph, given, labels))
        graph, given, labels = recorded[0]
        given.copy_(hu)
        graph.replay()
        return labels

    return replay
