"""Order among the tests themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.browser import missing_programs

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_a_test_module(path: Path) -> None:
    """A helper that two tests need is in tests/support, where both find it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert [name for name in names if name.rpartition(".")[2].startswith("test_")] == []


def test_a_skipped_browser_test_names_the_missing_program() -> None:
    assert missing_programs("/usr/bin/chromium", "/usr/bin/chromedriver") is None
    assert missing_programs(None, "/usr/bin/chromedriver") == ("chromium not found (Debian: apt-get install chromium)")
    assert missing_programs("/usr/bin/chromium", None) == (
        "chromedriver not found (Debian: apt-get install chromium-driver)"
    )
    assert "chromium and chromedriver" in str(missing_programs(None, None))
