"""Imports go down only: the table of layers, read from the syntax tree. No cycle, lazy imports counted."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Module -> the modules of ours it may import, at the top or inside a function. A package stands for all it holds.
MODEL = {"musetalk"}
# What anybody may use: the tree of errors, and files that appear whole or not at all.
BASE = {"musetalk/errors", "musetalk/files"}

ALLOWED: dict[str, set[str]] = {
    "worker/config": {*BASE},
    "worker/jobs": {*BASE, "musetalk/options"},
    "worker/job_control": {*BASE, "worker/config", "worker/jobs", "worker/telemetry"},
    "worker/readiness": {"worker/telemetry"},
    "worker/inputs": {
        *BASE,
        *(f"worker/{name}" for name in ("config", "jobs", "net/downloads", "net/input_part", "own_files")),
    },
    "worker/own_files": {*BASE, "worker/config", "worker/work_dir"},
    "worker/machine": {*BASE},
    "worker/clock": set(),
    "worker/records": {*BASE, "worker/machine"},
    "worker/outbox": {"worker/clock", "worker/outcomes", "worker/records", "worker/telemetry"},
    "worker/outcomes": {"worker/records"},
    "worker/progress_sender": {"worker/jobs", "worker/orchestrator", "worker/telemetry"},
    "worker/supervision": {"worker/clock", "worker/telemetry"},
    "worker/work_dir": {"worker/records"},
    "worker/telemetry": {*BASE, "worker/jobs"},
    "worker/stored": {*BASE},
    "worker/backblaze": {*BASE, "worker/stored", "worker/net/connections"},
    "worker/engine": {*MODEL, "worker/config", "worker/jobs", "worker/machine", "worker/telemetry"},
    "worker/orchestrator": {
        *BASE,
        *(f"worker/{name}" for name in ("config", "jobs", "records", "telemetry", "net/connections")),
    },
    "worker/receiving": set(),
    "worker/server": {"worker/receiving"},
    "worker/lifecycle": {"worker/job_control", "worker/readiness", "worker/telemetry"},
    "worker/net/addresses": {*BASE},
    "worker/net/connections": {"worker/net/addresses"},
    "worker/net/downloads": {
        *BASE,
        "musetalk/foreign_files",
        *(f"worker/net/{name}" for name in ("addresses", "connections", "headers", "input_part", "local_files")),
    },
    "worker/net/headers": set(),
    "worker/net/input_part": {*BASE, "worker/net/addresses"},
    "worker/net/local_files": {*BASE},
    "worker/web/openapi": {"worker/jobs"},
    "worker/web/openapi_orchestrator": {"worker/jobs", "worker/web/openapi"},
    "worker/web/reference": {
        *("musetalk/errors", "musetalk/__version__"),
        *("worker/web/openapi", "worker/web/openapi_orchestrator"),
    },
    "worker/web/bodies": set(),
    "worker/web/callers": {"worker/config"},
    "worker/web/holding": set(),
    "worker/web/history": {*BASE, "musetalk/media"},
    "worker/web/page_routes": {
        *BASE,
        *(f"worker/{name}" for name in ("jobs", "own_files", "web/history", "web/openapi", "web/playground")),
    },
    "worker/web/previews": {*BASE, "musetalk/render", "worker/jobs", "worker/web/openapi"},
    "worker/web/playground": {*BASE, "worker/config", "worker/jobs", "worker/work_dir", "worker/web/bodies"},
    "worker/cli/weights": {*MODEL, "worker/config"},
    "worker/process_variables": set(),
    "worker/cli/start": {
        *BASE,
        *(f"worker/{name}" for name in ("config", "process_variables", "cli/cards", "cli/fleet")),
    },
    "worker/cli/cards": {*BASE, "musetalk/cores", "worker/config", "worker/process_variables"},
    "worker/cli/fleet": {"worker/config", "worker/process_variables"},
    "worker/cli/summary": {*BASE, "worker/config", "worker/jobs", "worker/web/callers"},
    "worker/cli/summary_conf": {"worker/config", "worker/telemetry"},
    # Runs alone while the image is built.
    "worker/cli/salad_binary": set(),
    "worker/cli/tasks": {*BASE, "musetalk/output_geometry", "worker/jobs"},
    "worker/cli/reports": {
        *MODEL,
        *(f"worker/{name}" for name in ("engine", "jobs", "cli/tasks", "cli/weights")),
    },
    "worker/cli/render": {
        *MODEL,
        *(f"worker/{name}" for name in ("config", "engine", "jobs", "telemetry", "cli/reports", "cli/tasks")),
    },
    "storage": {*BASE, "worker/config", "worker/stored", "worker/backblaze"},
    "musetalk_core": {
        *BASE,
        *("musetalk/fetch_progress", "musetalk/render"),
        *(f"worker/{name}" for name in ("config", "engine", "inputs", "job_control", "jobs", "machine", "stored")),
        *(
            "worker/process_variables",
            "worker/readiness",
            "worker/supervision",
            "worker/telemetry",
            "worker/work_dir",
            "worker/cli/render",
        ),
        "storage",
    },
    "poller": {
        *BASE,
        "musetalk_core",
        *(f"worker/{name}" for name in ("clock", "jobs", "orchestrator", "outbox", "outcomes", "readiness")),
        *(f"worker/{name}" for name in ("progress_sender", "records", "supervision", "telemetry", "work_dir")),
    },
    "app": {
        *("musetalk/errors", "musetalk/__version__", "musetalk_core"),
        *(f"worker/{name}" for name in ("config", "jobs", "orchestrator", "process_variables", "progress_sender")),
        *("worker/telemetry", "worker/web"),
    },
    "gunicorn.conf": {
        *BASE,
        *(f"worker/{name}" for name in ("config", "lifecycle", "process_variables", "progress_sender", "telemetry")),
        *("musetalk_core", "poller"),
    },
}
# What a part must never import, also not from outside.
NO_PIXELS = {"torch", "cv2", "av", "numpy"}
FORBIDDEN: dict[str, set[str]] = {
    "app": {*NO_PIXELS, "b2sdk"},
    "poller": {*NO_PIXELS, "flask", "b2sdk", "requests"},
    "musetalk_core": {*NO_PIXELS, "flask"},
    "storage": {*NO_PIXELS, "flask", "b2sdk"},
    "worker": {*NO_PIXELS},
    "worker/config": {"flask"},
    "worker/jobs": {"flask", "requests"},
    "worker/orchestrator": {"flask"},
    "worker/engine": {"flask"},
    "worker/server": {"flask"},
    "worker/receiving": {"flask"},
    "worker/web/bodies": {"flask"},
    "worker/web": {"b2sdk"},
    "musetalk": {"flask", "requests", "b2sdk", "gunicorn", "dotenv"},
    "musetalk/media": {"torch"},
    "musetalk/blending": {"torch"},
    "musetalk/frame_store": {"torch"},
    "musetalk/geometry": {"numpy", "torch"},
    "musetalk/silence": {"torch", "av", "cv2"},
    "musetalk/output_geometry": {"numpy", "torch"},
    "musetalk/networks": {"os", "pathlib", "musetalk/errors"},
    "musetalk/weights": {"musetalk/networks"},
    "musetalk/faces": {"musetalk/blending", "musetalk/media"},
    "musetalk/audio": {"av", "musetalk/media"},
}
AT_ROOT = {"app", "musetalk_core", "poller", "storage", "gunicorn.conf"}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "worker").rglob("*.py"), *(ROOT / "musetalk").rglob("*.py")])


def name_of(path: Path) -> str:
    """`musetalk/media` for the package's own file, `musetalk/media/probe` for a module in it."""
    relative = path.relative_to(ROOT).with_suffix("")
    return (relative.parent if relative.name == "__init__" else relative).as_posix()


OURS = {name_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Imported modules of a file, lazy ones included: `torch`, `worker/net/downloads`, `musetalk/__version__`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(_known(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            base = node.module or ""
            names.update(_known(f"{base}.{alias.name}") for alias in node.names)
    return names


def _known(dotted: str) -> str:
    """One of our modules, a name of our package, or the top-level name of somebody else's package."""
    parts = dotted.split(".")
    if parts[0] not in {"musetalk", "worker"} and parts[0] not in OURS:
        return parts[0]
    for length in range(len(parts), 0, -1):
        if "/".join(parts[:length]) in OURS:
            is_name_of_package = OURS["/".join(parts[:length])].name == "__init__.py" and length < len(parts)
            return "/".join(parts[: length + 1] if is_name_of_package else parts[:length])
    raise AssertionError(f"{dotted} is not in the project")


def covers(part: str, name: str) -> bool:
    return name == part or name.startswith(f"{part}/")


def test_the_root_holds_the_five_modules_alone() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == AT_ROOT


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    name = name_of(path)
    names = imported(path)
    if path.name == "__init__.py" and covers("worker", name):
        assert names == set(), "the packages of the worker only group modules"
        return
    allowed = ALLOWED.get(name, MODEL if covers("musetalk", name) else None)
    assert allowed is not None, f"{name} is not in the table of layers"
    ours = {other for other in names if other.split("/")[0] in {"worker", "musetalk"} or other in AT_ROOT}
    assert {other for other in ours if not any(covers(part, other) for part in allowed)} == set()
    for part, forbidden in FORBIDDEN.items():
        if covers(part, name):
            found = {other for other in names if any(covers(banned, other) for banned in forbidden)}
            assert found == set(), f"{name} imports {found}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: {_owner(other) for other in imported(path)} & OURS.keys() - {name} for name, path in OURS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")


def _owner(name: str) -> str:
    """The module that a name of ours is in."""
    return name if name in OURS else name.rpartition("/")[0]


def test_every_row_of_the_tables_names_a_module() -> None:
    parts = {*ALLOWED, *FORBIDDEN}
    assert {part for part in parts if not any(covers(part, name) for name in OURS)} == set()


def test_only_the_fetching_of_weights_reaches_the_network() -> None:
    # The hub's client serves the one file elsewhere as well, so `requests` stays out of the model altogether.
    ways_out = {"huggingface_hub", "httpx", "httpx2", "requests", "urllib3", "urllib", "http", "socket"}
    found = {path.name for path in MODEL_FILES if imported(path) & ways_out}
    # The processes that decode talk through sockets without an address.
    assert found == {"fetching.py", "remote_files.py", "decoder_main.py", "decoder_work.py"}


# The decoder server is given the variables its libraries are found by, and no others.
ENVIRONMENT_READERS = {"decoder.py"}
MODEL_FILES = sorted(path for path in (ROOT / "musetalk").rglob("*.py") if path.name not in ENVIRONMENT_READERS)


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_the_model_reads_no_environment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "os.environ" not in text
    assert "getenv" not in text
