"""A decoder server that crashes, hangs or eats memory in the middle of a file, in the place of the real one."""

from __future__ import annotations

import textwrap
from pathlib import Path

from musetalk.media import decoder_main

ROOT = Path(__file__).resolve().parents[2]
OWN_MAIN = decoder_main.__file__

_SCRIPT = """
import os, pathlib, runpy, signal, sys
sys.path.insert(0, {root!r})
import numpy
from musetalk.media import decoder_work, probe, reading, sound

def fault(seen=[0]):
    seen[0] += 1
    if seen[0] > {after}:
{fault}

def wrapped(decode):
    def faulty(*given, **named):
        fault()
        return decode(*given, **named)
    return faulty

for module in (probe, reading, sound):
    module.decode = wrapped(module.decode)
runpy.run_path({main!r}, run_name="__main__")
"""


def write_faulty_main(path: Path, fault: str, after: int = 0) -> Path:
    """Write a `decoder_main` that runs the statements `fault` for each packet of a task after its first `after`."""
    body = textwrap.indent(fault, " " * 8)
    path.write_text(_SCRIPT.format(root=str(ROOT), main=OWN_MAIN, after=after, fault=body), encoding="utf-8")
    return path
