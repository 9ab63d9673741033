"""The weights command with another manifest: `python -m tests.support.small_manifest MANIFEST.json COMMAND ...`.

Small files cannot have the official checksums, and the command accepts no others.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from musetalk import fetching, manifest
from musetalk.manifest import WeightFile


def write_manifest(path: Path, entries: Sequence[WeightFile]) -> Path:
    """Write the entries to the file that `install` reads."""
    path.write_text(json.dumps([asdict(entry) for entry in entries]), encoding="utf-8")
    return path


def install(path: Path) -> None:
    """Replace the manifest of this process and remove the pauses between attempts."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    entries: list[WeightFile] = []
    for entry in raw:
        values: dict[str, Any] = {**entry, "versions": tuple(entry["versions"]), "keeps": tuple(entry["keeps"])}
        entries.append(WeightFile(**values))
    manifest.MANIFEST = tuple(entries)
    fetching.fetch = functools.partial(fetching.fetch, pause=lambda _seconds: None)


def main() -> int:
    """Install, then run the weights command; `--largest-file N` as its first argument limits the size of files."""
    path, *arguments = sys.argv[1:]
    install(Path(path))
    if arguments[0] == "--largest-file":
        limit = int(arguments[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        arguments = arguments[2:]
    # Imported only now, because the command binds `fetch` by name.
    from worker.cli import weights as weights_command

    return weights_command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
