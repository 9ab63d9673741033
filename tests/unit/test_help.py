"""--help and a mistyped option of every command: answered at once, by its own usage, and nothing starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.show import reason_in
from worker.config import ROOT

PYTHON = [sys.executable, "-X", "importtime"]
COMMANDS = {
    "app.py": [*PYTHON, "app.py"],
    "musetalk_core.py": [*PYTHON, "musetalk_core.py"],
    "run_worker.sh": ["bash", "run_worker.sh"],
    "run_worker.sh --demo": [*PYTHON, "-m", "demo.show"],
    **{
        f"python -m {name}": [*PYTHON, "-m", name]
        for name in (
            "worker.cli.start",
            "musetalk.weights",
            *("demo.make_pair", "demo.evaluate", "demo.train", "demo.vae", "demo.pictures", "demo.encoder"),
            *("docs.make_tables", "docs.make_pictures"),
            *(
                f"benchmarks.{path.stem}"
                for path in sorted((ROOT / "benchmarks").glob("*.py"))
                if "__main__" in path.read_text(encoding="utf-8")
            ),
        )
    },
}
# Each takes a noticeable part of a second, or ten.
SLOW_IMPORTS = {"torch", "cv2", "av", "numpy", "transformers", "diffusers", "gunicorn.app.base"}


def run(command: list[str], *arguments: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """The finished command, and its standard error without the list of imports."""
    environment = {
        **{name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ},
        # An interpreter that is not there: the shell script must not need one for this.
        "PATH": f"{folder}:{os.environ['PATH']}",
        "MUSETALK_PYTHON": str(folder / "no-python"),
        # Wrong settings hide no help.
        "WORKER_MODE": "bufer",
        "MUSETALK_ENV_FILE": "none",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert imported & SLOW_IMPORTS == set()
    return done, "\n".join(line for line in lines if not line.startswith("import time:"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_printed_at_once_and_nothing_starts(name: str, tmp_path: Path) -> None:
    done, errors = run(COMMANDS[name], "--help", folder=tmp_path)
    assert (done.returncode, errors) == (0, "")
    assert done.stdout.startswith(f"usage: {name.removesuffix(' --demo')}")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_option_is_answered_by_the_commands_own_usage(name: str, tmp_path: Path) -> None:
    done, errors = run(COMMANDS[name], "--hlep", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert errors.startswith(f"usage: {name.removesuffix(' --demo')}")
    assert "error: " in errors


@pytest.mark.parametrize("arguments", [["--demo", "--hlep"], ["demo"], ["--config"], ["--bind", "0.0.0.0:1"]])
def test_the_script_refuses_what_it_does_not_know(arguments: list[str], tmp_path: Path) -> None:
    done, errors = run(COMMANDS["run_worker.sh"], *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert errors.startswith("usage: run_worker.sh")


def test_the_demo_names_a_wrong_setting_and_starts_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "MUSETALK_DEVICE": "gpu", "MUSETALK_ENV_FILE": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "demo.show"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: MUSETALK_DEVICE")
    assert "log" not in done.stderr


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("error: WORKER_PORT must be a number\n", "WORKER_PORT must be a number"),
        (
            '{"severity": "error", "message": "startup failed", "reason": "no room"}\n{"severity": "info"}\n',
            "no room",
        ),
        ('{"severity": "error", "message": "Worker failed to boot"}\n', "Worker failed to boot"),
        ("[]\nhello\n", None),
    ],
)
def test_the_demo_finds_the_reason_of_a_failed_start_in_the_log(log: str, reason: str | None) -> None:
    assert reason_in(log) == reason
