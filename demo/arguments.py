"""Command lines of the demo's programs, which read them before they import libraries that take seconds to load."""

from __future__ import annotations

import argparse
from pathlib import Path

STAGES = ("encoder", "pictures", "vae", "unet", "export")


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    first_line = (description or "").split("\n", 1)[0]
    return argparse.ArgumentParser(prog=f"python -m demo.{name}", description=first_line)


def none(name: str, description: str | None) -> None:
    """Answer --help of a program without arguments, and refuse any."""
    _parser(name, description).parse_args()


def vae(description: str | None) -> argparse.Namespace:
    """Arguments of demo.vae."""
    parser = _parser("vae", description)
    parser.add_argument("steps", nargs="?", type=int, default=2000)
    parser.add_argument("threads", nargs="?", type=int, default=1)
    return parser.parse_args()


def train(description: str | None) -> argparse.Namespace:
    """Arguments of demo.train; `stages` has all of them if none is named."""
    parser = _parser("train", description)
    parser.add_argument("stages", nargs="*", help=f"some of {', '.join(STAGES)}; none means all")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if unknown := [name for name in given.stages if name not in STAGES]:
        parser.error(f"no such stage: {', '.join(unknown)}")
    given.stages = given.stages or list(STAGES)
    return given


def evaluate(description: str | None) -> argparse.Namespace:
    """Arguments of demo.evaluate."""
    parser = _parser("evaluate", description)
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help="also write contact sheets")
    parser.add_argument("--human", type=Path, help="a human recording")
    parser.add_argument("--faces", type=Path, nargs="*", default=[], help="photos or videos to look at")
    parser.add_argument("--strangers", type=int, default=0, help="that many drawn people besides the avatar")
    parser.add_argument("--make-held-out", action="store_true", help="speak the held-out sentences again")
    return parser.parse_args()
