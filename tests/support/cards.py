"""Pretended cards, and programs that start others."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil

from tests.support.server import ROOT, wait_until

_NVIDIA_SMI = """#!/bin/sh
case "$1" in
  -L) {listed} ;;
  --query-gpu=index,uuid) {queried} ;;
  *) exit 6 ;;
esac
"""


def pretend_cards(folder: Path, n_cards: int, *, only_list: bool = False) -> str:
    """Write an nvidia-smi that lists cards 0 to `n_cards` - 1; return a PATH with it in front."""
    folder.mkdir(parents=True)
    listed = "; ".join(f"echo 'GPU {n}: NVIDIA Pretended {n}0 (UUID: GPU-{n}a-0{n})'" for n in range(n_cards))
    queried = "; ".join(f"echo '{n}, GPU-{n}a-0{n}'" for n in range(n_cards))
    program = folder / "nvidia-smi"
    program.write_text(_NVIDIA_SMI.format(listed=listed, queried="exit 6" if only_list else queried))
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run_and_kill(code: str, *, wait_for: Path, python: str) -> int:
    """Run Python code that prints a process id, kill it once the file `wait_for` exists; return the id."""
    program = subprocess.Popen([python, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        wait_until(wait_for.exists, 30)
    finally:
        program.kill()
        program.communicate()
    return pid


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
