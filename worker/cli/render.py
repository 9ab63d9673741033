"""One video for a person: `python musetalk_core.py SOURCE AUDIO OUTPUT` with a progress bar and a summary."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from musetalk.errors import MuseTalkError, RequestError
from worker.cli.weights import progress_on_stderr
from worker.config import Settings, load_settings
from worker.engine import Rendered, check_inputs
from worker.jobs import JobParams, Stage, parse_params
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


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Lip-sync SOURCE (video or still) to AUDIO and write the MP4 OUTPUT.")
    parser.add_argument("source", type=Path)
    parser.add_argument("audio", type=Path)
    parser.add_argument("output", type=Path)
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
    given = parser.parse_args(arguments)
    if given.preview is not None:
        _check_picture_name(parser, given.output)
    return given


def _check_paths(given: argparse.Namespace) -> None:
    """Raise RequestError that names the path which makes the call useless; nothing is loaded before."""
    for name in ("source", "audio"):
        path: Path = getattr(given, name)
        if not path.exists():
            raise RequestError(f"{name.upper()} does not exist: {path}", field=name)
        if not path.is_file():
            raise RequestError(f"{name.upper()} is not a file: {path}", field=name)
        if given.output.exists() and given.output.samefile(path):
            raise RequestError(f"OUTPUT is {name.upper()} itself and would replace it: {path}", field="output")
    if given.output.is_dir():
        raise RequestError(f"OUTPUT is a folder: {given.output}", field="output")
    folder = given.output.parent
    if not folder.is_dir():
        raise RequestError(f"the folder of OUTPUT does not exist: {folder}", field="output")
    if not os.access(folder, os.W_OK):
        raise RequestError(f"the folder of OUTPUT cannot be written to: {folder}", field="output")


def _check_picture_name(parser: argparse.ArgumentParser, output: Path) -> None:
    """Before minutes of work rather than after; the import takes a moment that only a preview spends."""
    from musetalk.media import PICTURE_SUFFIXES

    if output.suffix.lower() not in PICTURE_SUFFIXES:
        parser.error(f"with --preview OUTPUT ends in {', '.join(PICTURE_SUFFIXES)}")


def _params_from(pairs: Sequence[str]) -> JobParams:
    raw: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise SystemExit(f"--param needs NAME=VALUE, not {pair!r}")
        try:
            raw[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            raw[name.replace("-", "_")] = text
    params = parse_params(raw)
    if params.ignored:
        raise SystemExit(f"unknown --param: {', '.join(params.ignored)}")
    return params


def main(make_core: RendererFactory, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 made, 1 could not be made)."""
    configure_logging("warning", sys.stderr)
    given = _parse_arguments(arguments)
    try:
        params = _params_from(given.param)
        _check_paths(given)
        settings = load_settings()
        # Before gigabytes are loaded, or fetched, for a name mistyped.
        check_inputs(settings, given.source, given.audio)
        print(f"loading the models from {settings.models_dir}", file=sys.stderr)
        with progress_on_stderr() as watcher:
            core = make_core(settings, fetch_watcher=watcher)
            core.load()
        if given.preview is None:
            _print_summary(given.output, _render(core, given, params))
        else:
            _preview(core, given, params)
    except MuseTalkError as error:
        print(f"error{f' in {error.stage}' if error.stage else ''}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; no file was written", file=sys.stderr)
        return 130
    return 0


def _render(core: Renderer, given: argparse.Namespace, params: JobParams) -> Rendered:
    from tqdm import tqdm

    with tqdm(unit="frame", desc="validation", file=sys.stderr, dynamic_ncols=True) as bar:

        def show(stage: Stage, done: int, total: int) -> None:
            bar.set_description(stage)
            if stage == "inference":
                bar.total = total
                bar.update(done - bar.n)

        return core.render(
            given.source,
            given.audio,
            given.output,
            params,
            aspect_ratio=given.aspect_ratio,
            resolution=given.resolution,
            on_progress=show,
        )


def _preview(core: Renderer, given: argparse.Namespace, params: JobParams) -> None:
    preview = core.preview(
        given.source,
        given.audio,
        given.preview,
        params,
        aspect_ratio=given.aspect_ratio,
        resolution=given.resolution,
    )
    preview.save(given.output)
    print(f"{given.output}: frame {preview.index}, shown at {preview.time_s:.3f} s")
    for warning in preview.warnings:
        print(f"warning: {warning}")


def _print_summary(output: Path, rendered: Rendered) -> None:
    summary, clock = rendered.summary, rendered.clock
    print(
        f"{output}: {summary.n_frames} frames, {summary.width}x{summary.height}, {float(summary.rate):.3f} fps, "
        f"{summary.duration_s:.3f} s, model {summary.model}"
    )
    print(
        f"source frames {summary.n_source_frames}, without a face {summary.n_without_face}, "
        f"interpolated {summary.n_interpolated}"
    )
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in clock.seconds.items())
    print(f"{stages}; {summary.n_frames / max(clock.total_s, 1e-9):.2f} frames a second in all")
    for warning in summary.warnings:
        print(f"warning: {warning}")
