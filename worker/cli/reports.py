"""What the command line prints: results on stdout as text or JSON lines, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from musetalk.errors import MuseTalkError
from worker.cli.tasks import Task, exit_status
from worker.cli.weights import progress_on_stderr
from worker.engine import Rendered, video_stats
from worker.jobs import DEMO_NOTICE, Stage, error_body, stage_times_body

if TYPE_CHECKING:
    from musetalk.fetch_progress import Watcher
    from musetalk.render import Preview

OnProgress = Callable[[Stage, int, int], None]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_error(error: MuseTalkError, output: Path | None = None) -> None:
    """One line on stderr; `output` where several videos are made."""
    place = f"{f' for {output}' if output else ''}{f' in {error.stage}' if error.stage else ''}"
    _say(f"error{place}: {error}")


class Report:
    """The outcomes of one call, printed as they come; `failed` and `all_failed` return the exit status."""

    def __init__(self, n_tasks: int, *, as_json: bool, is_quiet: bool) -> None:
        """`as_json`: one object a line on stdout instead of text; `is_quiet`: only errors and warnings, on stderr."""
        self._n_tasks, self._as_json, self._is_quiet = n_tasks, as_json, is_quiet
        self._is_demo = False
        self.n_made = 0

    @contextmanager
    def loading(self, models_dir: Path) -> Iterator[Watcher]:
        """Announce the loading of the models and watch a download of weights."""
        if self._is_quiet:
            from musetalk.fetch_progress import Watcher

            yield Watcher()
            return
        _say(f"loading the models from {models_dir}")
        with progress_on_stderr() as watcher:
            yield watcher

    @contextmanager
    def progress(self, number: int) -> Iterator[OnProgress]:
        """Show a bar over the frames of the video with this number, from 1."""
        if self._is_quiet:
            yield lambda _stage, _done, _total: None
            return
        from tqdm import tqdm

        place = f"[{number}/{self._n_tasks}] " if self._n_tasks > 1 else ""
        with tqdm(unit="frame", desc=f"{place}validation", file=sys.stderr, dynamic_ncols=True) as bar:

            def show(stage: Stage, done: int, total: int) -> None:
                bar.set_description(f"{place}{stage}")
                if stage == "inference":
                    bar.total = total
                    bar.update(done - bar.n)

            yield show

    def made(self, task: Task, rendered: Rendered) -> None:
        """Print the figures of a finished video."""
        summary, clock = rendered.summary, rendered.clock
        self._note(summary.model)
        video = video_stats(summary)
        times = {"stage_times": stage_times_body(clock.seconds), "total_time": round(clock.total_s, 3)}
        self._line(task, {"status": "success", "model": summary.model, "video": video, **times}, summary.warnings)
        stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in clock.seconds.items())
        self._text(
            f"{task.output}: {summary.n_frames} frames, {summary.width}x{summary.height}, "
            f"{float(summary.rate):.3f} fps, {summary.duration_s:.3f} s, model {summary.model}",
            f"source frames {summary.n_source_frames}, without a face {summary.n_without_face}, "
            f"interpolated {summary.n_interpolated}",
            f"{stages}; {summary.n_frames / max(clock.total_s, 1e-9):.2f} frames a second in all",
            warnings=summary.warnings,
        )

    def pictured(self, task: Task, preview: Preview) -> None:
        """Print which picture was written."""
        self._note(preview.model)
        picture = {"frame": preview.index, "time_sec": round(preview.time_s, 6)}
        self._line(task, {"status": "success", "model": preview.model, "picture": picture}, preview.warnings)
        self._text(f"{task.output}: frame {preview.index}, shown at {preview.time_s:.3f} s", warnings=preview.warnings)

    def failed(self, task: Task, error: Exception) -> int:
        """Print why one video was not made; an error that nobody raised on purpose with its trace."""
        if isinstance(error, MuseTalkError):
            print_error(error, task.output if self._n_tasks > 1 else None)
        else:
            traceback.print_exception(error, file=sys.stderr)
        self._fail_line(task, error)
        return exit_status(error)

    def all_failed(self, tasks: Sequence[Task], error: MuseTalkError) -> int:
        """Print once why none of `tasks` can be made."""
        print_error(error)
        for task in tasks:
            self._fail_line(task, error)
        return exit_status(error)

    def end(self) -> None:
        """Print what concerns all videos."""
        if self._is_quiet:
            return
        out = sys.stderr if self._as_json else sys.stdout
        if self._n_tasks > 1:
            print(f"{self.n_made} of {self._n_tasks} videos made", file=out)
        if self._is_demo:
            print(f"note: {DEMO_NOTICE}", file=out)

    def _note(self, model: str) -> None:
        self.n_made += 1
        self._is_demo = self._is_demo or model == "demo"

    def _text(self, *lines: str, warnings: Sequence[str]) -> None:
        if not self._as_json and not self._is_quiet:
            for line in lines:
                print(line, flush=True)
        # Results go to a program or to nobody; a person should still see the warnings.
        out = sys.stderr if self._as_json or self._is_quiet else sys.stdout
        for warning in warnings:
            print(f"warning: {warning}", file=out, flush=True)

    def _fail_line(self, task: Task, error: Exception) -> None:
        body = error_body(error)[1]
        # The trace is on stderr, and `error` repeats the message for callers older than this command.
        kept = {name: value for name, value in body.items() if name not in {"stack_trace", "error"}}
        self._line(task, {**kept, "exit_status": exit_status(error)}, ())

    def _line(self, task: Task, body: dict[str, object], warnings: Sequence[str]) -> None:
        if not self._as_json:
            return
        names = {"source": str(task.source), "audio": str(task.audio), "output": str(task.output)}
        status = {"status": body.pop("status")}
        print(json.dumps({**status, **names, **body, "warnings": list(warnings)}), flush=True)
