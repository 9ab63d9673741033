"""Prints the parts of README.md and .env.example that are derived from the code: `python -m tests.readme_tables`."""

from __future__ import annotations

from config import VARIABLES


def variables_table() -> str:
    """The README's rows, one per variable."""
    return "\n".join(
        f"| `{variable.name}` | {f'`{variable.default}`' if variable.default else '–'} | {variable.meaning} |"
        for variable in VARIABLES
    )


def env_example() -> str:
    """The whole of .env.example."""
    lines = [
        "# Copy to .env and change what you need; the environment wins over this file. Every line shows the default."
    ]
    for variable in VARIABLES:
        also = f" Also read as {', '.join(variable.aliases)}." if variable.aliases else ""
        lines += ["", f"# {variable.meaning}{also}", f"#{variable.name}={variable.default}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(variables_table())
    print()
    print(env_example())
