"""How fast is the whole CT on an NVIDIA GPU, and what makes it so? Forms of the network, a real server, a whole study.

    python -m benchmarks.gpu [--checkpoint FILE] [--slices 178] [--side 512] [--clients 1 --clients 2] [--seconds 100]

    forms     the same network in PyTorch: FP32, FP16, channels last, channels padded to multiples of 8, and
              engine.gpu_runtime's, with and without kernels of its own, with cuDNN's tuning, as a CUDA graph; last of
              all torch.compile, as long as the time lasts; then ONNX Runtime, where it has CUDA
    labels    what the trained checkpoint draws in FP16 that it does not draw in FP32
    served    the real tritonserver with its Python backend, 1, 2 and 4 clients at once over shared memory
    study     DICOM to RTSTRUCT through such a server, with the trained checkpoint: random weights would draw noise

A form is timed from INT16 Hounsfield units to labels and confidence, both on the GPU. A part that fails is told in one
line, and the others go on. Prints a table, writes benchmarks/results/gpu.json, after every part.

`--part study`, once or several times, measures these parts alone, with FP32 again where forms are held against it. What
the file has of the other parts stays, if machine, versions and volume are the same; with its date, under "earlier".

`--device cpu` runs the same lines on a small volume without a GPU, for who changes this script: its times mean nothing.
"""

import dataclasses
import json
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from anatomynet.client.connection import ServerOptions
from anatomynet.client.pipeline import SegmentOptions, segment_study
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.checkpoint import load_checkpoint, save_checkpoint
from anatomynet.engine.config import ModelConfig, load_config, shipped_weights
from anatomynet.engine.folding import folded
from anatomynet.engine.gpu_runtime import GpuRuntime
from anatomynet.engine.network import AnatomyNet, ServedNetwork
from anatomynet.engine.padding import padded_network
from anatomynet.engine.region_runtime import EmbeddedRegionFinder, shipped_region
from anatomynet.engine.runtime import CPU_PROVIDER, CUDA_PROVIDER, OnnxRuntime, Runtime
from anatomynet.engine.volume import HounsfieldArray
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import python_model, region_model
from benchmarks.common import BIN, machine, read_result, run_and_measure, table_lines, write_result
from benchmarks.served import percentiles, phantom_hu
from tests.triton_servers import RunningServer, running_server

# In the order in which they are wanted: what may be left out comes last.
PARTS = ("forms", "runtime", "labels", "served", "study", "profile", "graphs", "ONNX Runtime", "compiled")
# Parts that add rows to the table of forms, and what tells these rows.
FORMS_ELSEWHERE = {"graphs": "CUDA graph", "ONNX Runtime": "ONNX Runtime", "compiled": "torch.compile"}
HEADER = ("machine", "shape", "model", "stride", "repeats")  # of the result: what all parts have in common
BY_NAME = ("forms", "part_seconds", "not_measured", "servers")  # and what has something of several parts
CHANNELS_MULTIPLE = 8  # what tensor cores want of FP16
WARM_UPS = 2
STUDY_REPEATS = 5
SECONDS_A_ROW = 3.0  # then no more runs are timed
PART_LIMIT_S = 90.0
WANTED = 5  # of the parts: measured whatever time is left
LAST = torch.channels_last_3d
OWN = "FP16, tensor-core form"

Form = Callable[[Tensor], Tensor]
Row = dict[str, Any]


class OutOfTimeError(BaseException):
    """A part took longer than it may; no Exception, since a compiler that is interrupted would go on with another."""


@dataclass(frozen=True)
class Trial:
    """What all parts share.

    Attributes:
        checkpoint: of the network that is timed.
        device: "cuda" or "cpu".
        hu: the CT, int16 (z, y, x).
        repeats: timed runs each.
        clients: how many at once.
        folder: for files.
        stop: the time, of time.monotonic, after which no part begins that may be left out.
        result: what was found.
        reference: the labels of the first form, once it was measured.
    """

    checkpoint: Path
    device: str
    hu: HounsfieldArray
    repeats: int
    clients: tuple[int, ...]
    folder: Path
    stop: float
    result: dict[str, Any] = field(default_factory=dict)
    reference: list[Tensor] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether anything that is timed counts."""
        return self.device == "cuda"

    @property
    def file(self) -> str:
        """Its name among the results."""
        return "gpu" if self.on_gpu else "gpu_trial"

    def write(self) -> None:
        """What there is so far."""
        write_result(self.file, self.result)


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


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Random weights of oar9's network without.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--slices", default=178, show_default=True)
@click.option("--side", default=512, show_default=True)
@click.option("--repeats", default=10, show_default=True, help="Timed runs each, at most.")
@click.option("--clients", multiple=True, type=int, default=(1, 2, 4), show_default=True)
@click.option("--seconds", default=100.0, show_default=True, help="After which nothing begins that may be left out.")
@click.option("--part", "asked", multiple=True, type=click.Choice(PARTS), help="This part alone; may be given again.")
def main(
    checkpoint: Path | None,
    device: str,
    slices: int,
    side: int,
    repeats: int,
    clients: tuple[int, ...],
    seconds: float,
    asked: tuple[str, ...],
) -> None:
    """Compare forms of the network on a GPU, serve one, and draw a study with it."""
    stop = time.monotonic() + seconds
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no NVIDIA GPU here, or a PyTorch without CUDA; --device cpu tries the script alone")
    torch.backends.cudnn.allow_tf32 = False  # FP32 is what the others are held against
    with tempfile.TemporaryDirectory() as temporary, coming_study(Path(temporary) / "study") as study:
        folder = Path(temporary)
        given = checkpoint or random_checkpoint(folder / "random.safetensors")
        trial = Trial(given, device, phantom_hu((slices, side, side)), repeats, clients, folder, stop)
        begin(trial, asked or PARTS)
        measure_parts(trial, study, asked)
        trial.write()
    tell(trial.result)


def begin(trial: Trial, measured: Collection[str]) -> None:
    """Where and of what the result is, and what stays of an earlier one."""
    gpu = torch.cuda.get_device_name() if trial.on_gpu else "none: a trial on a CPU"
    config = load_checkpoint(trial.checkpoint)[1]
    trial.result.update(machine=machine() | {"gpu": gpu}, shape=[*trial.hu.shape])
    trial.result.update(model=config.name, stride=config.in_plane_stride, repeats=trial.repeats)
    before = read_result(trial.file)
    if before and not is_comparable(before, trial.result):
        click.echo(f"{trial.file}.json is of another machine, version or volume, and is replaced", err=True)
        return
    trial.result.update(kept_of(before, measured))


def is_comparable(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two results have the same header, but for the date."""
    headers: list[dict[str, Any]] = [{key: result.get(key) for key in HEADER} for result in (before, now)]
    for header in headers:
        header["machine"] = {key: value for key, value in (header["machine"] or {}).items() if key != "date"}
    return headers[0] == headers[1]


def kept_of(before: dict[str, Any], measured: Collection[str]) -> dict[str, Any]:
    """What an earlier result has of the parts that are not measured now; under "earlier" the date of each."""
    kept: dict[str, Any] = {}
    for key, value in before.items():
        if key in BY_NAME:
            kept[key] = {name: each for name, each in value.items() if part_of(name) not in measured}
        elif key not in (*HEADER, "earlier") and part_of(key) not in measured:
            kept[key] = value
    dates = before.get("earlier", {})
    done = [part for part in kept.get("part_seconds", {}) if part in PARTS]
    kept["earlier"] = {part: dates.get(part, before["machine"]["date"]) for part in done}
    return {key: value for key, value in kept.items() if value}


def part_of(name: str) -> str:
    """Which part a key of the result comes from: a form's name, "form NAME", a part's own, or "served_on"."""
    if name in PARTS:
        return name
    if name == "served_on":
        return "served"
    return next((part for part, words in FORMS_ELSEWHERE.items() if words in name), "forms")


def measure_parts(trial: Trial, study: "subprocess.Popen[bytes]", asked: Collection[str]) -> None:
    """Those that are asked for, whatever time is left; all, as long as there is time, where none is."""
    if "forms" not in asked and FORMS_ELSEWHERE.keys() & asked:
        measure_baseline(trial)
    for number, (name, measure) in enumerate(parts(study).items()):
        if asked and name not in asked:
            continue
        if asked or number < WANTED or time.monotonic() < trial.stop:
            guarded(trial, name, partial(measure, trial))
        else:
            trial.result.setdefault("not_measured", {})[name] = "no time was left"


def parts(study: "subprocess.Popen[bytes]") -> dict[str, Callable[[Trial], object]]:
    """What measures each of PARTS."""
    measures: tuple[Callable[[Trial], object], ...] = (
        *(measure_forms, measure_runtime, measure_labels, measure_served, partial(measure_study, study=study)),
        *(measure_profile, measure_graphs, measure_onnx_runtime, measure_compiled),
    )
    return dict(zip(PARTS, measures, strict=True))


def guarded(trial: Trial, name: str, measure: Callable[[], object], *, limit_s: float = PART_LIMIT_S) -> None:
    """Runs one part; what ends it early is one line of the result, and no other part is lost with it."""
    start = time.perf_counter()
    try:
        with time_limit(limit_s):
            measure()
    except (Exception, OutOfTimeError) as error:  # noqa: BLE001  whatever it is, the others are to be measured
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
        trial.result.setdefault("not_measured", {})[name] = reason
        click.echo(f"{name} not measured: {reason}", err=True)
    trial.result.setdefault("part_seconds", {})[name] = time.perf_counter() - start
    trial.write()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError inside the block once it took so long."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"not done after {seconds:.0f} s")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, give_up)
    around, _ = signal.getitimer(signal.ITIMER_REAL)  # of a block around this one
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, around or seconds), 0.001))
    try:
        yield
    finally:
        left = max(around - (time.monotonic() - start), 0.001) if around else 0
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def random_checkpoint(path: Path) -> Path:
    """oar9's network with random weights, at native resolution: time does not depend on them."""
    config, _ = load_config("oar9")
    torch.manual_seed(0)
    save_checkpoint(path, AnatomyNet(config.classes).eval(), config)
    return path


def measure_forms(trial: Trial) -> None:
    """Median seconds, peak memory of the GPU, and the share of labels that FP32 draws otherwise."""
    network, config = load_checkpoint(trial.checkpoint)
    for name, build in forms_of(network, config, trial.device):
        guarded(trial, f"form {name}", partial(measure_form, trial, name, build))


def measure_baseline(trial: Trial) -> None:
    """The first of the forms, without which no other has its share of changed labels."""
    name, build = next(forms_of(*load_checkpoint(trial.checkpoint), trial.device))
    guarded(trial, f"form {name}", partial(measure_form, trial, name, build))


def measure_graphs(trial: Trial) -> None:
    """CUDA graphs, last but for what takes long: a recording that fails may leave the process unfit for more.

    Raises:
        click.ClickException: no GPU.
    """
    if not trial.on_gpu:
        raise click.ClickException("a CUDA graph takes a GPU")
    network, config = load_checkpoint(trial.checkpoint)
    for name, tune in (("CUDA graph", False), ("tuned, CUDA graph", True)):
        build = partial(graph_form, network, config, tune=tune)
        guarded(trial, f"form {name}", partial(measure_form, trial, f"{OWN}, {name}", build))


def graph_form(network: AnatomyNet, config: ModelConfig, *, tune: bool) -> Form:
    """engine.gpu_runtime's, recorded."""
    return cuda_graph(GpuRuntime(network, config, tune=tune).labels_on_device)


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

    def own(**options: bool) -> Form:
        runtime = GpuRuntime(network, config, device=device, **options)
        return runtime.labels_on_device

    yield "FP32", lambda: usual_form(plain, torch.float32, usual)
    yield OWN, own
    yield f"{OWN}, no kernels", lambda: own(kernels=False)
    yield f"{OWN}, tuned", lambda: own(tune=True)
    yield "FP16, padded, channels last", lambda: usual_form(padded, half, LAST)
    yield "FP16, channels last", lambda: usual_form(plain, half, LAST)
    yield "FP16, padded channels", lambda: usual_form(padded, half, usual)
    yield "FP16", lambda: usual_form(plain, half, usual)


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


def median_seconds(run: Callable[[], object], trial: Trial) -> float:
    """Of so many runs as the trial has, or as there is time for; on a GPU each is waited for."""
    seconds: list[float] = []
    for _ in range(WARM_UPS):
        run()
    begun = time.perf_counter()
    while len(seconds) < trial.repeats and (not seconds or time.perf_counter() - begun < SECONDS_A_ROW):
        if trial.on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if trial.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_runtime(trial: Trial) -> None:
    """What Triton's Python backend computes with, without Triton: both copies included."""
    rows: dict[str, Row] = {}
    for tune in (False, True):
        runtime = GpuRuntime(*load_checkpoint(trial.checkpoint), device=trial.device, tune=tune)
        seconds = median_seconds(lambda: runtime.infer(trial.hu), trial)  # noqa: B023  called at once
        rows["tuned" if tune else "as it is"] = {"seconds": seconds, "on": runtime.description}
        trial.result["runtime"] = rows


def measure_labels(trial: Trial) -> None:
    """The trained checkpoint on the phantom, in FP32 and as the GPU computes it: as it is, and at native resolution,
    for which it was not trained, but where the sums are longest."""
    network, config = load_checkpoint()
    for name, stride in (("as trained", config.in_plane_stride), ("at stride 1", 1)):
        rows = trial.result.setdefault("labels", {"model": config.name})
        rows[name] = changed_labels(trial, network, dataclasses.replace(config, in_plane_stride=stride))


def changed_labels(trial: Trial, network: AnatomyNet, config: ModelConfig) -> Row:
    """Share of labels, DSC of each structure, and confidence, against FP32; median seconds, both copies included."""
    with torch.inference_mode():
        served = ServedNetwork(network, config).to(trial.device).eval()
        expected, expected_confidence = (t.cpu().numpy() for t in served(torch.from_numpy(trial.hu).to(trial.device)))
    own = GpuRuntime(network.cpu(), config, device=trial.device)
    labels, confidence = own.infer(trial.hu)
    count = config.classes
    common = np.bincount(expected[expected == labels], minlength=count)
    both = np.bincount(expected.ravel(), minlength=count) + np.bincount(labels.ravel(), minlength=count)
    dsc = {name: 2 * int(common[i]) / int(both[i]) for i, name in enumerate(config.structures, 1) if both[i]}
    return {
        "changed_share": float((labels != expected).mean()),
        "dsc": dsc,
        "confidence_difference": float(np.abs(confidence - expected_confidence).max()),
        "seconds": median_seconds(lambda: own.infer(trial.hu), trial),
    }


def measure_onnx_runtime(trial: Trial) -> None:
    """The exported FP16 file, where ONNX Runtime has CUDA.

    Raises:
        click.ClickException: it has not.
    """
    import onnxruntime

    from anatomynet.export.onnx import export_onnx

    if trial.on_gpu and CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise click.ClickException("ONNX Runtime here has no CUDA: pip install onnxruntime-gpu")
    network, config = load_checkpoint(trial.checkpoint)
    file = trial.folder / "fp16.onnx"
    export_onnx(network, config, file, fp16=True)
    runtime = OnnxRuntime(file, providers=(CUDA_PROVIDER, CPU_PROVIDER) if trial.on_gpu else None)
    if trial.on_gpu and CUDA_PROVIDER not in runtime.providers:
        raise click.ClickException("ONNX Runtime's CUDA does not start here")
    seconds = median_seconds(lambda: runtime.infer(trial.hu), trial)
    rows = trial.result.setdefault("forms", {})
    rows["ONNX Runtime, FP16 file"] = {"seconds": seconds, "on": runtime.description}


def measure_served(trial: Trial) -> None:
    """The real server over shared memory: seconds of a volume, volumes a second, memory of the GPU."""
    from anatomynet.export.onnx import export_onnx

    network, config = load_checkpoint(trial.checkpoint)
    file = trial.folder / f"{config.name}-fp32.onnx"
    export_onnx(network, config, file)
    repository = trial.folder / "repository"
    write_repository(repository, [python_model(config, [file], checkpoint=trial.checkpoint)])
    rows: dict[str, Row] = {}
    with served_on_gpu(trial, "served", repository) as server, connections(server.url, max(trial.clients)) as all_:
        trial.result["served_on"] = runtime_line(server)
        for runtime in all_[:1] * WARM_UPS:  # the size is new to it
            runtime.infer(trial.hu)
        for count in trial.clients:
            start = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                runs = pool.map(lambda r: _timed(r, trial.hu, trial.repeats), all_[:count])
                seconds = [s for each in runs for s in each]
            volumes_a_second = len(seconds) / (time.perf_counter() - start)
            memory = {"gpu_mib": gpu_memory_mib()}
            rows[f"{count} clients"] = {**percentiles(seconds), "volumes_a_second": volumes_a_second, **memory}
            trial.result["served"] = rows


def measure_study(trial: Trial, *, study: "subprocess.Popen[bytes]") -> None:
    """DICOM to RTSTRUCT through a server of the trained checkpoint: in this process, and in one of its own."""
    if study.wait(timeout=PART_LIMIT_S):
        raise click.ClickException("the phantom's study could not be written")
    region = region_model(EmbeddedRegionFinder().config, shipped_region(".onnx"), backend="python")
    onnx_file, checkpoint = shipped_weights(".onnx"), shipped_weights(".safetensors")
    model = python_model(load_checkpoint()[1], [onnx_file], checkpoint=checkpoint)
    repository = trial.folder / "shipped"
    write_repository(repository, [model, region])
    with served_on_gpu(trial, "study", repository) as server:
        rows: Row = {"on": runtime_line(server)}
        trial.result["study"] = rows
        scopes = {"head and neck": False, "whole volume": True} if trial.on_gpu else {"head and neck": False}
        for name, whole in scopes.items():
            rows[name] = {
                "in_process": study_stages(trial, server.url, whole_volume=whole),
                "process": study_process(trial, server.url, whole_volume=whole),
            }


def study_stages(trial: Trial, url: str, *, whole_volume: bool) -> dict[str, float]:
    """Median seconds of each stage, and in all, in this process, with a connection that stays open."""
    runs: list[dict[str, float]] = []
    options = SegmentOptions(
        server=ServerOptions(urls=(url,)),
        whole_volume=whole_volume,
        output=trial.folder / "in_process.dcm",
        overwrite=True,
    )
    with TritonRuntime(url, timeout_s=60.0) as runtime:
        for _ in range(1 + min(trial.repeats, STUDY_REPEATS)):
            start = time.perf_counter()
            drawn = segment_study(trial.folder / "study", options, runtime=runtime)
            runs.append({"all": time.perf_counter() - start, **drawn.clock.seconds})
    return {stage: statistics.median(run[stage] for run in runs[1:]) for stage in runs[-1]}


def study_process(trial: Trial, url: str, *, whole_volume: bool) -> dict[str, float]:
    """Medians of `anatomynet-client segment` from start to end: its own stages, and everything."""
    runs = []
    report = trial.folder / "report.json"
    command = [BIN / "anatomynet-client", "segment", trial.folder / "study", "--url", url, "--overwrite"]
    command += ["--output", trial.folder / "process.dcm", "--report", report]
    for _ in range(1 + min(trial.repeats, STUDY_REPEATS)):
        measured = run_and_measure([*command, *(["--whole-volume"] if whole_volume else [])])
        runs.append({"all": measured["wall"], **json.loads(report.read_text())["seconds"]})
    return {stage: statistics.median(run[stage] for run in runs[1:]) for stage in runs[-1]}


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


def measure_compiled(trial: Trial) -> None:
    """torch.compile, which takes a minute a form: as long as there is time."""
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


@contextmanager
def served_on_gpu(trial: Trial, part: str, repository: Path) -> Iterator[RunningServer]:
    """A server, with this process' own memory of the GPU given back before it starts."""
    if trial.on_gpu:
        torch.cuda.empty_cache()
    start, before = time.perf_counter(), gpu_memory_mib()
    with running_server(repository, folder=trial.folder) as server:
        ready = time.perf_counter() - start
        trial.result.setdefault("servers", {})[part] = {"ready_seconds": ready, "gpu_mib_before": before}
        yield server


def runtime_line(server: RunningServer) -> str:
    """What the model said it computes with, when it started."""
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if "anatomynet runs on" in line]
    return lines[-1].split("anatomynet runs on ")[-1].rstrip('"') if lines else ""


@contextmanager
def coming_study(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The phantom's study, 178 x 512 x 512, is written by a process beside, while the forms are timed."""
    process = subprocess.Popen([BIN / "anatomynet-client", "phantom", folder], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def connections(url: str, count: int) -> Iterator[list[TritonRuntime]]:
    """So many clients of one server."""
    runtimes = [TritonRuntime(url, timeout_s=60.0) for _ in range(count)]
    try:
        yield runtimes
    finally:
        for runtime in runtimes:
            runtime.close()


def gpu_memory_mib() -> str:
    """Of all processes on each GPU, as the driver says; empty without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().replace("\n", " ")
    except (OSError, subprocess.CalledProcessError):
        return ""


def tell(result: dict[str, Any]) -> None:
    """The table of forms, and all the rest as it will be read by machines."""
    rows = [
        (name, f"{row['seconds'] * 1000:.1f}", f"{row.get('changed_share', 0):.2e}", f"{row.get('peak_gb', 0):.1f}")
        for name, row in result.get("forms", {}).items()
    ]
    for line in table_lines(("form", "ms", "labels changed", "peak GB"), rows):
        click.echo(line)
    for name in ("runtime", "labels", "served_on", "served", "study", "not_measured", "part_seconds", "earlier"):
        click.echo(f"{name}: {json.dumps(_rounded(result.get(name)))}")


def _timed(runtime: Runtime, hu: HounsfieldArray, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        runtime.infer(hu)
        seconds.append(time.perf_counter() - start)
    return seconds


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
