"""The videos that one call of the command line makes: from its arguments, or from a list in a file.

Knows files and parameters; loads nothing and writes nothing.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musetalk.errors import MediaError, RequestError, SettingsError
from musetalk.output_geometry import parse_request
from worker.jobs import JobParams, parse_params

_REQUIRED = ("source", "audio", "output")
_OPTIONAL = ("params", "aspect_ratio", "resolution")

# Exit statuses; 1 is left to Python, which ends with it after an error that nobody foresaw.
STATUS_USAGE, STATUS_INPUT, STATUS_MACHINE = 2, 3, 4


class UsageError(RequestError):
    """The command line asks for something that cannot be done."""


def exit_status(error: BaseException) -> int:
    """Exit status for `error`: 2 for usage and settings, 3 for an input at fault, 4 for the machine."""
    if isinstance(error, (UsageError, SettingsError)):
        return STATUS_USAGE
    return STATUS_INPUT if isinstance(error, MediaError) else STATUS_MACHINE


@dataclass(frozen=True)
class Common:
    """What the options of the command line set for every video: raw parameters by name, crop, size."""

    params: Mapping[str, object]
    aspect_ratio: str | None = None
    resolution: str | None = None


@dataclass(frozen=True)
class Task:
    """One video to make; `makes_folder`: the folder of `output` is created when the first video is due."""

    source: Path
    audio: Path
    output: Path
    params: JobParams
    aspect_ratio: str | None = None
    resolution: str | None = None
    makes_folder: bool = False


def params_from(pairs: Sequence[str]) -> dict[str, object]:
    """Raw parameters from NAME=VALUE texts, VALUE as JSON or plain text; raises UsageError."""
    raw: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--param needs NAME=VALUE, not {pair!r}")
        try:
            raw[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            raw[name.replace("-", "_")] = text
    _checked(raw, "--param")
    return raw


def _checked(raw: object, origin: str) -> JobParams:
    try:
        params = parse_params(raw)
    except RequestError as error:
        raise UsageError(error.message) from None
    if params.ignored:
        raise UsageError(f"unknown {origin}: {', '.join(params.ignored)}")
    return params


def _check_shape(aspect_ratio: str | None, resolution: str | None) -> None:
    try:
        parse_request(aspect_ratio, resolution)
    except RequestError as error:
        raise UsageError(error.message) from None


def tasks_of(source: Path, audios: Sequence[Path], output: Path, common: Common) -> list[Task]:
    """One task an audio; with several, `output` is the folder of the videos. Raises UsageError."""
    params = _checked(dict(common.params), "--param")
    _check_shape(common.aspect_ratio, common.resolution)
    if len(audios) == 1:
        return [Task(source, audios[0], output, params, common.aspect_ratio, common.resolution)]
    if output.exists() and not output.is_dir():
        raise UsageError(f"with several AUDIO files OUTPUT is a folder: {output}")
    return _without_doubles(
        [
            Task(source, audio, output / f"{audio.stem}.mp4", params, common.aspect_ratio, common.resolution, True)
            for audio in audios
        ]
    )


def read_list(path: Path, common: Common) -> list[Task]:
    """Tasks of a CSV file with a header, or of a file with one JSON object a line.

    Paths in the list are relative to its folder; its values replace those of the command line. Raises UsageError that
    names every mistake.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the list {path} cannot be read: {reason}") from None
    rows = _json_rows(text) if text.lstrip().startswith("{") else _csv_rows(text)
    tasks: list[Task] = []
    mistakes: list[str] = []
    for line, row in rows:
        try:
            tasks.append(_task_of(row, path.parent, common))
        except UsageError as error:
            mistakes.append(f"{path} line {line}: {error.message}")
    if mistakes:
        raise UsageError("\n".join(mistakes))
    if not tasks:
        raise UsageError(f"the list {path} names no video")
    return _without_doubles(tasks)


def _json_rows(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError:
            yield number, None


def _csv_rows(text: str) -> Iterator[tuple[int, object]]:
    header = text.split("\n", 1)[0]
    # Spreadsheets of some languages separate by semicolons.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if ";" in header else ",")
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error:
        yield reader.line_num, None


def _task_of(row: object, folder: Path, common: Common) -> Task:
    if not isinstance(row, Mapping):
        raise UsageError("not a JSON object or CSV row")
    if None in row:
        raise UsageError("more fields than the header has")
    given = {str(name).strip(): value for name, value in row.items() if value not in (None, "")}
    if unknown := sorted(given.keys() - {*_REQUIRED, *_OPTIONAL}):
        raise UsageError(f"unknown fields: {', '.join(unknown)}")
    if missing := [name for name in _REQUIRED if name not in given]:
        raise UsageError(f"{' and '.join(missing)} missing")
    texts: dict[str, str] = {}
    for name in given.keys() - {"params"}:
        value = given[name]
        if not isinstance(value, str) or "\0" in value:
            raise UsageError(f"{name} must be text")
        texts[name] = value.strip()
    aspect_ratio = texts.get("aspect_ratio", common.aspect_ratio)
    resolution = texts.get("resolution", common.resolution)
    _check_shape(aspect_ratio, resolution)
    return Task(
        folder / texts["source"],
        folder / texts["audio"],
        folder / texts["output"],
        params=_checked({**common.params, **_own_params(given.get("params", {}))}, "params"),
        aspect_ratio=aspect_ratio,
        resolution=resolution,
    )


def _own_params(value: object) -> Mapping[str, object]:
    """The parameters of one row: a JSON object, in CSV as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Mapping):
        raise UsageError("params must be a JSON object")
    return value


def _without_doubles(tasks: list[Task]) -> list[Task]:
    seen: set[Path] = set()
    for task in tasks:
        place = task.output.resolve()
        if place in seen:
            raise UsageError(f"two videos have the same OUTPUT: {task.output}")
        seen.add(place)
    return tasks


def inputs_of(tasks: Sequence[Task]) -> set[tuple[int, int]]:
    """Device and inode of every input that exists."""
    stats = (path.stat() for task in tasks for path in (task.source, task.audio) if path.exists())
    return {(stat.st_dev, stat.st_ino) for stat in stats}


def check_paths(task: Task, inputs: set[tuple[int, int]], *, may_replace: bool) -> None:
    """Raise an error that names the path which makes the task useless; `inputs` are those of all tasks.

    RequestError for an input, UsageError for the output.
    """
    output = task.output
    for name, path in (("source", task.source), ("audio", task.audio)):
        if not path.exists():
            raise RequestError(f"{name.upper()} does not exist: {path}", field=name)
        if not path.is_file():
            raise RequestError(f"{name.upper()} is not a file: {path}", field=name)
        if output.exists() and output.samefile(path):
            raise UsageError(f"OUTPUT is {name.upper()} itself and would replace it: {path}", field="output")
    if output.is_dir():
        raise UsageError(f"OUTPUT is a folder: {output}", field="output")
    folder = output.parent
    if task.makes_folder and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"the folder of OUTPUT does not exist: {folder}", field="output")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"the folder of OUTPUT cannot be written to: {folder}", field="output")
    if output.exists():
        stat = output.stat()
        if (stat.st_dev, stat.st_ino) in inputs:
            raise UsageError(f"OUTPUT is an input of another video and would replace it: {output}", field="output")
        if not may_replace:
            raise UsageError(f"OUTPUT exists; --overwrite replaces it: {output}", field="output")
