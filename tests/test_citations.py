"""Every place in a document that code or documents name exists, and nothing names a document outside the repository."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".sh", ".md", ".js", ".html", ".css", ".toml", ".worker"}
# This file holds examples of what it refuses.
EXEMPT = {"tests/test_citations.py"}

CITATION = re.compile(r"\bdocs/(?P<document>[\w./-]+\.md)#(?P<anchor>[\w-]*)")
# A link of a document to a heading: [text](other.md#anchor), or [text](#anchor) on the same page.
LINK = re.compile(r"\]\((?P<document>[\w./-]*)#(?P<anchor>[\w%-]*)\)")
# Whitespace between two words, also at the end of a line of comment.
_GAP = r"(?:\s+(?:(?:#|//|\*)\s*)?)"
_PLACE = r"\(?(?:sections?\b|\w+\.md\b|§|\d+\.\d)"
SPECIFICATION = re.compile(rf"\bspec(?:ification)?(?:'s)?{_GAP}{_PLACE}", re.IGNORECASE)
PROTOCOL = re.compile(rf"\bprotocol(?:'s)?{_GAP}{_PLACE}", re.IGNORECASE)
_FENCE = re.compile(r"^ {0,3}(```|~~~)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*\s*$")


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    fence = ""
    for line in markdown.splitlines():
        if mark := _FENCE.match(line):
            # Only its own kind of mark ends a block of code.
            fence = "" if fence == mark[1] else fence or mark[1]
        elif not fence and (heading := _HEADING.match(line)):
            shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
    return found


def cited(name: str, text: str) -> Iterator[tuple[str, str]]:
    """(document relative to the repository, anchor) of each citation and link in the text of the file `name`."""
    for citation in CITATION.finditer(text):
        yield f"docs/{citation['document']}", citation["anchor"]
    if name.endswith(".md"):
        for link in LINK.finditer(text):
            target = (ROOT / name).parent / link["document"] if link["document"] else ROOT / name
            yield target.resolve().relative_to(ROOT).as_posix(), link["anchor"]


def phrases(pattern: re.Pattern[str], text: str) -> list[str]:
    """What a pattern finds in a text, each on one line."""
    return [" ".join(match[0].split()) for match in pattern.finditer(text)]


@cache
def anchors_of(document: str) -> set[str] | None:
    """The anchors of a document of the repository; None when there is no such file."""
    path = ROOT / document
    return anchors(path.read_text(encoding="utf-8")) if path.is_file() else None


@cache
def texts() -> dict[str, str]:
    """Text by name of every tracked file that may cite, and of new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return {
        name: path.read_text(encoding="utf-8")
        for name in listed.stdout.splitlines()
        if (path := ROOT / name).suffix in SUFFIXES and name not in EXEMPT and path.is_file()
    }


def problem(document: str, anchor: str) -> str | None:
    """Why a citation leads nowhere; None when it is right."""
    headings = anchors_of(document)
    if headings is None:
        return f"{document} does not exist"
    return None if anchor in headings else f"{document} has no heading #{anchor}"


def test_every_cited_heading_exists() -> None:
    wrong = [
        f"{name}: {reason}"
        for name, text in texts().items()
        for document, anchor in cited(name, text)
        if (reason := problem(document, anchor)) is not None
    ]
    assert wrong == []


def test_the_model_and_the_media_are_cited() -> None:
    documents = {document for name, text in texts().items() for document, _ in cited(name, text)}
    assert {"docs/model.md", "docs/media.md"} <= documents


def test_no_file_cites_a_specification_outside_the_repository() -> None:
    assert [f"{name}: {found}" for name, text in texts().items() for found in phrases(SPECIFICATION, text)] == []


def test_no_file_cites_the_protocol_by_section() -> None:
    assert [f"{name}: {found}" for name, text in texts().items() for found in phrases(PROTOCOL, text)] == []


def test_anchors_are_those_of_github() -> None:
    page = "# One\n## Pose input\n### Landmarks (RTMPose)\n## `face_box`: which?\n## One\n## One\n## [A b](c.md)\n"
    assert anchors(page) == {
        *("one", "pose-input", "landmarks-rtmpose", "face_box-which"),
        *("one-1", "one-2", "a-b"),
    }


def test_a_heading_in_a_block_of_code_has_no_anchor() -> None:
    assert anchors("```\n# one\n~~~\n# two\n```\n## three\n") == {"three"}


def test_citations_of_every_form_are_found() -> None:
    assert list(cited("a.py", '"""Rows (docs/model.md#feature-rows; docs/protocol.md#faults)."""')) == [
        ("docs/model.md", "feature-rows"),
        ("docs/protocol.md", "faults"),
    ]
    assert list(cited("docs/a.md", "[x](model.md#masks), [y](#here), [z](../README.md#try-it)")) == [
        ("docs/model.md", "masks"),
        ("docs/a.md", "here"),
        ("README.md", "try-it"),
    ]


def test_a_citation_that_leads_nowhere_is_a_problem() -> None:
    assert problem("docs/model.md", "masks") is None
    assert problem("docs/model.md", "") == "docs/model.md has no heading #"
    assert problem("docs/model.md", "no-such-heading") == "docs/model.md has no heading #no-such-heading"
    assert problem("docs/no_such_document.md", "masks") == "docs/no_such_document.md does not exist"


@pytest.mark.parametrize(
    "text",
    [
        "as trained (spec section 6)",
        "Spec sections 5 and 6",
        "# a long line (spec\n# section 2, step 4)",
        "protocol section 7",
        "the protocol (section 11)",
        "spec media.md 3.1",
        "(spec 5.2)",
    ],
)
def test_a_document_elsewhere_is_noticed(text: str) -> None:
    assert phrases(SPECIFICATION, text) + phrases(PROTOCOL, text)


@pytest.mark.parametrize(
    "text", ["BT.601-7 section 2.5.1", "Vaswani et al. 2017, section 3.5", "importlib.util.find_spec(name)", "a spec"]
)
def test_literature_may_be_cited(text: str) -> None:
    assert phrases(SPECIFICATION, text) + phrases(PROTOCOL, text) == []
