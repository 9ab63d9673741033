"""The core: keeps the engine loaded, owns the right to use the GPU, and runs a job's stages in order.

Both front doors (HTTP and the poller) call `Core.run_job`; people call `python musetalk_core.py SOURCE AUDIO OUTPUT`,
which is `worker.cli.render.main`. Knows no JSON keys, no tensor operation, no picture.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from musetalk.errors import GpuLostError, MuseTalkError, UnavailableError
from storage import open_store
from worker.config import Settings, load_settings
from worker.engine import Engine, EngineLoader, Rendered, video_stats
from worker.inputs import JobFiles, fetch_inputs
from worker.job_control import (
    JobControl,
    JobProgress,
    OnProgress,
    ResultCache,
    RunningJob,
    RunningNow,
    StopReason,
)
from worker.jobs import Job, JobParams, JobResult, RenderedJob, Stage, sidecar_body
from worker.machine import check_room, exempt_loaded, folder_problem, release_memory
from worker.readiness import Readiness, State, WorkerStatus
from worker.stored import Store
from worker.supervision import Supervisor
from worker.telemetry import (
    Metrics,
    configure_logging,
    job_logging,
    log_job_end,
    logger,
    peak_memory_kb,
    redact_values,
)
from worker.work_dir import WorkDir

if TYPE_CHECKING:
    from musetalk.fetch_progress import Watcher
    from musetalk.render import Preview, RenderSession, RenderSummary

_BUSY = "the worker is busy with another job"


def _ignore_progress(_stage: Stage, _done: int, _total: int) -> None:
    """Drop a progress report."""


class Core:
    """The models of one process and its one slot."""

    def __init__(self, settings: Settings, *, store: Store | None = None, fetch_watcher: Watcher | None = None) -> None:
        """Load nothing yet: `load` does, or `start_loading` in a thread of its own.

        `fetch_watcher` follows a download of weights; without one the log does.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.status = WorkerStatus()
        self.supervisor = Supervisor(self.status, self.metrics.count_restart, is_busy=lambda: self.is_busy)
        self.work_dir = WorkDir(settings.work_dir)
        self._store = store or open_store(settings)
        # One job at a time: two would share the GPU's memory and both would be slower.
        self._slot = threading.Lock()
        self._engine: Engine | None = None
        self._loader = EngineLoader(settings, self.metrics, watcher=fetch_watcher)
        self._running: RunningJob | None = None
        self._results = ResultCache()
        self.metrics.register_gauge(
            "musetalk_model_ready", "1 while jobs can be taken or run.", lambda: self.readiness.is_healthy
        )
        self.metrics.register_gauge("musetalk_jobs_in_progress", "Jobs that run right now.", lambda: self.is_busy)

    # -- loading and readiness ----------------------------------------------------------------------------------------

    def load(self) -> None:
        """Check the machine, load the models, run them once, choose the encoder.

        Raises WeightsError for files, ProcessingError for an unfit machine; the core then stays not ready.
        """
        try:
            self.engine = self._loader.load()
        except MuseTalkError as error:
            self.status.fail(str(error))
            raise
        # Loading copies the weights through the CPU, and in the file's precision before ours.
        release_memory()

    def start_loading(self) -> threading.Thread:
        """Call `load` in a thread, so that the server can answer "starting" meanwhile; a failure is logged and kept.

        After an unforeseen error the loading begins again.
        """

        def run() -> None:
            while True:
                try:
                    self._prepare()
                    return
                except MuseTalkError as error:
                    self.status.fail(str(error))
                    logger.error("startup failed", extra={"reason": str(error)})
                    return
                except Exception as error:  # noqa: BLE001 - the thread has no caller; the supervisor counts
                    time.sleep(self.supervisor.restart_pause_s("model-loader", error))

        thread = threading.Thread(target=run, name="model-loader", daemon=True)
        thread.start()
        return thread

    def _prepare(self) -> None:
        """Make the worker ready: its folder, its store, its models."""
        self.work_dir.take(lambda: folder_problem(self.settings.work_dir, "WORK_DIR", self.settings.min_free_disk_mb))
        # Before gigabytes are fetched for a worker that could store nothing.
        self._store.check()
        self.load()  # ends with a collection
        exempt_loaded()

    @property
    def engine(self) -> Engine:
        """The loaded engine; raises UnavailableError before. Setting it runs later jobs on another one."""
        if self._engine is None:
            raise UnavailableError(self._loader.state, state="starting")
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def readiness(self) -> Readiness:
        """A snapshot that takes no lock a job holds."""
        running, engine = self._running, self._engine
        if running is not None and running.control.is_stuck:
            self.status.mark_lost("the running job hangs and cannot be stopped")
        return self.status.snapshot(
            model=engine.models.version if engine else None,
            loading=self.work_dir.waiting_for or self._loader.state,
            is_busy=self.is_busy,
        )

    @property
    def is_busy(self) -> bool:
        """Whether a job runs right now."""
        return self._slot.locked()

    def check_free(self) -> None:
        """Raise UnavailableError when no job could start right now; reserves nothing."""
        readiness = self.readiness
        if readiness.state != "ready":
            reason = _BUSY if readiness.state == "busy" else readiness.reason
            raise self._rejection(reason or "the worker is not ready", readiness.state)

    # -- the running job ----------------------------------------------------------------------------------------------

    def stop_running(self, reason: StopReason) -> bool:
        """Stop the running job at its next chunk; return whether there was one."""
        running = self._running
        if running is not None:
            running.control.stop(reason)
        return running is not None

    def cancel(self, job_id: str) -> bool:
        """Stop the running job if `job_id` is one of its ids; return whether it is."""
        running = self._running
        if running is None or not running.control.has_id(job_id):
            return False
        logger.info("running job cancelled", extra={"cancelled": job_id})
        running.control.stop("cancelled")
        return True

    def progress_of(self, job_id: str) -> JobProgress | None:
        """Progress of the running job, if `job_id` is one of its ids."""
        running = self._running
        return running.progress if running is not None and running.control.has_id(job_id) else None

    def running_now(self) -> RunningNow | None:
        """The running job as a person sees it; None without one, and while a preview is made."""
        running = self._running
        if running is None or running.name is None:
            return None
        return RunningNow(running.name, running.progress, running.clock.total_s)

    # -- work ---------------------------------------------------------------------------------------------------------

    def run_job(self, job: Job, *, on_progress: OnProgress = _ignore_progress) -> JobResult:
        """Run a whole job: fetch, render, store. Its local files are gone afterwards.

        A queue that lost our answer sends the same job again and gets the kept result.
        Raises UnavailableError at once when the slot is taken, otherwise as `render`, DownloadError and StorageError;
        every error carries its stage and the stage times so far.
        """
        with self._holding_slot() as engine, job_logging(job.job_id):
            # Inside the slot: the first run of the same job may still be under way.
            if (kept := self._results.get(job)) is not None:
                logger.info("job repeated; kept result returned")
                return kept
            running = RunningJob(JobControl.for_job(job, self.settings), on_progress, name=job.job_id)
            try:
                with self._tracking(running):
                    result = self._run_stages(engine, job, running)
            # BaseException: a job that ends with the process is counted as well.
            except BaseException as error:
                self.metrics.count_job(running.clock, error)
                log_job_end(running.clock, error)
                raise
            n_frames = int(str(result.rendered.video["frames"]))
            self.metrics.count_job(running.clock, None, n_frames)
            log_job_end(running.clock, None, output_frames=n_frames)
            self._results.put(job, result)
            return result

    def render(
        self,
        source: Path,
        audio: Path,
        output: Path,
        params: JobParams | None = None,
        *,
        aspect_ratio: str | None = None,
        resolution: str | None = None,
        on_progress: OnProgress = _ignore_progress,
    ) -> Rendered:
        """Local files in, local file out: `output` is an MP4 when this returns, and absent when it raises.

        Raises UnavailableError when the slot is taken, MediaError for bad input, ProcessingError otherwise.
        """
        with self._holding_slot() as engine:
            running = RunningJob(JobControl.for_job(None, self.settings), on_progress)
            session = engine.session(
                source, audio, output, params or JobParams(), aspect_ratio=aspect_ratio, resolution=resolution
            )
            with self._tracking(running):
                return Rendered(_render(session, running), running.clock)

    def preview(
        self,
        source: Path,
        audio: Path,
        time_s: float,
        params: JobParams | None = None,
        *,
        aspect_ratio: str | None = None,
        resolution: str | None = None,
        on_progress: OnProgress = _ignore_progress,
    ) -> Preview:
        """One picture of the video that `render` would make, the one shown at `time_s`; writes nothing.

        Raises as `render`, and RequestError when the video ends before.
        """
        with self._holding_slot() as engine:
            running = RunningJob(JobControl.for_job(None, self.settings), on_progress)
            session = engine.session(
                source, audio, None, params or JobParams(), aspect_ratio=aspect_ratio, resolution=resolution
            )
            with self._tracking(running):
                return _preview(session, running, time_s)

    def preview_job(self, job: Job, time_s: float, suffix: str = ".jpg") -> tuple[Preview, bytes]:
        """One picture of the video that `run_job` would make, and that picture as a file of this kind.

        A job without audio shows its source. Raises as `run_job`, and RequestError when the video ends before.
        """
        with self._holding_slot() as engine, job_logging(job.job_id):
            running = RunningJob(JobControl.for_job(job, self.settings), _ignore_progress)
            with self._tracking(running), self.work_dir.job_folder() as folder:
                with running.stage("download"):
                    check_room(self.settings.work_dir, self.settings.min_free_disk_mb)
                    files = fetch_inputs(job, folder, self.settings, running.should_stop, silence_s=time_s + 0.5)
                    files.check_sizes()
                preview = _preview(self._session(engine, job, files), running, time_s)
                picture = folder / f"preview{suffix}"
                preview.save(picture)
                return preview, picture.read_bytes()

    def _run_stages(self, engine: Engine, job: Job, running: RunningJob) -> JobResult:
        settings, clock = self.settings, running.clock
        with self.work_dir.job_folder() as folder:
            with running.stage("download"):
                # Checked first, because a full disk in mid-download wastes the whole transfer.
                check_room(settings.work_dir, settings.min_free_disk_mb)
                files = fetch_inputs(job, folder, settings, running.should_stop)
            summary = _render(self._session(engine, job, files), running, files, settings)
            rendered = _rendered_job(job, summary, settings)
            with running.stage("upload"):
                stored = self._store.upload(
                    files.output,
                    job.job_id,
                    sidecar_body(rendered, clock.snapshot()),
                    deadline_s=settings.upload_timeout_s,
                    should_stop=running.should_stop,
                )
        return JobResult(rendered, stored.url, stored.name, stored.bucket, clock.snapshot(), clock.total_s)

    def _session(self, engine: Engine, job: Job, files: JobFiles) -> RenderSession:
        is_shape_allowed = self.settings.output_geometry == "request"
        return engine.session(
            files.source,
            files.audio,
            files.output,
            job.params,
            aspect_ratio=job.aspect_ratio if is_shape_allowed else None,
            resolution=job.resolution if is_shape_allowed else None,
        )

    @contextmanager
    def _holding_slot(self) -> Iterator[Engine]:
        """Hold the slot during the block; raises UnavailableError at once when it is taken."""
        # Checked first because it names the reason; the lock decides.
        self.check_free()
        if not self._slot.acquire(blocking=False):
            raise self._rejection(_BUSY, "busy")
        try:
            yield self.engine
        finally:
            self._slot.release()

    def _rejection(self, reason: str, state: State) -> UnavailableError:
        self.metrics.count_rejection()
        return UnavailableError(reason, state=state)

    @contextmanager
    def _tracking(self, running: RunningJob) -> Iterator[None]:
        """Make `running` the job that `cancel`, `stop_running` and `progress_of` mean, and complete its errors."""
        self._running = running
        try:
            with running.errors():
                yield
        except GpuLostError as error:
            self.status.mark_lost(error.message)
            raise
        finally:
            self._running = None


def _render(
    session: RenderSession, running: RunningJob, files: JobFiles | None = None, settings: Settings | None = None
) -> RenderSummary:
    """Run the stages between the files; the output is written when this returns."""
    with session:
        with running.stage("validation"):
            if files is not None and settings is not None:
                # The inputs have just filled the disk that the output needs.
                check_room(settings.work_dir, settings.min_free_disk_mb)
                files.check_sizes()
            session.probe()
        with running.stage("preprocessing"):
            session.prepare(running.should_stop)
        with running.stage("inference"):
            session.generate(lambda done, total: running.report("inference", done, total), running.should_stop)
        with running.stage("postprocessing"):
            summary = session.finish()
    # Frames of a megabyte leave holes in the heap that would stay with the process for weeks.
    release_memory()
    return summary


def _preview(session: RenderSession, running: RunningJob, time_s: float) -> Preview:
    """Run the stages of one picture."""
    with session:
        with running.stage("validation"):
            session.probe()
        with running.stage("preprocessing"):
            session.prepare(running.should_stop, preview_s=time_s)
        with running.stage("inference"):
            return session.preview(time_s)


def _rendered_job(job: Job, summary: RenderSummary, settings: Settings) -> RenderedJob:
    ignored = tuple(f"params.{name} is not known and was ignored" for name in job.params.ignored)
    return RenderedJob(
        job=job,
        options=summary.options,
        model=summary.model,
        video=video_stats(summary),
        warnings=(*summary.warnings, *ignored),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        worker_id=settings.worker_id,
        config_label=settings.config_label,
        gpu_class=settings.gpu_class,
        peak_gpu_memory_mib=summary.peak_gpu_memory_mib,
        peak_memory_kb=peak_memory_kb(),
    )


_shared: Core | None = None
_shared_lock = threading.Lock()


def shared_core() -> Core:
    """The one core of this process, created and loading from the first call on; both front doors use it.

    Raises SettingsError when the environment is wrong.
    """
    global _shared  # noqa: PLW0603 - one GPU, one set of models, one process
    with _shared_lock:
        if _shared is None:
            settings = load_settings()
            configure_logging(settings.log_level)
            redact_values([settings.b2_key_id, settings.b2_app_key, settings.internal_api_key])
            logger.info("settings", extra={"settings": settings.describe()})
            for warning in settings.warnings:
                logger.warning(warning)
            _shared = Core(settings)
            _shared.start_loading()
        return _shared


if __name__ == "__main__":
    from worker.cli.render import main

    sys.exit(main(Core))
