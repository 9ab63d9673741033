"""Data outside the repository, named by environment variables; without them the tests that need it are skipped.

GOLDEN_DIR: inputs and outputs of the original implementation. MEDIA_DIR: real talking-head clips and speech.
"""

from __future__ import annotations

import os
from pathlib import Path


def folder_named_by(variable: str) -> Path | None:
    """The folder that an environment variable names, or None when it is unset. Raises when it does not exist."""
    value = os.environ.get(variable)
    if not value:
        return None
    folder = Path(value)
    if not folder.is_dir():
        raise FileNotFoundError(f"{variable} names a folder that does not exist")
    return folder


GOLDEN_DIR = folder_named_by("GOLDEN_DIR")
MEDIA_DIR = folder_named_by("MEDIA_DIR")
