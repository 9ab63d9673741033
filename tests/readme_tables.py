"""Writes the parts of README.md and .env.example that are derived from the code: `python -m tests.readme_tables`."""

from __future__ import annotations

import re
from pathlib import Path

from worker.config import VARIABLES
from worker.jobs import PARAMS

ROOT = Path(__file__).resolve().parents[1]


def variables_table() -> str:
    """The README's rows, one per variable."""
    return "\n".join(
        f"| `{variable.name}` | {f'`{variable.default}`' if variable.default else '–'} | {variable.meaning} |"
        for variable in VARIABLES
    )


def params_table() -> str:
    """The README's rows, one per parameter of a job."""
    return "\n".join(f"| `{name}` | {param.meaning} |" for name, param in PARAMS.items())


def env_example() -> str:
    """The whole of .env.example."""
    lines = [
        "# Copy to .env and change what you need; the environment wins over this file. Every line shows the default."
    ]
    for variable in VARIABLES:
        also = f" Also read as {', '.join(variable.aliases)}." if variable.aliases else ""
        lines += ["", f"# {variable.meaning}{also}", f"#{variable.name}={variable.default}"]
    return "\n".join(lines) + "\n"


def with_tables(readme: str) -> str:
    """The README with the rows of both tables renewed."""
    for head, rows in (("variable | default | meaning", variables_table()), ("`params` | meaning", params_table())):
        pattern = rf"(\| {re.escape(head)} \|\n\|[-|]+\|\n)(?:\|.*\n)*"
        readme, n_found = re.subn(pattern, lambda found, rows=rows: found[1] + rows + "\n", readme)  # type: ignore[misc]
        assert n_found == 1, f"the README has {n_found} tables with the head {head}"
    return readme


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / ".env.example").write_text(env_example(), encoding="utf-8")
