"""Command line for the weight files: `python -m musetalk.weights fetch|verify|convert`, with a bar on a terminal.

Knows settings and the model's files; makes no request itself and reads no tensor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from musetalk import manifest
from musetalk.errors import MuseTalkError
from musetalk.fetch_progress import Progress, Watcher, every_percent
from musetalk.fetching import fetch
from musetalk.manifest import ModelVersion
from worker.config import Settings, load_settings

# Without a terminal: percent between two lines.
_STEP_PERCENT = 10


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m musetalk.weights",
        description="Fetch the official weights, check them, or convert them to half-size safetensors files.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "fetch": "fetch missing or wrong files; interrupted downloads resume",
        "verify": "report each file as complete, missing, cut short or wrong; exit status 1 unless all are complete",
        "convert": "write float16 safetensors (float32 for the face networks) beside the checkpoints",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--version",
            choices=manifest.OFFICIAL,
            help="which model (default: MUSETALK_MODEL, else v15)",
        )
        command.add_argument("--models-dir", type=Path, help="the folder (default: MUSETALK_MODELS_DIR)")
        if name == "fetch":
            command.add_argument("--convert", action="store_true", help="convert afterwards")
            command.add_argument(
                "--restorer", action="store_true", help="only the optional face restorer, for params.restore"
            )
        if name != "verify":
            command.add_argument(
                "--remove-originals",
                action="store_true",
                help="with a conversion: delete each checkpoint once its converted file is written",
            )
    return parser.parse_args(arguments)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_on_stderr() -> Iterator[Watcher]:
    """Watcher that shows a bar over all files on a terminal, from the first byte on, or else lines of text."""
    if not sys.stderr.isatty():
        yield Watcher(_say, every_percent(_STEP_PERCENT, lambda now: _say(f"{now.percent} % ({now.name})")))
        return
    from tqdm import tqdm

    with ExitStack() as stack:
        bars: list[tqdm[NoReturn]] = []

        def show(progress: Progress) -> None:
            # Created with the first bytes, so that no bar stands still while files are checked.
            if not bars:
                bars.append(stack.enter_context(tqdm(unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)))
            bar = bars[0]
            bar.set_description(progress.name, refresh=False)
            bar.total = progress.n_total
            bar.update(progress.n_done - bar.n)

        yield Watcher(lambda text: tqdm.write(text, file=sys.stderr), show)


def _fetch_restorer(given: argparse.Namespace) -> int:
    with progress_on_stderr() as watcher:
        fetch(given.models_dir, given.version, manifest=(manifest.RESTORER,), watcher=watcher)
    path = given.models_dir / manifest.RESTORER.name
    print(f"MUSETALK_RESTORER={path}")
    print("needs: .venv/bin/python -m pip install --no-deps -r requirements-restorer.txt", file=sys.stderr)
    return 0


def _fetch(given: argparse.Namespace, settings: Settings) -> int:
    if given.restorer:
        return _fetch_restorer(given)
    with progress_on_stderr() as watcher:
        fetched = fetch(
            given.models_dir,
            given.version,
            manifest=manifest.with_s3fd_url(manifest.MANIFEST, settings.s3fd_url),
            watcher=watcher,
            room_for_conversion=given.convert,
        )
    print(f"{len(fetched)} files fetched" if fetched else "nothing to fetch: all files are present")
    return _convert(given) if given.convert else 0


def _convert(given: argparse.Namespace) -> int:
    from musetalk.converting_weights import convert

    version: ModelVersion = given.version
    made = convert(
        given.models_dir, version, manifest=manifest.MANIFEST, say=_say, remove_originals=given.remove_originals
    )
    print(f"{len(made)} files converted")
    return 0


def _verify(given: argparse.Namespace) -> int:
    from musetalk.verifying import verify

    findings = verify(given.models_dir, given.version, manifest=manifest.MANIFEST)
    for finding in findings:
        print(f"{finding.verdict:<10} {finding.name}: {finding.text}")
    bad = [finding for finding in findings if not finding.is_fine]
    if not bad:
        print(f"all files of {given.version} are complete and correct")
        return 0
    print(f"{len(bad)} of {len(findings)} files are missing or wrong; `fetch` replaces them")
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status (0 done, 1 failed, 130 interrupted)."""
    try:
        # First, so that wrong settings hide no help.
        given = _parse_arguments(arguments)
        settings = load_settings()
        given.version = given.version or ("v1" if settings.model == "v1" else "v15")
        given.models_dir = given.models_dir or settings.models_dir
        if given.command == "verify":
            return _verify(given)
        return _fetch(given, settings) if given.command == "fetch" else _convert(given)
    except MuseTalkError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("stopped; run the same command again to resume")
        return 130  # as shells report a command that SIGINT ended


if __name__ == "__main__":
    sys.exit(main())
