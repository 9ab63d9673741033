"""The file tree in docs/architecture.md is the one of the checkout."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def documented() -> set[str]:
    """Paths named in the annotated tree."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    block = text.split("## Files")[1].split("```")[1]
    folders: list[str] = []
    paths: set[str] = set()
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        path = "/".join([*folders, name.rstrip("/")])
        paths.add(path)
        # Files named in the annotation lie in the folder itself.
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
            paths.update(f"{path}/{other}" for other in re.findall(r"\b(\w+\.py)\b", line))
        paths.update("/".join([*folders, other]) for other in re.findall(r"\((\w+\.py)\)", line))
    return paths


def test_every_path_in_the_tree_exists() -> None:
    missing = [path for path in documented() if not (ROOT / path).exists()]
    assert missing == []


def test_every_module_is_in_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    modules = [
        path
        for path in listed.stdout.split()
        if path.endswith((".py", ".sh")) and not path.startswith("tests/") and not path.endswith("__init__.py")
    ]
    assert modules
    assert [path for path in modules if path not in documented()] == []
