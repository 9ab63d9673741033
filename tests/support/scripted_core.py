"""A real core whose readiness and work are replaced."""

from __future__ import annotations

from pathlib import Path

from musetalk_core import Core
from tests.support.results import a_result
from worker.config import load_settings
from worker.job_control import OnProgress
from worker.jobs import Job, JobResult, Stage
from worker.readiness import Readiness


def _ignore(_stage: Stage, _done: int, _total: int) -> None:
    pass


class ScriptedCore(Core):
    """Reports `state`, records `jobs`, and returns or raises `outcome`."""

    def __init__(self, folder: Path, **environment: str) -> None:
        folders = {
            "OUTPUT_DIR": str(folder / "outputs"),
            "WORK_DIR": str(folder / "work"),
            "AVATAR_DIR": str(folder / "avatars"),
        }
        super().__init__(load_settings({**folders, "GPU_CLASS": "RTX", **environment}, None))
        self.state = Readiness("ready", "v15")
        self.jobs: list[Job] = []
        self.outcome: BaseException | JobResult = a_result()

    @property
    def readiness(self) -> Readiness:
        return self.state

    def run_job(self, job: Job, *, on_progress: OnProgress = _ignore) -> JobResult:
        self.jobs.append(job)
        on_progress("download", 0, 1)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome
