"""Word lint: `python -m tests.language` prints each phrase that a reader has to read twice, and ends with 1 if any.

Only the unmistakable phrases are refused here; the rest of plain English is a reader's work. Identifiers count as well:
`_told` is a word. No comment switches the lint off for a line.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Phrase -> what to write instead. Whitespace in a phrase matches line ends and comment marks too.
REFUSED: dict[str, str] = {
    r"told|tells?|telling": "reported, sent, logged, passed, says",
    r"anew": "again",
    r"(?:go|goes|gone|going) on with": "resumed, continued",
    r"to and fro": "back and forth",
    r"blot(?:s|ted)? out": "redacted",
    r"wants? no more|wanted no more": "cancelled",
    r"at (?:each|every) look": "on every check, on every scrape",
    r"far sides?": "peer, server, orchestrator",
    r"(?:brings?|brought) (?:\w+ ){1,3}down": "crashes",
}
# The phrases themselves, examples of them, and a list of words that the demo voice says.
EXEMPT = {"tests/language.py", "tests/test_language.py", "demo/speech.py"}
SUFFIXES = {".py", ".sh", ".md", ".html", ".js", ".css", ".toml", ".txt", ".in", ".example", ".worker", ".yml", ".yaml"}
_GAP = r"(?:_|[ \t]+|[ \t]*\n[ \t]*(?:#+|//|\*|>)?[ \t]*)"
_PATTERNS = [
    (re.compile(rf"(?<![A-Za-z])(?:{phrase.replace(' ', _GAP)})(?![A-Za-z])", re.IGNORECASE), instead)
    for phrase, instead in REFUSED.items()
]


def findings(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, phrase found, and what to write instead, in the order of the table."""
    for pattern, instead in _PATTERNS:
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead


def texts() -> Iterator[Path]:
    """Every tracked text file of the project, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        has_text = path.suffix in SUFFIXES or name == ".ci/run"
        if has_text and name not in EXEMPT and path.is_file() and not path.is_symlink():
            yield path


def main() -> int:
    """Print all findings; return 1 if there is one."""
    argparse.ArgumentParser(prog="python -m tests.language", description=(__doc__ or "").split("\n", 1)[0]).parse_args()
    n_found = 0
    for path in texts():
        for line, phrase, instead in findings(path.read_text(encoding="utf-8")):
            print(f"{path.relative_to(ROOT)}:{line}: {phrase!r}: write {instead}")
            n_found += 1
    return 1 if n_found else 0


if __name__ == "__main__":
    sys.exit(main())
