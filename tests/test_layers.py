"""Imports go down only: the table of layers, read from the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Module -> the modules of ours it may import, directly or inside a function. A package stands for all it holds.
MODEL = {"musetalk", "errors"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "jobs": {"errors"},
    "openapi": {"jobs"},
    "fitness": {"errors"},
    "job_control": {"errors", "jobs"},
    "addresses": {"errors"},
    "connections": {"errors", "addresses"},
    "downloads": {"errors", "addresses", "connections"},
    "storage": {"errors", "backblaze"},
    "backblaze": {"errors", "storage", "connections"},
    "telemetry": {"errors", "jobs"},
    "orchestrator": {"errors", "config", "jobs", "telemetry", "connections"},
    "poller": {"errors", "jobs", "telemetry", "musetalk_core", "orchestrator"},
    "musetalk_core": {
        *("errors", "config", "jobs", "downloads", "storage", "telemetry", "musetalk"),
        *("engine", "fitness", "job_control", "command_line"),
    },
    "engine": {"errors", "config", "jobs", "fitness", "telemetry", "musetalk"},
    "command_line": {"errors", "config", "jobs", "telemetry", "musetalk_core", "musetalk", "engine", "weights_command"},
    # Of the model only its version.
    "app": {
        *("errors", "config", "jobs", "telemetry", "musetalk_core", "orchestrator", "openapi", "musetalk"),
        "playground",
    },
    "playground": {"errors", "config", "jobs", "musetalk_core"},
    "lifecycle": {"musetalk_core", "telemetry"},
    "weights_command": {"errors", "config", "musetalk"},
    # Only where it is run as a command: the command reads settings, which the model must not know.
    "musetalk/weights": {*MODEL, "weights_command"},
    "gunicorn.conf": {"errors", "config", "lifecycle", "musetalk_core", "poller"},
}
# What a part must never import, also not from outside.
FORBIDDEN: dict[str, set[str]] = {
    "app": {"torch", "cv2", "av", "numpy", "b2sdk"},
    "playground": {"torch", "cv2", "av", "numpy", "b2sdk"},
    "config": {"torch", "flask"},
    "jobs": {"torch", "flask", "requests"},
    "orchestrator": {"torch", "flask"},
    "poller": {"torch", "flask", "b2sdk", "requests"},
    "musetalk_core": {"cv2", "av", "numpy", "flask", "torch"},
    "engine": {"cv2", "av", "numpy", "flask", "torch"},
    "musetalk": {"flask", "requests", "b2sdk", "gunicorn", "dotenv"},
    "musetalk/media": {"torch"},
    "musetalk/blending": {"torch"},
    "musetalk/frame_store": {"torch"},
    "musetalk/geometry": {"numpy", "torch"},
    "musetalk/silence": {"torch", "av", "cv2"},
    "musetalk/output_geometry": {"numpy", "torch"},
    "musetalk/networks": {"os", "pathlib", "errors"},
    "musetalk/weights": {"musetalk/networks"},
    "musetalk/faces": {"musetalk/blending", "musetalk/media"},
    "musetalk/audio": {"av", "musetalk/media"},
}
OURS = {path.stem for path in ROOT.glob("*.py")} | {"musetalk"}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "musetalk").rglob("*.py")])


def imported(path: Path) -> set[str]:
    """Names of imported modules: `torch`, `errors`, and `musetalk/faces` for parts of the package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            base = node.module or ""
            found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in found:
            names.add(name.split(".")[0])
            if name.startswith("musetalk."):
                names.add("/".join(name.split(".")[:2]))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("").as_posix()
    names = imported(path)
    in_package = relative.startswith("musetalk/")
    allowed = ALLOWED.get(relative, MODEL if in_package else None)
    assert allowed is not None, f"{path.name} is not in the table of layers"
    assert (names & OURS) - allowed == set()
    for part, forbidden in FORBIDDEN.items():
        if relative == part or relative.startswith(f"{part}/"):
            assert names & forbidden == set(), f"{relative} imports {names & forbidden}"


def test_one_module_of_the_model_reaches_the_network() -> None:
    # The hub's client serves the one file elsewhere as well, so `requests` stays out of the model altogether.
    ways_out = {"huggingface_hub", "httpx", "httpx2", "requests", "urllib3", "urllib", "http", "socket"}
    found = {path.name for path in MODEL_FILES if imported(path) & ways_out}
    assert found == {"fetching.py"}


# The probe starts a process and hands it the variables its libraries are found by, and no others.
ENVIRONMENT_READERS = {"probe.py"}
MODEL_FILES = sorted(path for path in (ROOT / "musetalk").rglob("*.py") if path.name not in ENVIRONMENT_READERS)


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_the_model_reads_no_environment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "os.environ" not in text
    assert "getenv" not in text
