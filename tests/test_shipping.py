"""What ships is what is tested: the lock pins every requirement, and the image contains what its files import."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
IMAGE_PYTHON = "3.10"


def requirements(name: str, python: str = IMAGE_PYTHON) -> list[Requirement]:
    """Requirements of a file that hold for an x86-64 Linux machine with this Python."""
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    machine = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"}
    machine |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    machine |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    every = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [one for one in every if one.marker is None or one.marker.evaluate(machine)]


def pins(name: str, python: str) -> dict[str, str]:
    """Pinned version of each package of a file; a second pin of the same package or a range is an error."""
    found: dict[str, str] = {}
    for one in requirements(name, python):
        (pin,) = one.specifier
        assert pin.operator == "=="
        assert found.setdefault(canonicalize_name(one.name), pin.version) == pin.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_and_the_torch_file_pin_every_requirement_within_its_range(python: str) -> None:
    locked = {**pins("requirements-dev.txt", python), **pins("requirements-torch.txt", python)}
    for one in [*requirements("requirements.txt", python), *requirements("requirements-dev.in", python)]:
        name = canonicalize_name(one.name)
        assert name in locked, f"{name} is not locked; run tests/renew_lock.sh"
        assert one.specifier.contains(locked[name]), f"{name} {locked[name]} is outside its range; renew the lock"


def test_torch_is_pinned_in_one_file_only() -> None:
    assert "torch" not in pins("requirements-dev.txt", IMAGE_PYTHON)
    for name in ("setup_env.sh", "Dockerfile.worker"):
        assert "torch==" not in (ROOT / name).read_text(encoding="utf-8")


# -- the image --


def copied() -> list[str]:
    """Sources of the COPY lines of the worker's stage, from the build's own folder."""
    recipe = (ROOT / "Dockerfile.worker").read_text(encoding="utf-8").split("AS with-weights")[0]
    return [source for line in re.findall(r"^COPY (.+)$", recipe, re.MULTILINE) for source in line.split()[:-1]]


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern of Docker matches a path or a folder above it; `*` stays within one folder."""
    expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return re.match(rf"{expression}(/|$)", path) is not None


def reaches_the_build(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last line that matches decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if matches(path, line.removeprefix("!")):
            kept = line.startswith("!")
    return kept


def test_every_copied_path_exists_and_reaches_the_build() -> None:
    assert copied()
    for source in copied():
        paths = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(source)]
        assert paths, f"COPY {source} matches no file"
        assert [path for path in paths if not reaches_the_build(path)] == []


def test_the_image_contains_every_module_that_the_worker_imports() -> None:
    sources = copied()
    modules = [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("worker/**/*.py")]]
    modules += [path.relative_to(ROOT).as_posix() for path in ROOT.glob("musetalk/**/*.py")]
    modules += ["worker/web/page/index.html", "demo/show.py", "run_worker.sh"]
    for path in modules:
        assert any(matches(path, source) for source in sources), path


def test_nothing_but_what_the_image_needs_reaches_the_build() -> None:
    for path in (".env", ".git/config", "tests/conftest.py", "outputs/video.mp4", "docs/local.md", "demo/build/x.mp4"):
        assert not reaches_the_build(path)
