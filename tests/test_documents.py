"""Truth of the documents: file tree, tables, links, commands, examples, names and quoted messages match the code."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jsonschema
import pytest

from docs.make_tables import PLACES, env_example, sections, with_tables
from worker.config import LEGACY, VARIABLES
from worker.jobs import parse_job
from worker.web.openapi import failure_schema, health_schema, result_schema

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
# These name constants of formulas and of other programs, not variables of this one.
SPECIFICATIONS = {"docs/model.md", "docs/media.md", "docs/protocol.md"}
# Variables that other programs read, as docs/configuration.md lists them.
FOREIGN = {
    "OMP_WAIT_POLICY",  # of the OpenMP library in torch's wheels
    *(
        "TORCH_SPEC",
        "PYTHON",
        "MUSETALK_PYTHON",
        "HF_ENDPOINT",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ),
    *("SALAD_LOG_LEVEL", "CUDA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
    # Arguments of the image, and the variables of tests.
    *("SALAD_WORKER_SHA256", "SALAD_WORKER_VERSION", "BASE", "GOLDEN_DIR", "MEDIA_DIR", "OMP_NUM_THREADS"),
    # Keys of the platforms' own interfaces, and fields of results.
    *("SALAD_API_KEY", "VAST_API_KEY", "GENERATION_TIME_SEC", "SCRIPT_WALL_TIME_SEC", "PEAK_VRAM_MIB", "PEAK_RAM_KB"),
}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[str]:
    """Shell commands of a document, one line each, continuation lines joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()


# -- the file tree --


def documented() -> set[str]:
    """Paths named in the annotated tree of docs/architecture.md."""
    block = text_of("docs/architecture.md").split("## Files")[1].split("```")[1]
    folders: list[str] = []
    paths: set[str] = set()
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        path = "/".join([*folders, name.rstrip("/")])
        paths.add(path)
        # Files named in the annotation are in the folder itself.
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


# -- tables made from the code --


@pytest.mark.parametrize("document", PLACES)
def test_tables_are_those_of_the_code(document: str) -> None:
    assert with_tables(document, text_of(document)) == text_of(document), "run python -m docs.make_tables"


def test_env_example_is_that_of_the_code() -> None:
    assert text_of(".env.example") == env_example(), "run python -m docs.make_tables"


def test_every_variable_is_in_one_section() -> None:
    assert [variable for _, rows in sections() for variable in rows] == list(VARIABLES)


# -- links --


def links(name: str) -> Iterator[str]:
    """Targets of the links and pictures of a document that are in the repository, without their anchors."""
    prose = re.sub(r"^```.*?^```", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path = target.split("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            yield path


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_to_files(name: str) -> None:
    folder = (ROOT / name).parent
    assert [link for link in links(name) if not (folder / link).exists()] == []


def test_every_document_is_in_the_list_of_documents() -> None:
    listed = set(links("docs/README.md"))
    present = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert listed == present


def test_the_readme_is_one_page() -> None:
    text = text_of("README.md")
    assert len(text.splitlines()) <= 145
    assert len(text.encode()) <= 7_500


# -- commands --


@pytest.mark.parametrize("name", NAMES)
def test_commands_name_files_and_modules_that_exist(name: str) -> None:
    missing = []
    for line in blocks(text_of(name)):
        for module in re.findall(r"python -m ([\w.]+)", line):
            parts = module.split(".")
            is_ours = (ROOT / parts[0]).is_dir()
            if is_ours and not (ROOT / "/".join(parts)).with_suffix(".py").is_file():
                missing.append(module)
        paths = re.findall(r"(?:^|\s)(?:\.venv/bin/python |bash )?\.?/?([\w/]+\.(?:py|sh))(?=\s|$)", line)
        missing += [path for path in paths if not (ROOT / path).is_file() and not path.startswith("app/")]
    assert missing == []


def test_documents_build_the_image_with_one_command() -> None:
    command = "docker build -f Dockerfile.worker -t explaindio/musetalk-queue-worker:progress ."
    for name in ("README.md", "docs/local.md", "docs/salad.md", "docs/vast.md"):
        assert command in list(blocks(text_of(name)))
    assert command in text_of("Dockerfile.worker")


# -- examples --


@pytest.mark.parametrize(
    ("heading", "schema"),
    [("Success: 200", result_schema()), ("Errors", failure_schema()), ("Health", health_schema())],
)
def test_examples_of_bodies_are_of_the_served_schema(heading: str, schema: dict[str, object]) -> None:
    section = text_of("docs/api.md").split(f"## {heading}\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"^```json\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    jsonschema.validate(json.loads(example), schema)
    undescribed = set(json.loads(example)) - set(schema["properties"])  # type: ignore[call-overload]
    assert undescribed == set()


@pytest.mark.parametrize("name", ["README.md", "docs/api.md", "docs/local.md", "docs/salad.md", "docs/vast.md"])
def test_bodies_in_commands_are_json(name: str) -> None:
    bodies = re.findall(r"-d '(\{.*?\})'", text_of(name), re.DOTALL)
    assert bodies
    for body in bodies:
        given = json.loads(body)
        if "musetalk_job_id" in given:
            assert parse_job(given).params.ignored == ()


def test_the_example_of_the_readme_is_part_of_the_example_of_the_api() -> None:
    (short,) = re.findall(r"^```json\n(.*?)^```", text_of("README.md"), re.DOTALL | re.MULTILINE)
    section = text_of("docs/api.md").split("## Success: 200\n")[1]
    whole = json.loads(re.findall(r"^```json\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[0])

    def is_part(part: object, of: object) -> bool:
        if isinstance(part, dict) and isinstance(of, dict):
            return all(name in of and is_part(value, of[name]) for name, value in part.items())
        return part == of

    assert is_part(json.loads(short), whole)


# -- names --


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SPECIFICATIONS])
def test_variables_in_documents_exist(name: str) -> None:
    known = {name for variable in VARIABLES for name in (variable.name, *variable.aliases)} | {*LEGACY} | FOREIGN
    named = set(re.findall(r"(?:`|-e |export |\n|\s)([A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+)(?=[`= ,:])", text_of(name)))
    assert sorted(named - known) == []


def test_metrics_in_documents_exist() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in modules())
    for metric in set(re.findall(r"\bmusetalk_[a-z_]+", text_of("docs/operations.md"))) - {"musetalk_core"}:
        base = re.sub(r"_(?:total|sum|count|bucket|info)$", "", metric)
        assert f'"{base}"' in sources or f'"{metric}"' in sources, metric


# -- messages --


def modules() -> list[Path]:
    """The Python files of worker and model."""
    return [*ROOT.glob("*.py"), *(ROOT / "worker").rglob("*.py"), *(ROOT / "musetalk").rglob("*.py")]


@cache
def templates() -> tuple[str, ...]:
    """The strings of the code except docstrings, with … for each value; and the lines of the shell scripts."""
    found = []
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(re.sub(r"%(?:\.\d)?[sdrfg]", "…", node.value))
    # What the shell scripts say.
    found += [line for path in ROOT.glob("*.sh") for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(found)


def is_in_code(quoted: str) -> bool:
    """Whether a quoted message is a string of the code; … in the quotation stands for any text, or for a value."""
    pieces = [re.escape(piece.strip()) for piece in quoted.split("…") if piece.strip()]
    pattern = re.compile(".*?".join(pieces), re.DOTALL)
    return any(pattern.search(template) for template in templates())


def messages(name: str) -> list[str]:
    """Quotations of more than one word that are not JSON."""
    prose = re.sub(r"^```.*?^```", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    return [" ".join(quoted.split()) for quoted in re.findall(r'"([^"]+)"', prose) if " " in quoted]


@pytest.mark.parametrize(
    "name",
    [f"docs/{name}.md" for name in ("troubleshooting", "operations", "salad", "vast", "weights", "quality")],
)
def test_quoted_messages_are_those_of_the_code(name: str) -> None:
    assert [quoted for quoted in messages(name) if not is_in_code(quoted)] == []


def test_log_messages_in_the_table_are_those_of_the_code() -> None:
    table = text_of("docs/operations.md").split("| message | ")[1].split("\n\n")[0]
    named = [message for row in table.splitlines()[2:] for message in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(named) > 10
    assert [message for message in named if not is_in_code(message)] == []


def test_a_message_with_values_is_found() -> None:
    assert is_in_code("… MiB free, MIN_GPU_MEMORY_MB …")
    assert not is_in_code("no worker ever said this sentence")
