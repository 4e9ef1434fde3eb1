"""`anatomynet-client`: the straight path as commands. CT study in, RTSTRUCT out.

Heavy modules are imported by the command that needs them: `--help` answers at once.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anatomynet.engine.command import reports_errors
from anatomynet.engine.output import prepare_folder, refuse_existing
from anatomynet.engine.structures import structures_by_name

if TYPE_CHECKING:
    from anatomynet.client.connection import ServerOptions
    from anatomynet.client.pipeline import SegmentedStudy, SegmentOptions
    from anatomynet.client.study_search import FoundStudy
    from anatomynet.engine.structure_region import StructureRegion

TABLE_NAME = "anatomynet-segment.csv"
URL_HELP = (
    "Triton server, HOST:PORT of its gRPC, or https://HOST:PORT; several times for several in turn. Without it: "
    "localhost, if a model answers there, else this machine."
)


@click.group()
@click.version_option(package_name="anatomynet")
def main() -> None:
    """Draw the organs at risk on head-and-neck CT. Research use only; not a medical device."""


def server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command with the options that say which servers; it gets them as one `server`, a ServerOptions."""

    @click.option("--url", "urls", multiple=True, help=URL_HELP)
    @click.option(
        "--shared-memory",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="How volumes reach a server on this machine, with --url.",
    )
    @click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        default=120.0,
        show_default=True,
        help="Seconds for one volume with --url, every try and its wait in a queue included.",
    )
    @click.option(
        "--wait",
        "wait_s",
        type=click.FloatRange(min=0),
        default=15.0,
        show_default=True,
        help="Seconds for a server at --url that is just starting.",
    )
    @click.option("--tls-ca", type=click.Path(path_type=Path), help="CAs of https://, PEM; the public ones without.")
    @click.option("--tls-cert", type=click.Path(path_type=Path), help="This client's own certificate, PEM.")
    @click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
    @click.option(
        "--api-key-file",
        type=click.Path(path_type=Path),
        help="File with the API key of https://; without it the variable ANATOMYNET_API_KEY.",
    )
    @wraps(command)
    def run(**values: Any) -> None:
        from anatomynet.client.connection import ServerOptions

        # Each of these options' names is that of a field.
        names = [field.name for field in fields(ServerOptions) if field.name in values]
        server = {name: values.pop(name) for name in names}
        command(server=ServerOptions(**server, tell=lambda line: click.echo(line, err=True)), **values)

    return run


def split_names(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """An option's names, with commas between."""
    return tuple(text.split(",")) if text else ()


@main.command()
@click.argument("studies", metavar="STUDY...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="File of the first type, others beside it; STUDY.rtstruct.dcm."
)
@click.option(
    "--output-folder",
    type=click.Path(path_type=Path),
    help="For the outputs of many studies, called after them; made if need be. Beside each study without.",
)
@click.option("--all-series", is_flag=True, help="Every CT series of a study; files end in the last digits of its UID.")
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path),
    help=f"What happened to each study; {TABLE_NAME} in --output-folder.",
)
@click.option(
    "--output-type",
    "output_types",
    default="rtstruct",
    show_default=True,
    callback=split_names,
    help="Some of rtstruct, seg and nifti, with commas between.",
)
@server_options
@click.option("--series", help="SeriesInstanceUID, or its end, where the study has several.")
@click.option(
    "--structures",
    callback=split_names,
    help="Which to draw, by name, with commas between; all that the model knows without.",
)
@click.option("--allow-unvalidated", is_flag=True, help="Draw those too that no patient taught the network.")
@click.option(
    "--whole-volume", is_flag=True, help="Show the network the whole body; without, head and neck if they can be found."
)
@click.option("--structure-table", type=click.Path(path_type=Path), help="Your names, colours and types: a TOML file.")
@click.option(
    "--tolerance-mm",
    type=click.FloatRange(min=0),
    help="How far a thinned contour may run beside the full one; 0 keeps every point. Without it: as far as leaves "
    "every voxel in its structure.",
)
@click.option("--report", type=click.Path(path_type=Path), help="What was done, as JSON; without anything private.")
@click.option("--picture", type=click.Path(path_type=Path), help="A PNG of three planes with what was drawn.")
@click.option(
    "--review", type=click.Path(path_type=Path), help="The review page, with all that the network was unsure of."
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@reports_errors
def segment(
    studies: tuple[Path, ...], output_folder: Path | None, all_series: bool, csv_path: Path | None, **values: Any
) -> None:
    """Draw the organs at risk on the CT in each STUDY, a folder or a zip file, and write an RTSTRUCT.

    STUDY may be a folder of studies too: one below which lie CT of several patients or studies. Of many studies one is
    read while another is drawn on; a bad one is told at the end, and what was done before is not done again.
    """
    from anatomynet.client.pipeline import SegmentOptions, segment_study
    from anatomynet.client.study_search import FoundStudy, find_studies

    options = SegmentOptions(**values)  # each option's name is that of a field
    if options.series and len(studies) == 1:
        found = [FoundStudy(studies[0], studies[0].name)]
    else:
        found = find_studies(studies, left_out=[output_folder] if output_folder else [])
    if len(found) == 1 and not (output_folder or all_series or csv_path):
        echo_result(segment_study(found[0].path, options, announce=click.echo))
    else:
        csv_path = csv_path or (output_folder and output_folder / TABLE_NAME)
        segment_many(found, options, output_folder=output_folder, all_series=all_series, csv_path=csv_path)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Another seed is another patient.")
@click.option("--overwrite", is_flag=True, help="Replace a study that exists.")
@reports_errors
def phantom(folder: Path, seed: int, overwrite: bool) -> None:
    """Write a synthetic 178 x 512 x 512 CT study to FOLDER, and its true contours to FOLDER.truth.dcm."""
    from anatomynet.client.contours import trace_contours
    from anatomynet.client.ct_writer import write_ct_series
    from anatomynet.client.rtstruct import write_rtstruct
    from anatomynet.engine.phantom import make_phantom

    truth_path = folder.absolute().with_name(f"{folder.absolute().name}.truth.dcm")
    prepare_folder(folder, overwrite=overwrite)
    refuse_existing(truth_path, overwrite=overwrite)
    volume, truth = make_phantom(seed=seed)
    series = write_ct_series(folder, volume, seed=seed, phantom=True)
    write_rtstruct(truth_path, series, trace_contours(truth), model_description="phantom", overwrite=overwrite)
    click.echo(f"{folder}: {len(series.slices)} slices of a synthetic patient; its contours: {truth_path}")


@main.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path), required=True, help="RTSTRUCT, SEG or NIfTI.")
@click.option("--prediction", type=click.Path(path_type=Path), required=True, help="RTSTRUCT, SEG or NIfTI.")
@click.option("--series", help="SeriesInstanceUID, or its end, where the study has several.")
@click.option("--aliases", type=click.Path(path_type=Path), help="Your ROI names: a TOML table, structure = [names].")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Every number, as JSON.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="A line a structure, for a spreadsheet.")
@click.option("--figure", type=click.Path(path_type=Path), help="A PNG: reference green, prediction red, both yellow.")
@click.option("--animation", type=click.Path(path_type=Path), help="A GIF or MP4: side by side through the slices.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@reports_errors
def compare(
    study: Path,
    reference: Path,
    prediction: Path,
    series: str | None,
    aliases: Path | None,
    json_path: Path | None,
    csv_path: Path | None,
    figure: Path | None,
    animation: Path | None,
    overwrite: bool,
) -> None:
    """Measure how well a physician's contours and the network's agree on the CT in the folder STUDY."""
    from anatomynet.client.compare import compare_files, table_lines, write_csv, write_json
    from anatomynet.client.overlay import check_animation, write_animation, write_figure
    from anatomynet.client.study import read_ct_series, volume_from_series

    for path in filter(None, (json_path, csv_path, figure, animation)):
        refuse_existing(path, overwrite=overwrite)
    if animation:
        check_animation(animation)
    ct_series = read_ct_series(study_folder(study), series_instance_uid=series)
    comparison = compare_files(prediction, reference, ct_series, alias_file=aliases)
    for line in table_lines(comparison):
        click.echo(line)
    if json_path:
        write_json(json_path, comparison, overwrite=overwrite)
    if csv_path:
        write_csv(csv_path, comparison, overwrite=overwrite)
    volume = volume_from_series(ct_series) if figure or animation else None
    if volume and figure:
        write_figure(figure, volume, comparison, overwrite=overwrite)
    if volume and animation:
        write_animation(animation, volume, comparison, overwrite=overwrite)


@main.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.argument("rtstruct", metavar="RS.dcm", type=click.Path(path_type=Path))
@click.option("--reference", metavar="RS.dcm", type=click.Path(path_type=Path), help="Contours to compare with.")
@click.option("--output", type=click.Path(path_type=Path), help="HTML file to write; RS.review.html.")
@click.option("--series", help="SeriesInstanceUID, or its end, where the study has several.")
@click.option("--with-patient-header", is_flag=True, help="Name the patient on the page; nobody is named without.")
@click.option("--overwrite", is_flag=True, help="Replace a page that exists.")
@reports_errors
def review(
    study: Path,
    rtstruct: Path,
    reference: Path | None,
    output: Path | None,
    series: str | None,
    with_patient_header: bool,
    overwrite: bool,
) -> None:
    """Write one HTML file to look through the contours RS.dcm on the CT in the folder STUDY, in any browser."""
    from anatomynet.client.review import patient_header, regions_from_structure_set, write_review
    from anatomynet.client.structure_set import read_structure_set
    from anatomynet.client.study import read_ct_series, volume_from_series
    from anatomynet.engine.findings import find_warnings

    output = output or rtstruct.absolute().with_suffix(".review.html")
    refuse_existing(output, overwrite=overwrite)
    ct_series = read_ct_series(study_folder(study), series_instance_uid=series)
    drawn, warnings = regions_from_structure_set(read_structure_set(rtstruct, ct_series))
    compared: tuple[StructureRegion, ...] = ()
    if reference:
        compared, unread = regions_from_structure_set(read_structure_set(reference, ct_series))
        warnings += unread
    volume = volume_from_series(ct_series)
    expected = [region.structure for region in compared if region.structure and region.voxels]
    warnings += find_warnings(volume, drawn, expected=expected)
    header = patient_header(ct_series) if with_patient_header else None
    write_review(output, volume, drawn, reference=compared, warnings=warnings, header=header, overwrite=overwrite)
    click.echo(f"{output}: {len(drawn)} structures, {len(warnings)} warnings")


@main.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", metavar="DEST", type=click.Path(path_type=Path))
@click.option("--aliases", type=click.Path(path_type=Path), help="Your ROI names: a TOML table, structure = [names].")
@reports_errors
def archive(source: Path, folder: Path, aliases: Path | None) -> None:
    """Turn CT series, each with the RTSTRUCT that refers to it, into cases to train on.

    SRC is a folder, however its studies lie in it, or a zip file; DEST gets the cases. DEST/archive.csv says which ROI
    was taken for which structure, what was left out and what deserves a look. It names folders, and so perhaps
    patients: look at it, and keep it. Then split the cases into two folders of one, train and validation, for
    anatomynet-train; those of one patient begin alike, and belong on one side.
    """
    from collections import Counter

    from anatomynet.client.archive import archive_studies

    click.echo(f"looking through all files in {source}")
    matched, unmatched = Counter[str](), Counter[str]()
    for study in archive_studies(source, folder, alias_file=aliases):
        matched.update(study.matched.keys())
        unmatched.update(study.unmatched)
        kind = "archived" if study.case else "skipped"
        click.echo(f"{kind} {study.study}: {'; '.join((study.case, *study.remarks)).removeprefix('; ')}")
    for name, count in sorted(matched.items()):
        click.echo(f"  {name:<16}{count:7} case{'s' if count > 1 else ''}")
    if unmatched:
        click.echo(f"not matched: {', '.join(f'{name} ({count})' for name, count in unmatched.most_common())}")


@main.command()
@server_options
@click.option("--check", is_flag=True, help="One line, and exit status 0 OK, 1 WARNING or 2 CRITICAL, as for Nagios.")
@reports_errors
def info(server: "ServerOptions", *, check: bool) -> None:
    """Show which model answers and where it runs, and let it draw a small phantom."""
    from anatomynet.client.connection import connected, describe_runtime
    from anatomynet.client.health import check_health, probe_runtime
    from anatomynet.client.triton import TritonRuntime

    if check:
        health = check_health(server)
        click.echo(health.line)
        raise SystemExit(health.status)
    with connected(server) as runtime:
        model = runtime.model
        click.echo(describe_runtime(runtime))
        click.echo(f"structures: {', '.join(s.tg263_name for s in structures_by_name(model.structures))}")
        if model.unvalidated:
            untaught = structures_by_name(model.unvalidated)
            click.echo(f"of which no patient taught: {', '.join(s.tg263_name for s in untaught)}")
        click.echo(f"trained for spacing (x, y, z): {model.smallest_spacing} to {model.largest_spacing} mm")
        click.echo(f"checkpoint sha256: {model.checkpoint_sha256}")
        if isinstance(runtime, TritonRuntime):
            shared = "open to whoever reaches the server" if runtime.is_shared_memory_open() else "closed"
            click.echo(f"shared memory: {shared}")
        probe = probe_runtime(runtime)
        click.echo(f"probe: {' x '.join(map(str, probe.shape))} voxels in {probe.seconds:.2f} s, {probe.verdict}")


@main.command()
@click.option("--config", type=click.Path(path_type=Path), required=True, help="The node's settings: a TOML file.")
@click.option("--status", is_flag=True, help="Show what is in the spool, whether or not the node runs.")
@click.option(
    "--retry",
    is_flag=False,
    flag_value="",
    metavar="[UID]",
    help="Put back what is parked: all of it, or the series whose UID ends so.",
)
@reports_errors
def listen(config: Path, status: bool, retry: str | None) -> None:
    """Be a DICOM node: receive CT by C-STORE, draw on each series, send the contours on. SIGTERM ends it."""
    from anatomynet.client.node import retry_parked, run_node, status_lines
    from anatomynet.client.node_config import load_node_config
    from anatomynet.client.node_spool import Spool

    settings = load_node_config(config)
    if status and retry is not None:
        raise click.UsageError("--status and --retry are two commands: give one")
    if status or retry is not None:
        spool = Spool(settings.spool)
        for line in status_lines(spool) if status else retry_parked(spool, retry or ""):
            click.echo(line)
    else:
        run_node(settings)


def study_folder(study: Path) -> Path:
    """Where to read a study, which may be a zip file: what was unpacked lasts as long as the command."""
    from anatomynet.client.study_files import opened_study

    return click.get_current_context().with_resource(opened_study(study))


def segment_many(
    found: "Sequence[FoundStudy]",
    options: "SegmentOptions",
    *,
    output_folder: Path | None,
    all_series: bool,
    csv_path: Path | None,
) -> None:
    """Segments studies, with progress on stderr; prints what happened to each, however the run ends.

    Raises:
        StudyError: some could not be drawn.
    """
    from anatomynet.client.cohort import StudyOutcome, segment_found
    from anatomynet.client.cohort_table import Progress, check_csv, table_lines, write_csv
    from anatomynet.engine.errors import StudyError

    progress = Progress(len(found))
    outcomes: list[StudyOutcome] = []
    run = segment_found(found, options, output_folder=output_folder, all_series=all_series)
    if csv_path:
        check_csv(csv_path, overwrite=options.overwrite)
    try:
        with closing(run):  # else what waits is drawn before the process ends
            for outcome in run:
                outcomes.append(outcome)
                click.echo(progress.line(outcome), err=True)
    finally:
        if outcomes:
            if csv_path:
                write_csv(csv_path, outcomes)
            click.echo("\n".join(table_lines(outcomes)))
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    if failed:
        raise StudyError(f"{failed} of {len(outcomes)} could not be drawn; the table says why")


def echo_result(result: "SegmentedStudy") -> None:
    """Prints notes, a table of what was found, what to look at, and the files with the seconds they took."""
    from anatomynet.client.report import structure_volumes_ml

    label_map = result.drawing.label_map
    for note in label_map.notes:
        click.echo(f"note: {note}")
    if label_map.computed_share is not None:
        click.echo(f"computed: {label_map.computed_share:.0%} of the scan's voxels")
    confidence = label_map.confidence or ()
    volumes = structure_volumes_ml(result.drawing.regions, label_map.geometry)
    for (name, volume_ml), sure in zip(volumes.items(), confidence, strict=True):
        found = f"{volume_ml:8.2f} ml   border confidence {sure:.2f}" if volume_ml else "   not found"
        click.echo(f"  {name:<16}{found}")
    for finding in result.drawing.findings:
        click.echo(f"look at {finding.name or 'the scan'}: {finding.text}")
    click.echo(f"{', '.join(map(str, result.outputs.values()))}: {result.clock.summary()}")
