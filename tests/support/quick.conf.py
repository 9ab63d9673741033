"""The project's own Gunicorn configuration, with a core that loads no models and renders nothing; starts in a moment.

Files in FAULTS_DIR are commands: while `hold-load` exists the models load, while `hold-job` exists a job runs. Each
job that runs appends its id to the file `runs`; `lose-gpu` fails the next one as a lost GPU does.
"""

from __future__ import annotations

import os
import runpy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_own = runpy.run_path(str(_ROOT / "gunicorn.conf.py"))
globals().update({name: value for name, value in _own.items() if not name.startswith("__")})
_folder = Path(os.environ["FAULTS_DIR"])


def _wait(name: str, stops: Any = lambda: False) -> None:
    while (_folder / name).exists() and not stops():
        time.sleep(0.02)


def _install() -> None:
    from musetalk.errors import CancelledError, GpuLostError
    from musetalk_core import Core
    from tests.support.results import a_result

    def load(self: Core) -> None:
        _wait("hold-load")
        self.engine = SimpleNamespace(models=SimpleNamespace(version="v15"))  # type: ignore[assignment]

    def run_stages(self: Core, engine: Any, job: Any, running: Any) -> Any:
        with running.stage("inference"):
            with (_folder / "runs").open("a") as file:
                file.write(f"{job.job_id}\n")
            if (_folder / "lose-gpu").exists():
                (_folder / "lose-gpu").unlink()
                raise GpuLostError("CUDA error: the device is lost")
            _wait("hold-job", running.should_stop)
            if running.should_stop():
                raise CancelledError("stopped")
        return a_result(job=job)

    Core.load = load  # type: ignore[method-assign]
    Core._run_stages = run_stages  # type: ignore[method-assign]


def post_fork(server: Any, worker: Any) -> None:
    """The replaced core first, then the worker's own hook."""
    _install()
    _own["post_fork"](server, worker)
