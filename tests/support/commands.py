"""The command line, started as a person starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from worker.config import ROOT


def run_core(models: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.run(
        [sys.executable, str(ROOT / "musetalk_core.py"), *arguments],
        env={
            **kept,
            "MUSETALK_ENV_FILE": "none",
            "MUSETALK_MODEL": "v15",
            "MUSETALK_MODELS_DIR": str(models),
            "MUSETALK_DEVICE": "cpu",
            "MUSETALK_DTYPE": "float32",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
