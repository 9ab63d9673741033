"""Write what documents take from the code: the tables of settings and parameters, and `.env.example`.

.venv/bin/python -m docs.make_tables
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from worker.config import VARIABLES, Variable
from worker.jobs import PARAMS

ROOT = Path(__file__).resolve().parents[1]

# First variable of a section -> its heading. A new variable belongs to the section it is declared in.
SECTIONS = {
    "WORKER_HOST": "HTTP server",
    "MUSETALK_MODEL": "Model",
    "OUTPUT_GEOMETRY": "Media",
    "JOB_TIMEOUT_SEC": "Limits of a job",
    "ALLOW_FILE_URLS": "Downloads and storage",
    "WORKER_MODE": "Arrival of jobs",
    "WORKER_ID": "Identity and logs",
}
# The settings that people change, in the README's order.
USUAL = (
    *("MUSETALK_MODEL", "MUSETALK_MODELS_DIR", "BATCH_SIZE", "WORKER_PORT", "INTERNAL_API_KEY", "PUBLIC_BASE_URL"),
    *("WORKER_MODE", "ORCHESTRATOR_BASE_URL", "B2_KEY_ID", "B2_APP_KEY", "B2_BUCKET_NAME"),
    *("GRACEFUL_TIMEOUT_SEC", "OUTPUT_GEOMETRY"),
)
_HEAD = "| variable | default | meaning |\n|---|---|---|"


def sections() -> Iterator[tuple[str, list[Variable]]]:
    """Headings and the variables below them, in the order of declaration."""
    rows: list[Variable] = []
    heading = ""
    for variable in VARIABLES:
        if variable.name in SECTIONS:
            if rows:
                yield heading, rows
            heading, rows = SECTIONS[variable.name], []
        rows.append(variable)
    yield heading, rows


def variables_table(variables: Sequence[Variable]) -> str:
    """A Markdown table with a row for each variable."""
    rows = [
        f"| `{variable.name}` | {f'`{variable.default}`' if variable.default else '–'} | {_meaning(variable)} |"
        for variable in variables
    ]
    return "\n".join([_HEAD, *rows])


def all_variables() -> str:
    """Every variable, a heading and a table for each section."""
    return "\n\n".join(f"## {heading}\n\n{variables_table(rows)}" for heading, rows in sections())


def usual_variables() -> str:
    """The table of the settings that people change."""
    by_name = {variable.name: variable for variable in VARIABLES}
    return variables_table([by_name[name] for name in USUAL])


def params_table() -> str:
    """A Markdown table with a row for each parameter of a job."""
    rows = [f"| `{name}` | {_limits(param.schema)} | {param.meaning} |" for name, param in PARAMS.items()]
    return "\n".join(["| `params` | value | meaning |", "|---|---|---|", *rows])


def env_example() -> str:
    """The whole of `.env.example`."""
    lines = [
        "# Copy to .env and change what you need; the environment wins over this file. Every line shows the default.",
        "# Written by python -m docs.make_tables.",
    ]
    for heading, variables in sections():
        lines += ["", f"# --- {heading} ---"]
        for variable in variables:
            lines += ["", f"# {_meaning(variable)}", f"#{variable.name}={variable.default}"]
    return "\n".join(lines) + "\n"


def _meaning(variable: Variable) -> str:
    also = f" Also read as {', '.join(f'`{name}`' for name in variable.aliases)}." if variable.aliases else ""
    return variable.meaning + also


def _limits(schema: dict[str, object]) -> str:
    """The accepted values of a parameter, from its JSON schema."""
    choices = schema.get("enum")
    if isinstance(choices, list):
        return ", ".join(f"`{choice}`" for choice in choices if choice is not None)
    kinds = schema["type"]
    assert isinstance(kinds, list)
    if "array" in kinds:
        return f"{schema['minItems']} whole numbers"
    if "pattern" in schema:
        return "`#rrggbb`"
    kind = "whole number" if "integer" in kinds else "number"
    return f"{kind}, {schema['minimum']} to {schema['maximum']}"


# Document -> name of a marked place in it -> what stands there.
PLACES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"usual settings": usual_variables},
    "docs/configuration.md": {"all settings": all_variables},
    "docs/api.md": {"parameters": params_table},
}


def with_tables(document: str, text: str) -> str:
    """Return the text of `document` with all marked places renewed; raises ValueError if a mark is missing."""
    for place, write in PLACES[document].items():
        pattern = rf"(<!-- {place}: made by python -m docs\.make_tables -->\n)(?:.*?\n)?(<!-- end -->\n)"
        found = re.search(pattern, text, re.DOTALL)
        if found is None:
            raise ValueError(f"{document} has no place marked {place!r}")
        text = f"{text[: found.start()]}{found[1]}\n{write()}\n\n{found[2]}{text[found.end() :]}"
    return text


def main() -> None:
    """Renew every place and `.env.example`."""
    argparse.ArgumentParser(
        prog="python -m docs.make_tables", description=(__doc__ or "").split("\n", 1)[0]
    ).parse_args()
    for document in PLACES:
        path = ROOT / document
        path.write_text(with_tables(document, path.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / ".env.example").write_text(env_example(), encoding="utf-8")


if __name__ == "__main__":
    main()
