"""Videos for a person: `python musetalk_core.py SOURCE AUDIO OUTPUT`, several AUDIO files, or a list, loaded once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from musetalk.errors import MuseTalkError
from worker.cli.reports import Report, print_error
from worker.cli.tasks import Common, Task, check_paths, exit_status, inputs_of, params_from, read_list, tasks_of
from worker.config import Settings, load_settings
from worker.engine import Rendered, check_inputs
from worker.jobs import JobParams, Stage
from worker.telemetry import configure_logging

if TYPE_CHECKING:
    from musetalk.fetch_progress import Watcher
    from musetalk.render import Preview


class Renderer(Protocol):
    """The core, as far as the command line needs it; see `musetalk_core.Core` for the arguments and errors."""

    def load(self) -> None:
        """Load the models."""

    def render(
        self,
        source: Path,
        audio: Path,
        output: Path,
        params: JobParams | None = None,
        *,
        aspect_ratio: str | None = None,
        resolution: str | None = None,
        on_progress: Callable[[Stage, int, int], None] = ...,
    ) -> Rendered:
        """Write the video to `output`."""

    def preview(
        self,
        source: Path,
        audio: Path,
        time_s: float,
        params: JobParams | None = None,
        *,
        aspect_ratio: str | None = None,
        resolution: str | None = None,
    ) -> Preview:
        """Make one picture of the video."""


class RendererFactory(Protocol):
    """Makes the core; handed in, because the core's module runs this command and must not be imported by it."""

    def __call__(self, settings: Settings, *, fetch_watcher: Watcher) -> Renderer:
        """A core that has not loaded anything yet."""


_USAGE = """musetalk_core.py [options] SOURCE AUDIO OUTPUT
       musetalk_core.py [options] SOURCE AUDIO AUDIO... FOLDER
       musetalk_core.py [options] --list FILE"""
_EPILOG = """exit status: 0 made, 2 wrong usage or settings, 3 an input is at fault, 4 the machine is at fault,
130 stopped by Ctrl-C. Of several videos the highest status counts; the others are still made."""


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="musetalk_core.py",
        usage=_USAGE,
        description="Lip-sync SOURCE (video or still) to AUDIO and write the MP4 OUTPUT.",
        epilog=_EPILOG,
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="SOURCE, one AUDIO or more, OUTPUT")
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="make many videos: CSV with a header or JSON lines, with source, audio, output, and if wanted params, "
        "aspect_ratio, resolution; paths are relative to the folder of FILE",
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a job parameter, VALUE as JSON: --param face_box=[10,20,200,260] --param parsing_mode=raw",
    )
    parser.add_argument(
        "--preview",
        type=float,
        metavar="SECONDS",
        help="only the picture shown at this time; OUTPUT is then a .png or .jpg",
    )
    parser.add_argument("--aspect-ratio", help="crop around the face to a:b")
    parser.add_argument("--resolution", help="Np (short side) or WxH")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUTPUT that exists")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary; errors and warnings only")
    parser.add_argument("--json", action="store_true", help="one JSON object a video on stdout instead of the summary")
    # Options may stand between the paths.
    given = parser.parse_intermixed_args(arguments)
    _check_form(parser, given)
    return given


def _check_form(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End with a usage error for arguments that do not go together."""
    if given.list is not None and given.paths:
        parser.error("--list names the files; give no SOURCE, AUDIO or OUTPUT beside it")
    if given.list is None and len(given.paths) < 3:
        parser.error("SOURCE, AUDIO and OUTPUT are required")
    if given.preview is None:
        return
    if given.list is not None or len(given.paths) > 3:
        parser.error("--preview makes one picture: give one SOURCE, one AUDIO and one OUTPUT")
    _check_picture_name(parser, given.paths[-1])


def _check_picture_name(parser: argparse.ArgumentParser, output: Path) -> None:
    """Before minutes of work rather than after; the import takes a moment that only a preview spends."""
    from musetalk.media import PICTURE_SUFFIXES

    if output.suffix.lower() not in PICTURE_SUFFIXES:
        parser.error(f"with --preview OUTPUT ends in {', '.join(PICTURE_SUFFIXES)}")


def _tasks(given: argparse.Namespace) -> list[Task]:
    common = Common(params_from(given.param), given.aspect_ratio, given.resolution)
    if given.list is not None:
        return read_list(given.list, common)
    source, *audios, output = given.paths
    return tasks_of(source, audios, output, common)


def main(make_core: RendererFactory, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 made, 2 usage, 3 input, 4 machine, 130 interrupted)."""
    configure_logging("warning", sys.stderr)
    given = _parse_arguments(arguments)
    try:
        tasks = _tasks(given)
        settings = load_settings()
    except MuseTalkError as error:
        print_error(error)
        return exit_status(error)
    report = Report(len(tasks), as_json=given.json, is_quiet=given.quiet)
    try:
        # Before gigabytes are loaded, or fetched, for a name mistyped.
        status, usable = _checked(settings, tasks, given, report)
        if usable:
            status = max(status, _make_all(make_core, settings, usable, given.preview, report))
    except KeyboardInterrupt:
        made = f"{report.n_made} of {len(tasks)} videos were made" if len(tasks) > 1 else "no file was written"
        print(f"stopped; {made}", file=sys.stderr)
        return 130
    report.end()
    return status


def _checked(
    settings: Settings, tasks: Sequence[Task], given: argparse.Namespace, report: Report
) -> tuple[int, list[Task]]:
    """Report the tasks that cannot be made; return the worst status and the others."""
    worst, usable, inputs = 0, [], inputs_of(tasks)
    for task in tasks:
        try:
            check_paths(task, inputs, may_replace=given.overwrite)
            check_inputs(settings, task.source, task.audio)
            usable.append(task)
        except MuseTalkError as error:
            worst = max(worst, report.failed(task, error))
    return worst, usable


def _make_all(
    make_core: RendererFactory, settings: Settings, tasks: Sequence[Task], preview_s: float | None, report: Report
) -> int:
    """Load the models and make every task; return the worst status."""
    try:
        with report.loading(settings.models_dir) as watcher:
            core = make_core(settings, fetch_watcher=watcher)
            core.load()
    except MuseTalkError as error:
        return report.all_failed(tasks, error)
    worst = 0
    for number, task in enumerate(tasks, 1):
        try:
            if task.makes_folder:
                task.output.parent.mkdir(exist_ok=True)
            if preview_s is None:
                report.made(task, _render(core, task, number, report))
            else:
                report.pictured(task, _preview(core, task, preview_s))
        except Exception as error:  # noqa: BLE001 - reported with its trace; the other videos are still made
            worst = max(worst, report.failed(task, error))
    return worst


def _render(core: Renderer, task: Task, number: int, report: Report) -> Rendered:
    with report.progress(number) as show:
        return core.render(
            task.source,
            task.audio,
            task.output,
            task.params,
            aspect_ratio=task.aspect_ratio,
            resolution=task.resolution,
            on_progress=show,
        )


def _preview(core: Renderer, task: Task, time_s: float) -> Preview:
    preview = core.preview(
        task.source,
        task.audio,
        time_s,
        task.params,
        aspect_ratio=task.aspect_ratio,
        resolution=task.resolution,
    )
    preview.save(task.output)
    return preview
