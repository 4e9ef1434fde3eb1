"""The straight path as one function: a CT study in, its contours on disk. What `anatomynet-client segment` calls.

    segment_study(STUDY)      connect -> read -> draw -> write, for one study

`draw_series` and `write_drawing` are its two halves, for who reads and writes studies otherwise.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from anatomynet.client.clock import StageClock
from anatomynet.client.connection import ServerOptions, connected, describe_model, describe_runtime
from anatomynet.client.outputs import OutputStyle, output_paths, write_outputs
from anatomynet.client.picture import write_picture
from anatomynet.client.report import write_report
from anatomynet.client.review import write_review
from anatomynet.client.structure_table import (
    StructureTable,
    chosen_structures,
    load_structure_table,
    only_structures,
)
from anatomynet.client.study import CTSeries, read_ct_series, volume_from_series
from anatomynet.client.study_files import opened_study
from anatomynet.client.triton import TritonRuntime
from anatomynet.client.unvalidated import unvalidated_findings, without_unvalidated
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import OutputError, ServerError
from anatomynet.engine.findings import Finding, find_warnings
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.limits import check_size
from anatomynet.engine.output import refuse_existing
from anatomynet.engine.preprocess import trained_grid
from anatomynet.engine.runtime import Runtime
from anatomynet.engine.segment import segment
from anatomynet.engine.structure_region import StructureRegion, regions_from_label_map
from anatomynet.engine.structures import Structure
from anatomynet.engine.volume import CTVolume, LabelMap


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """How a study is drawn, and what is written.

    Attributes:
        server: where the network runs.
        series: SeriesInstanceUID, or its end, where a study has several.
        structures: names of those to draw; all that the model knows where there is none.
        allow_unvalidated: draw those too that no patient taught the network.
        structure_table: a department's names, colours and types, a TOML file.
        whole_volume: the network sees the whole body, not only head and neck where these can be found.
        tolerance_mm: how far a thinned contour may run beside the full one; None is as far as leaves every voxel in
            its structure, 0 keeps every point.
        output: file of the first type, the others beside it; None is beside the study, called after it.
        output_types: some of "rtstruct", "seg" and "nifti".
        report: what was done, as JSON without anything private.
        picture: a PNG of three planes with what was drawn.
        review: the review page.
        overwrite: files that are there may be replaced.
    """

    server: ServerOptions = field(default_factory=ServerOptions)
    series: str | None = None
    structures: tuple[str, ...] = ()
    allow_unvalidated: bool = False
    structure_table: Path | None = None
    whole_volume: bool = False
    tolerance_mm: float | None = None
    output: Path | None = None
    output_types: tuple[str, ...] = ("rtstruct",)
    report: Path | None = None
    picture: Path | None = None
    review: Path | None = None
    overwrite: bool = False

    def validate(self) -> None:
        """Refuses what would fail, or mislead, after the work is done.

        Raises:
            OutputError: a tolerance below 0, files that are there.
        """
        if self.tolerance_mm is not None and not 0 <= self.tolerance_mm < math.inf:
            raise OutputError(f"a tolerance of {self.tolerance_mm} mm; expected 0 or more")
        for path in filter(None, (self.report, self.picture, self.review)):
            refuse_existing(path, overwrite=self.overwrite)


DEFAULTS = SegmentOptions()


@dataclass(frozen=True, eq=False)
class Task:
    """What is the same for every study of a run, settled before any is read.

    Attributes:
        options: what was asked.
        runtime: where the network runs.
        table: how each structure is written.
        wanted: the structures to draw.
        notes: what is left out, for whoever reads the result.
    """

    options: SegmentOptions
    runtime: Runtime
    table: StructureTable
    wanted: tuple[Structure, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Drawing:
    """What was drawn on one series.

    Attributes:
        series: the CT's slices.
        volume: their voxels.
        label_map: what was drawn, voxel for voxel on the CT.
        regions: the same, cut to a box a structure.
        findings: what deserves a look.
        model: what drew it; a server may have loaded another one since.
        place: the description of the runtime that it ran on.
    """

    series: CTSeries
    volume: CTVolume
    label_map: LabelMap
    regions: tuple[StructureRegion, ...]
    findings: tuple[Finding, ...]
    model: ModelConfig
    place: str


@dataclass(frozen=True, eq=False)
class SegmentedStudy:
    """A study that was segmented.

    Attributes:
        drawing: the CT and what was drawn on it.
        outputs: type -> file.
        runtime: model, checkpoint and where it ran, in one line.
        clock: the seconds of each stage.
    """

    drawing: Drawing
    outputs: Mapping[str, Path]
    runtime: str
    clock: StageClock


def segment_study(
    study: str | PathLike[str],
    options: SegmentOptions = DEFAULTS,
    *,
    runtime: Runtime | None = None,
    announce: Callable[[str], object] | None = None,
) -> SegmentedStudy:
    """Draw the organs at risk on the CT of one study, and write them.

    Args:
        study: a folder with one CT series in it or below, a DICOMDIR, or a zip file.
        options: how, and what is written.
        runtime: computes the network instead of `options.server`, and stays open: for several calls.
        announce: told in one line what was read, before it is drawn.

    Raises:
        StudyError, GeometryError: a study that cannot be read, or is not safe to contour.
        ServerError, ModelError: nothing that computes the model, or it fails; a structure that it does not know.
        OutputError: files that are there, or cannot be written.
    """
    study = Path(study)
    outputs = output_paths(options.output_types, study, output=options.output, overwrite=options.overwrite)
    options.validate()
    clock = StageClock()
    with ExitStack() as stack:
        table = load_structure_table(options.structure_table)
        with clock.stage("connect"):
            runtime = runtime or stack.enter_context(connected(options.server))
        task = task_for(options, runtime, table)
        with clock.stage("read"):
            folder = stack.enter_context(opened_study(study))
            series = read_ct_series(folder, series_instance_uid=options.series)
        drawing = draw_series(series, task, clock=clock, announce=announce)
        write_drawing(drawing, outputs, task, clock=clock)
        return SegmentedStudy(drawing, outputs, describe_model(drawing.model, drawing.place), clock)


def task_for(options: SegmentOptions, runtime: Runtime, table: StructureTable) -> Task:
    """What is to be drawn with a model.

    Raises:
        ModelError: a structure that the model does not know; none that patients taught.
    """
    names = runtime.model.structures
    wanted = chosen_structures(options.structures or names, names, table)
    notes: tuple[str, ...] = ()
    if not options.allow_unvalidated:
        wanted, notes = without_unvalidated(wanted, runtime.model)
    return Task(options, runtime, table, wanted, notes)


def draw_series(
    series: CTSeries, task: Task, *, clock: StageClock, announce: Callable[[str], object] | None = None
) -> Drawing:
    """Reads a series' voxels, draws on them, and looks for what may be wrong.

    Raises:
        StudyError, GeometryError: voxels that cannot be read, or not drawn on.
        ServerError, ModelError: the runtime fails, or another thread found that its model has changed meanwhile.
    """
    check_fits(series.geometry, task.runtime)
    with clock.stage("read"):
        volume = volume_from_series(series)
    if announce:
        announce(f"{volume.geometry.shape[0]} slices; {describe_runtime(task.runtime)}")
    with clock.stage("infer"):
        model = task.runtime.model
        drawn = segment(volume, task.runtime, whole_volume=task.options.whole_volume)
        if task.runtime.model != model:  # it may be of both
            raise ServerError("the server's model has changed meanwhile: segment the study again")
        place = task.runtime.description
        label_map = only_structures(drawn, task.wanted)
        label_map = replace(label_map, notes=(*label_map.notes, *task.notes))
    with clock.stage("check"):
        regions = regions_from_label_map(label_map)
        findings = (*unvalidated_findings(task.wanted, model), *find_warnings(volume, regions))
    return Drawing(series, volume, label_map, regions, findings, model, place)


def check_fits(geometry: VolumeGeometry, runtime: Runtime) -> None:
    """Whether a runtime would take a CT, before a voxel of it is read or sent.

    Its own grid counts, which this process holds in memory, and the one that it would be resampled to.

    Raises:
        GeometryError: it is too large, or oblique.
    """
    own = geometry.canonical()
    for grid in (own, trained_grid(own, runtime.model)):
        if isinstance(runtime, TritonRuntime):
            runtime.check_size(grid.shape)
        else:
            check_size(grid.shape, runtime.model)


def write_drawing(drawing: Drawing, outputs: Mapping[str, Path], task: Task, *, clock: StageClock) -> None:
    """Writes the files of `outputs`, and the report, picture and review page where they are asked for.

    Raises:
        OutputError: nothing was drawn, a file that is there, or one that cannot be written.
    """
    options, overwrite = task.options, task.options.overwrite
    volume, label_map, regions, findings = drawing.volume, drawing.label_map, drawing.regions, drawing.findings
    style = OutputStyle(task.table, describe_model(drawing.model, drawing.place), options.tolerance_mm, overwrite)
    write_outputs(
        dict(outputs), drawing.series, label_map, regions=regions, style=style, findings=findings, clock=clock
    )
    if options.picture:
        write_picture(options.picture, volume, label_map, overwrite=overwrite)
    if options.review:
        write_review(options.review, volume, regions, warnings=findings, notes=label_map.notes, overwrite=overwrite)
    if options.report:
        write_report(
            options.report,
            label_map,
            clock,
            model=drawing.model,
            runtime=drawing.place,
            regions=regions,
            findings=findings,
            overwrite=overwrite,
        )
