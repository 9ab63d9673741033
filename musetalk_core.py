"""The core: keeps the engine loaded, owns the right to use the GPU, and knows the order of a job's stages.

Both front doors (HTTP and the poller) call `Core.run_job`; people call `python musetalk_core.py SOURCE AUDIO OUTPUT`,
which is `worker.cli.render.main`.
Knows no JSON keys, no tensor operation, no picture.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from musetalk.errors import (
    CancelledError,
    DiskFullError,
    GpuLostError,
    MediaError,
    MuseTalkError,
    ProcessingError,
    UnavailableError,
)
from storage import open_store
from worker.config import Settings, load_settings
from worker.engine import Engine, EngineLoader, Rendered
from worker.job_control import JobControl, StopReason
from worker.jobs import Job, JobParams, JobResult, Stage, sidecar_body
from worker.machine import check_room, release_memory
from worker.net.downloads import MIN_MEDIA_BYTES, DownloadSettings, fetch_together
from worker.stored import Store
from worker.telemetry import (
    Metrics,
    StageClock,
    configure_logging,
    job_logging,
    keep_secret,
    logger,
    outcome_of,
    peak_memory_kb,
)
from worker.work_dir import FolderLock, job_folder, remove_leftovers

if TYPE_CHECKING:
    from musetalk.fetching import Watcher
    from musetalk.options import RenderOptions
    from musetalk.render import Preview, RenderSummary

State = Literal["starting", "ready", "busy", "failed", "draining"]
OnProgress = Callable[[Stage, int, int], None]
ShouldStop = Callable[[], bool]

_BUSY = "the worker is busy with another job"
# A queue that lost our answer sends the same job again within minutes; its result is kept so long.
KEPT_RESULTS = 50
KEPT_RESULTS_S = 3600.0


@dataclass(frozen=True)
class Readiness:
    """What the worker can do right now; `reason` says why not, for a person."""

    state: State
    model: str | None = None
    reason: str | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether probes should pass: busy is healthy, loading and failed are not."""
        return self.state in ("ready", "busy")


@dataclass(frozen=True)
class JobProgress:
    """How far the running job is: frames in the stage `inference`, 0 of 1 in the others."""

    stage: Stage
    done: int
    total: int


def _no_progress(_stage: Stage, _done: int, _total: int) -> None:
    """Progress nobody asked for."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class _Run:
    """A job under way: its clock, its stop flag, and who wants to know."""

    clock: StageClock
    control: JobControl
    on_progress: OnProgress

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """The block is stage `name`: timed, limited, told."""
        self.control.begin(name)
        with self.clock.stage(name):
            # Inference tells its own progress, in frames.
            if name != "inference":
                self.on_progress(name, 0, 1)
            yield


class Core:
    """One process's models and its one slot."""

    def __init__(self, settings: Settings, *, store: Store | None = None, fetch_watcher: Watcher | None = None) -> None:
        """Does not load anything: `load` does, or `start_loading` in a thread of its own.

        `fetch_watcher` sees a fetch of weights come in; the log does where there is none.
        """
        self.settings = settings
        self.metrics = Metrics()
        # Called once when only a new process can go on; whoever serves the core ends the process.
        self.on_lost: Callable[[str], None] | None = None
        self._store = store or open_store(settings)
        self._slot = threading.Lock()
        self._engine: Engine | None = None
        self._loader = EngineLoader(settings, self.metrics, watcher=fetch_watcher)
        self._failure: str | None = None
        self._waits_for: str | None = None
        self._work_dir_lock: FolderLock | None = None
        self._is_lost = threading.Lock()
        # A plain flag: it is set by a signal's handler, where taking a lock may never return.
        self._is_draining = False
        self._watched: list[Callable[[], str | None]] = []
        self._control: JobControl | None = None
        self._progress: JobProgress | None = None
        self._finished: OrderedDict[Job, tuple[float, JobResult]] = OrderedDict()
        self.metrics.read(
            "musetalk_model_ready", "1 while jobs can be taken or run.", lambda: self.readiness.is_healthy
        )
        self.metrics.read("musetalk_jobs_in_progress", "Jobs that run right now.", lambda: self.is_busy)

    # -- lifecycle ----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Check the machine, load the models, run them once, choose the encoder.

        Raises WeightsError for files, ProcessingError for a machine that is not fit. After a failure the core stays
        not ready.
        """
        try:
            self.use(self._loader.load())
        except Exception as error:
            self._failure = str(error)
            raise
        # Weights pass through the CPU on their way to the GPU, and in the file's precision on their way to ours.
        release_memory()

    def use(self, engine: Engine) -> None:
        """Run jobs on `engine` from now on."""
        self._engine = engine

    @property
    def engine(self) -> Engine:
        """What is loaded; raises UnavailableError before."""
        if self._engine is None:
            raise UnavailableError(self._loader.state, state="starting")
        return self._engine

    def start_loading(self) -> threading.Thread:
        """`load` in a thread, so that the server can say "starting" meanwhile; a failure is logged and kept."""

        def run() -> None:
            try:
                self._take_work_dir()
                # Before gigabytes are fetched for a worker that could store nothing.
                self._store.check()
                self.load()
            except Exception as error:  # noqa: BLE001 - readiness tells it; the thread has no caller
                self._failure = str(error)
                logger.error("the worker cannot be made ready", extra={"reason": str(error)})

        thread = threading.Thread(target=run, name="model-loader", daemon=True)
        thread.start()
        return thread

    def _take_work_dir(self) -> None:
        """Wait until no other worker uses the folder, then empty it of what a killed one left behind.

        Two workers in one folder would take each other's running jobs for remains.
        """
        try:
            lock = FolderLock(self.settings.work_dir)
        except OSError:
            # Loading looks at the folder as well, and says what is wrong with it.
            return
        if not lock.acquire():
            self._waits_for = "another worker uses WORK_DIR; each needs a folder of its own"
            logger.error(self._waits_for)
            while not lock.acquire():
                time.sleep(1.0)
            self._waits_for = None
        self._work_dir_lock = lock
        remove_leftovers(self.settings.work_dir)

    @property
    def owns_work_dir(self) -> bool:
        """Whether what lies in WORK_DIR is this worker's to use and to remove."""
        return self._work_dir_lock is not None

    def refuse(self, reason: str) -> None:
        """Take no job at all, for a reason that only a person can change."""
        self._failure = reason

    def watch(self, problem: Callable[[], str | None]) -> None:
        """Ask `problem()` at each look at the readiness: a text means that the worker is not healthy."""
        self._watched.append(problem)

    @property
    def is_busy(self) -> bool:
        """Whether a job runs right now."""
        return self._slot.locked()

    def drain(self) -> None:
        """Take no further job; the running one goes on. May be called by a signal's handler."""
        self._is_draining = True

    def stop_running(self, reason: StopReason) -> bool:
        """Stop the running job at its next chunk; whether there was one."""
        control = self._control
        if control is not None:
            control.stop(reason)
        return control is not None

    def cancel(self, job_id: str) -> bool:
        """Stop the running job if `job_id` is one of its ids; whether it is."""
        control = self._control
        if control is None or not control.is_called(job_id):
            return False
        logger.info("the running job is cancelled", extra={"cancelled": job_id})
        control.stop("cancelled")
        return True

    def progress_of(self, job_id: str) -> JobProgress | None:
        """How far the running job is, if `job_id` is one of its ids."""
        control = self._control
        return self._progress if control is not None and control.is_called(job_id) else None

    def _told_progress(self, on_progress: OnProgress) -> OnProgress:
        def told(stage: Stage, done: int, total: int) -> None:
            self._progress = JobProgress(stage, done, total)
            on_progress(stage, done, total)

        return told

    def lose(self, reason: str) -> None:
        """Only a new process can go on: not healthy from now on, and whoever serves the core is told, once."""
        if not self._is_lost.acquire(blocking=False):
            return
        self._failure = reason
        logger.critical("a new process is needed", extra={"reason": reason})
        if self.on_lost is not None:
            self.on_lost(reason)

    @property
    def readiness(self) -> Readiness:
        """A snapshot that takes no lock a job holds."""
        control = self._control
        if control is not None and control.is_stuck:
            self.lose("the running job hangs and cannot be stopped")
        model = self._engine.models.version if self._engine else None
        if self._failure is not None:
            return Readiness("failed", model, self._failure)
        if self._engine is None:
            return Readiness("starting", model, self._waits_for or self._loader.state)
        if self._is_draining:
            return Readiness("draining", model, "the worker is shutting down")
        for problem in self._watched:
            if (reason := problem()) is not None:
                return Readiness("failed", model, reason)
        return Readiness("busy" if self._slot.locked() else "ready", model)

    def check_free(self) -> None:
        """Raises UnavailableError when a job could not be taken right now; takes nothing itself."""
        readiness = self.readiness
        if readiness.state != "ready":
            reason = _BUSY if readiness.state == "busy" else readiness.reason
            raise self._rejection(reason or "the worker is not ready", readiness.state)

    def _rejection(self, reason: str, state: State) -> UnavailableError:
        self.metrics.rejected()
        return UnavailableError(reason, state=state)

    @contextmanager
    def _holding_slot(self) -> Iterator[Engine]:
        """The right to use the GPU, at once or not at all; raises UnavailableError."""
        # Looked at first for its reason; the lock is what decides.
        self.check_free()
        if not self._slot.acquire(blocking=False):
            raise self._rejection(_BUSY, "busy")
        try:
            yield self.engine
        finally:
            self._slot.release()

    # -- work ---------------------------------------------------------------------------------------------------------

    def render(
        self,
        source: Path,
        audio: Path,
        output: Path,
        params: JobParams | None = None,
        *,
        aspect_ratio: str | None = None,
        resolution: str | None = None,
        on_progress: OnProgress = _no_progress,
        should_stop: ShouldStop = _never,
    ) -> Rendered:
        """Local files in, local file out: `output` is an MP4 when this returns, and absent when it raises.

        Raises UnavailableError when the slot is taken, MediaError for bad input, ProcessingError otherwise.
        """
        with self._holding_slot() as engine:
            control = self._control_of()
            run = _Run(StageClock(), control, on_progress)
            with self._under(run, should_stop) as stop:
                options = engine.options(params or JobParams(), aspect_ratio, resolution)
                summary = self._render(engine, source, audio, output, options, run, stop)
            return Rendered(summary, run.clock, engine.models.version)

    def preview(
        self,
        source: Path,
        audio: Path,
        time_s: float,
        params: JobParams | None = None,
        *,
        aspect_ratio: str | None = None,
        resolution: str | None = None,
        on_progress: OnProgress = _no_progress,
        should_stop: ShouldStop = _never,
    ) -> Preview:
        """One picture of the video that `render` would make, the one shown at `time_s`; writes nothing.

        Raises as `render`, and RequestError when the video ends before.
        """
        with self._holding_slot() as engine:
            run = _Run(StageClock(), self._control_of(), on_progress)
            with self._under(run, should_stop) as stop:
                options = engine.options(params or JobParams(), aspect_ratio, resolution)
                with engine.session(source, audio, None, options) as session:
                    with run.stage("validation"):
                        session.probe()
                    with run.stage("preprocessing"):
                        session.prepare(stop, preview_s=time_s)
                    with run.stage("inference"):
                        return session.preview(time_s)

    def run_job(
        self, job: Job, *, on_progress: OnProgress = _no_progress, should_stop: ShouldStop = _never
    ) -> JobResult:
        """A whole job: fetch, render, store. Everything it wrote locally is gone afterwards.

        The same job of the same queue, sent again because our answer was lost, is answered from its result.
        Raises UnavailableError at once when the slot is taken, otherwise as `render`, DownloadError and StorageError;
        every error carries its stage and the stage times so far.
        """
        with self._holding_slot() as engine, job_logging(job.job_id):
            if (kept := self._kept_result(job)) is not None:
                logger.info("the job was done here before; its result is told again")
                return kept
            run = _Run(StageClock(), self._control_of(job), self._told_progress(on_progress))
            try:
                with self._under(run, should_stop) as stop, job_folder(self.settings.work_dir) as folder:
                    result = self._run_stages(engine, job, folder, run, stop)
            except BaseException as error:
                self.metrics.ended(run.clock, error)
                _log_end(run.clock, error)
                raise
            n_frames = result.video["frames"]
            assert isinstance(n_frames, int)
            self.metrics.ended(run.clock, None, n_frames)
            _log_end(run.clock, None, output_frames=n_frames)
            if job.queue_job_id:
                self._finished[job] = (time.monotonic(), result)
                while len(self._finished) > KEPT_RESULTS:
                    self._finished.popitem(last=False)
            return result

    def _bring(self, job: Job, source: Path, audio: Path, should_stop: ShouldStop) -> dict[str, int]:
        """Both files of a job, fetched where they are not here; their bytes by the request's field."""
        if job.files is not None:
            return {"source": source.stat().st_size, "audio": audio.stat().st_size}
        video, sound = fetch_together(
            [(job.video_url, source, "video"), (job.audio_url, audio, "audio")], self._download_settings(), should_stop
        )
        return {"video_url": video.n_bytes, "audio_url": sound.n_bytes}

    def _kept_result(self, job: Job) -> JobResult | None:
        """The result of this very job, when its queue sends it again; a job without a queue's id is always run."""
        ended, result = self._finished.get(job, (0.0, None))
        return result if result is not None and time.monotonic() - ended < KEPT_RESULTS_S else None

    def _control_of(self, job: Job | None = None) -> JobControl:
        settings = self.settings
        limit: dict[Stage, float] = dict.fromkeys(
            ("preprocessing", "inference", "postprocessing"), settings.inference_timeout_s
        )
        names = () if job is None else (job.job_id, job.queue_job_id, job.buffer_job_id)
        return JobControl(names, limit_s=settings.job_timeout_s, stage_limits_s=limit)

    @contextmanager
    def _under(self, run: _Run, should_stop: ShouldStop) -> Iterator[ShouldStop]:
        """Makes `run` the running job; yields its stop flag, and turns a stop into the error that says why."""
        self._control = run.control
        try:
            with _told(run.clock):
                try:
                    yield lambda: should_stop() or run.control.should_stop()
                except CancelledError as stopped:
                    if not run.control.should_stop():
                        raise
                    error = run.control.error()
                    error.stage = stopped.stage
                    raise error from None
        except GpuLostError as error:
            self.lose(error.message)
            raise
        finally:
            self._control = self._progress = None

    def _run_stages(self, engine: Engine, job: Job, folder: Path, run: _Run, should_stop: ShouldStop) -> JobResult:
        from musetalk.devices import peak_memory_mib, reset_peak_memory

        settings, models = self.settings, engine.models
        wants_geometry = settings.output_geometry == "request"
        options = engine.options(
            job.params,
            job.aspect_ratio if wants_geometry else None,
            job.resolution if wants_geometry else None,
        )
        reset_peak_memory(models.device)
        source, audio = job.files or (folder / "source.bin", folder / "audio.bin")
        output = folder / "output.mp4"
        with run.stage("download"):
            check_room(settings.work_dir, settings.min_free_disk_mb)
            sizes = self._bring(job, source, audio, should_stop)
        with run.stage("validation"):
            check_room(settings.work_dir, settings.min_free_disk_mb)
            for name, n_bytes in sizes.items():
                if n_bytes < MIN_MEDIA_BYTES:
                    raise MediaError(f"the file of {name} has only {n_bytes} bytes", field=name, bytes=n_bytes)
        summary = self._render(engine, source, audio, output, options, run, should_stop)
        video = _video_facts(summary)
        peak_gpu, peak_ram = peak_memory_mib(models.device), peak_memory_kb()
        with run.stage("upload"):
            sidecar = sidecar_body(
                job,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                stage_times=run.clock.snapshot(),
                peak_gpu_memory_mib=peak_gpu,
                peak_memory_kb=peak_ram,
                video=video,
                gpu_class=settings.gpu_class or "unknown",
                worker_id=settings.worker_id,
                config_label=settings.config_label,
                batch_size=options.batch_size,
                model=models.version,
            )
            stored = self._store.upload(
                output, job.job_id, sidecar, deadline_s=settings.upload_timeout_s, should_stop=should_stop
            )
        ignored = tuple(f"params.{name} is not known and was ignored" for name in job.params.ignored)
        return JobResult(
            job_id=job.job_id,
            output_url=stored.url,
            object_name=stored.name,
            bucket=stored.bucket,
            model=models.version,
            stage_times=run.clock.snapshot(),
            total_time_s=run.clock.total_s,
            gpu_class=settings.gpu_class,
            peak_gpu_memory_mib=peak_gpu,
            peak_memory_kb=peak_ram,
            video=video,
            warnings=(*summary.warnings, *ignored),
        )

    def _render(
        self,
        engine: Engine,
        source: Path,
        audio: Path,
        output: Path,
        options: RenderOptions,
        run: _Run,
        should_stop: ShouldStop,
    ) -> RenderSummary:
        with engine.session(source, audio, output, options) as session:
            with run.stage("validation"):
                session.probe()
            with run.stage("preprocessing"):
                session.prepare(should_stop)
            with run.stage("inference"):
                session.generate(lambda done, total: run.on_progress("inference", done, total), should_stop)
            with run.stage("postprocessing"):
                summary = session.finish()
        release_memory()
        return summary

    def _download_settings(self) -> DownloadSettings:
        settings = self.settings
        return DownloadSettings(
            max_video_bytes=settings.max_video_bytes,
            max_audio_bytes=settings.max_audio_bytes,
            total_timeout_s=settings.download_timeout_s,
            allow_private_networks=settings.allow_private_networks,
            allowed_hosts=settings.download_allowed_hosts,
            allow_file_urls=settings.allow_file_urls,
            file_url_roots=settings.file_url_roots,
        )


_shared: Core | None = None
_shared_lock = threading.Lock()


def shared_core() -> Core:
    """The one core of this process, made and loading from the first call on; both front doors use it.

    Raises SettingsError when the environment is wrong.
    """
    global _shared  # noqa: PLW0603 - one GPU, one set of models, one process
    with _shared_lock:
        if _shared is None:
            settings = load_settings()
            configure_logging(settings.log_level)
            keep_secret([settings.b2_key_id, settings.b2_app_key, settings.internal_api_key])
            logger.info("settings", extra={"settings": settings.describe()})
            for warning in settings.warnings:
                logger.warning(warning)
            _shared = Core(settings)
            _shared.start_loading()
        return _shared


@contextmanager
def _told(clock: StageClock) -> Iterator[None]:
    """Writes the stage times on errors that pass, and gives machine trouble its class."""
    try:
        yield
    except MuseTalkError as error:
        error.stage_times = clock.snapshot()
        raise
    except (OSError, MemoryError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = DiskFullError if is_full else ProcessingError
        reason = error.strerror if isinstance(error, OSError) else "out of memory"
        translated = kind(f"the machine failed: {reason or type(error).__name__}", kind=type(error).__name__)
        translated.stage = getattr(error, "stage", None)
        translated.stage_times = clock.snapshot()
        raise translated from error


def _video_facts(summary: RenderSummary) -> dict[str, object]:
    return {
        "width": summary.width,
        "height": summary.height,
        "fps": round(float(summary.rate), 6),
        "frames": summary.n_frames,
        "duration_sec": round(summary.duration_s, 6),
        "bytes": summary.n_bytes,
        "source_frames": summary.n_source_frames,
        "source_frames_without_face": summary.n_without_face,
        "source_frames_interpolated": summary.n_interpolated,
        "source_frames_reused": summary.n_reused,
        "encoder": summary.encoder,
    }


def _log_end(clock: StageClock, error: BaseException | None, **facts: object) -> None:
    """The one line per job that says how it went."""
    times = {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()}
    outcome: dict[str, object] = {"outcome": outcome_of(error)}
    if isinstance(error, MuseTalkError):
        outcome.update(error_type=error.error_type, reason=error.message, stage=error.stage)
    elif error is not None:
        outcome.update(error_type="unknown_error", reason=type(error).__name__)
    unforeseen = error is not None and not isinstance(error, MuseTalkError)
    logger.log(
        40 if unforeseen else 20,
        "job_done",
        exc_info=error if unforeseen else None,
        extra={**outcome, **facts, "stage_times": times, "total_time": round(clock.total_s, 3)},
    )


if __name__ == "__main__":
    from worker.cli.render import main

    sys.exit(main(Core))
