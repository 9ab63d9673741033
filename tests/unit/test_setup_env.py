"""What setup_env.sh installs, and when; the interpreters are scripts that write down what they are asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# `-c` prints the version, `-m venv DIR` copies the script into DIR, anything else is a call of pip.
INTERPRETER = """#!/usr/bin/env bash
case "$1 $2" in
  "-c import sys; sys.exit"*) ;;
  "-c "*) echo VERSION ;;
  "--version "*) echo Python VERSION ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; echo "venv VERSION" >>LOG ;;
  *) echo "${*:6}" >>LOG ;;
esac
"""


class Machine:
    """A folder with setup_env.sh, the requirements, and interpreters in `bin/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for path in [ROOT / "setup_env.sh", *ROOT.glob("requirements*.txt")]:
            shutil.copy(path, folder)
        (folder / "bin").mkdir()
        self.log = folder / "log"

    def add_python(self, name: str, version: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(INTERPRETER.replace("VERSION", version).replace("LOG", str(self.log)))
        path.chmod(0o755)

    def set_up(self, kind: str, variables: Mapping[str, str] | None = None) -> list[str]:
        """Run the script; return what it made and installed, in order."""
        self.log.write_text("")
        environment = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **(variables or {})}
        subprocess.run(["bash", self.folder / "setup_env.sh", kind], env=environment, check=True, capture_output=True)
        return self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.add_python("python3", "3.11")
    return made


def test_development_installs_the_torch_file_and_the_lock(machine: Machine) -> None:
    assert machine.set_up("dev") == [
        "venv 3.11",
        "-r requirements-torch.txt",
        "-r requirements-dev.txt",
        "--no-deps -r requirements-nodeps.txt",
    ]


def test_a_worker_installs_its_ranges_within_the_lock(machine: Machine) -> None:
    assert "-r requirements.txt -c requirements-dev.txt" in machine.set_up("runtime")
    assert machine.set_up("runtime") == []


def test_an_installed_development_environment_is_enough_for_a_worker(machine: Machine) -> None:
    machine.set_up("dev")
    assert machine.set_up("runtime") == []


def test_torch_spec_replaces_the_torch_file_and_may_contain_options(machine: Machine) -> None:
    machine.set_up("runtime")
    spec = {"TORCH_SPEC": "torch==2.9.1 --index-url https://packages.example/simple"}
    assert machine.set_up("runtime", spec)[0] == spec["TORCH_SPEC"]
    assert machine.set_up("runtime", spec) == []


def test_changed_requirements_are_installed_into_the_same_environment(machine: Machine) -> None:
    machine.set_up("runtime")
    with (machine.folder / "requirements-torch.txt").open("a") as file:
        file.write("# newer\n")
    assert machine.set_up("runtime")[0] == "-r requirements-torch.txt"


def test_python_names_the_interpreter_even_if_an_environment_exists(machine: Machine) -> None:
    machine.set_up("runtime")
    machine.add_python("python3.10", "3.10")
    assert machine.set_up("runtime", {"PYTHON": "python3.10"})[0] == "venv 3.10"
    assert machine.set_up("runtime", {"PYTHON": "python3.10"}) == []
    # Without PYTHON the environment stays as it is.
    assert machine.set_up("runtime") == []
