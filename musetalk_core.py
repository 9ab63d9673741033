"""The core: keeps the models loaded, owns the right to use the GPU, and knows the order of a job's stages.

Both front doors (HTTP and the poller) call `Core.run_job`; people call `python musetalk_core.py SOURCE AUDIO OUTPUT`.
Knows no JSON keys, no tensor operation, no picture.
"""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config import Settings, load_settings
from downloads import MIN_MEDIA_BYTES, DownloadSettings, fetch
from errors import DiskFullError, MediaError, MuseTalkError, ProcessingError, UnavailableError
from jobs import Job, JobParams, JobResult, Stage, parse_params
from storage import B2Settings, LocalStoreSettings, Store, open_store
from telemetry import StageClock, configure_logging, job_logging, logger, peak_memory_kb

if TYPE_CHECKING:
    from musetalk.media import EncoderSettings, MediaLimits
    from musetalk.models import Models
    from musetalk.options import RenderOptions
    from musetalk.render import RenderSummary

State = Literal["starting", "ready", "busy", "failed", "draining"]
OnProgress = Callable[[Stage, int, int], None]
ShouldStop = Callable[[], bool]

WORK_PREFIX = "job-"


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
class Rendered:
    """A finished local file and how it was made."""

    summary: RenderSummary
    clock: StageClock
    model: str


def _no_progress(_stage: Stage, _done: int, _total: int) -> None:
    """Progress nobody asked for."""


def _never() -> bool:
    return False


class Core:
    """One process's models and its one slot."""

    def __init__(self, settings: Settings, *, store: Store | None = None) -> None:
        """Does not load anything: `load` does, or `start_loading` in a thread of its own."""
        self.settings = settings
        self._store = store or _open_store(settings)
        self._slot = threading.Lock()
        self._models: Models | None = None
        self._encoder: EncoderSettings | None = None
        self._failure: str | None = None
        self._draining = threading.Event()
        self._watched: list[Callable[[], str | None]] = []

    # -- lifecycle ----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the models and choose the encoder; raises WeightsError. After a failure the core stays not ready."""
        from musetalk import media
        from musetalk.models import choose_device, choose_dtype, configure_threads, find_version, load_models

        settings = self.settings
        try:
            version: Any = find_version(settings.models_dir) if settings.model == "auto" else settings.model
            device = choose_device(settings.device)
            configure_threads(settings.cpu_threads, device)
            models = load_models(
                settings.models_dir,
                version,
                device=device,
                dtype=choose_dtype(settings.dtype, device),
                unet_path=settings.unet_path,
                unet_config_path=settings.unet_config_path,
            )
            preferred = (
                "libx264" if settings.video_encoder == "auto" and device.type == "cpu" else settings.video_encoder
            )
            encoder, reason = media.choose_encoder(preferred)
            if reason:
                logger.info("encoder chosen", extra={"encoder": encoder.codec, "reason": reason})
            self._encoder = replace(encoder, preset=settings.video_preset, crf=settings.video_crf)
        except Exception as error:
            self._failure = str(error)
            raise
        self._models = models
        logger.info("models loaded", extra={"model": version, "device": str(device), "dtype": str(models.dtype)})

    def start_loading(self) -> threading.Thread:
        """`load` in a thread, so that the server can say "starting" meanwhile; a failure is logged and kept."""

        def run() -> None:
            try:
                self.load()
            except Exception as error:  # noqa: BLE001 - readiness tells it; the thread has no caller
                logger.error("models could not be loaded", extra={"reason": str(error)})

        clean_work_dir(self.settings.work_dir)
        thread = threading.Thread(target=run, name="model-loader", daemon=True)
        thread.start()
        return thread

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
        """Take no further job; the running one goes on."""
        self._draining.set()

    @property
    def readiness(self) -> Readiness:
        """A snapshot that takes no lock a job holds."""
        model = self._models.version if self._models else None
        if self._failure is not None:
            return Readiness("failed", model, self._failure)
        if self._models is None:
            return Readiness("starting", model, "the models are loading")
        if self._draining.is_set():
            return Readiness("draining", model, "the worker is shutting down")
        for problem in self._watched:
            if (reason := problem()) is not None:
                return Readiness("failed", model, reason)
        return Readiness("busy" if self._slot.locked() else "ready", model)

    @contextmanager
    def _holding_slot(self) -> Iterator[Models]:
        """The right to use the GPU, at once or not at all; raises UnavailableError."""
        readiness = self.readiness
        models = self._models
        if models is None or not readiness.is_healthy:
            raise UnavailableError(readiness.reason or "the worker is not ready", state=readiness.state)
        if not self._slot.acquire(blocking=False):
            raise UnavailableError("the worker is busy with another job", state="busy")
        try:
            yield models
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
        with self._holding_slot() as models:
            clock = StageClock()
            with _told(clock):
                options = self._options(models, params or JobParams(), aspect_ratio, resolution)
                summary = self._render(models, source, audio, output, options, clock, on_progress, should_stop)
            return Rendered(summary, clock, models.version)

    def run_job(
        self, job: Job, *, on_progress: OnProgress = _no_progress, should_stop: ShouldStop = _never
    ) -> JobResult:
        """A whole job: fetch, render, store. Everything it wrote locally is gone afterwards.

        Raises UnavailableError at once when the slot is taken, otherwise as `render`, DownloadError and StorageError;
        every error carries its stage and the stage times so far.
        """
        with self._holding_slot() as models, job_logging(job.job_id):
            clock = StageClock()
            try:
                with _told(clock), self._work_folder() as folder:
                    result = self._run_stages(models, job, folder, clock, on_progress, should_stop)
            except BaseException as error:
                _log_end(clock, error)
                raise
            _log_end(clock, None, output_frames=result.video["frames"])
            return result

    def _run_stages(
        self,
        models: Models,
        job: Job,
        folder: Path,
        clock: StageClock,
        on_progress: OnProgress,
        should_stop: ShouldStop,
    ) -> JobResult:
        from musetalk.models import peak_memory_mib, reset_peak_memory

        settings = self.settings
        wants_geometry = settings.output_geometry == "request"
        options = self._options(
            models,
            job.params,
            job.aspect_ratio if wants_geometry else None,
            job.resolution if wants_geometry else None,
        )
        reset_peak_memory(models.device)
        source, audio, output = folder / "source.bin", folder / "audio.bin", folder / "output.mp4"
        with clock.stage("download"):
            on_progress("download", 0, 1)
            fetching = self._download_settings()
            sizes = {
                "video_url": fetch(job.video_url, source, fetching, kind="video", should_stop=should_stop).n_bytes,
                "audio_url": fetch(job.audio_url, audio, fetching, kind="audio", should_stop=should_stop).n_bytes,
            }
        with clock.stage("validation"):
            for name, n_bytes in sizes.items():
                if n_bytes < MIN_MEDIA_BYTES:
                    raise MediaError(f"the file of {name} has only {n_bytes} bytes", field=name, bytes=n_bytes)
        summary = self._render(models, source, audio, output, options, clock, on_progress, should_stop)
        video = _video_facts(summary)
        with clock.stage("upload"):
            on_progress("upload", 0, 1)
            stored = self._store.upload(
                output,
                job.job_id,
                {"musetalk_job_id": job.job_id, "queue_job_id": job.queue_job_id, "model": models.version, **video},
                deadline_s=settings.upload_timeout_s,
                should_stop=should_stop,
            )
        ignored = tuple(f"params.{name} is not known and was ignored" for name in job.params.ignored)
        return JobResult(
            job_id=job.job_id,
            output_url=stored.url,
            object_name=stored.name,
            bucket=stored.bucket,
            model=models.version,
            stage_times=clock.snapshot(),
            total_time_s=clock.total_s,
            gpu_class=settings.gpu_class,
            peak_gpu_memory_mib=peak_memory_mib(models.device),
            peak_memory_kb=peak_memory_kb(),
            video=video,
            warnings=(*summary.warnings, *ignored),
        )

    def _render(
        self,
        models: Models,
        source: Path,
        audio: Path,
        output: Path,
        options: RenderOptions,
        clock: StageClock,
        on_progress: OnProgress,
        should_stop: ShouldStop,
    ) -> RenderSummary:
        from musetalk.render import RenderSession

        session = RenderSession(models, source, audio, output, options, limits=self._limits(), encoder=self._encoder)
        with session:
            with clock.stage("validation"):
                on_progress("validation", 0, 1)
                session.probe()
            with clock.stage("preprocessing"):
                on_progress("preprocessing", 0, 1)
                session.prepare(should_stop)
            with clock.stage("inference"):
                session.generate(lambda done, total: on_progress("inference", done, total), should_stop)
            with clock.stage("postprocessing"):
                on_progress("postprocessing", 0, 1)
                return session.finish()

    def _options(
        self, models: Models, params: JobParams, aspect_ratio: str | None, resolution: str | None
    ) -> RenderOptions:
        """A job's wishes on top of the version's defaults (spec section 4)."""
        from musetalk.options import RenderOptions, version_defaults

        defaults = version_defaults(models.version)
        return replace(
            RenderOptions(
                face_box=params.face_box,
                bbox_shift=params.bbox_shift,
                left_cheek_width=params.left_cheek_width,
                right_cheek_width=params.right_cheek_width,
                box_smoothing=params.box_smoothing,
                max_gap_frames=params.max_gap_frames,
                batch_size=params.batch_size or self.settings.batch_size,
                aspect_ratio=aspect_ratio,
                resolution=resolution,
                frame_memory_bytes=self.settings.frame_memory_mb * 2**20,
                scratch_disk_bytes=self.settings.scratch_disk_mb * 2**20,
            ),
            extra_margin=defaults.extra_margin if params.extra_margin is None else params.extra_margin,
            mask_mode=defaults.mask_mode if params.parsing_mode is None else params.parsing_mode,
        )

    def _limits(self) -> MediaLimits:
        from musetalk.media import MediaLimits

        settings = self.settings
        return MediaLimits(
            max_side=settings.max_source_side, max_audio_s=settings.max_audio_s, max_frames=settings.max_output_frames
        )

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

    @contextmanager
    def _work_folder(self) -> Iterator[Path]:
        """A folder for one job's files, removed whatever happens."""
        self.settings.work_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=self.settings.work_dir))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _open_store(settings: Settings) -> Store:
    bucket = None
    if settings.uses_b2:
        bucket = B2Settings(
            key_id=settings.b2_key_id,
            app_key=settings.b2_app_key,
            bucket=settings.b2_bucket,
            prefix=settings.b2_prefix,
            realm=settings.b2_realm,
            link_lifetime_s=settings.b2_link_lifetime_s,
        )
    return open_store(bucket, LocalStoreSettings(settings.output_dir, settings.public_base_url))


def clean_work_dir(work_dir: Path) -> int:
    """Remove the folders a killed process left behind; returns how many. Touches nothing but our own folders."""
    stale = [path for path in work_dir.glob(f"{WORK_PREFIX}*") if path.is_dir() and not path.is_symlink()]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return len(stale)


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
        "encoder": summary.encoder,
    }


def _log_end(clock: StageClock, error: BaseException | None, **facts: object) -> None:
    """The one line per job that says how it went."""
    times = {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()}
    outcome: dict[str, object] = {"outcome": "succeeded"}
    if isinstance(error, MuseTalkError):
        outcome = {"outcome": "failed", "error_type": error.error_type, "reason": error.message, "stage": error.stage}
    elif error is not None:
        outcome = {"outcome": "failed", "error_type": "unknown_error", "reason": type(error).__name__}
    unforeseen = error is not None and not isinstance(error, MuseTalkError)
    logger.log(
        40 if unforeseen else 20,
        "job_done",
        exc_info=error if unforeseen else None,
        extra={**outcome, **facts, "stage_times": times, "total_time": round(clock.total_s, 3)},
    )


# -- command line -----------------------------------------------------------------------------------------------------


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Lip-sync SOURCE (video or still) to AUDIO and write the MP4 OUTPUT.")
    parser.add_argument("source", type=Path)
    parser.add_argument("audio", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a job parameter, VALUE as JSON: --param face_box=[10,20,200,260] --param parsing_mode=raw",
    )
    parser.add_argument("--aspect-ratio", help="crop around the face to a:b")
    parser.add_argument("--resolution", help="Np (short side) or WxH")
    return parser.parse_args(arguments)


def _params_from(pairs: Sequence[str]) -> JobParams:
    raw: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise SystemExit(f"--param needs NAME=VALUE, not {pair!r}")
        try:
            raw[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            raw[name.replace("-", "_")] = text
    params = parse_params(raw)
    if params.ignored:
        raise SystemExit(f"unknown --param: {', '.join(params.ignored)}")
    return params


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0 made, 1 could not be made)."""
    from tqdm import tqdm

    given = _parse_arguments(arguments)
    try:
        params = _params_from(given.param)
        settings = load_settings()
        core = Core(settings)
        print(f"loading the models from {settings.models_dir}", file=sys.stderr)
        core.load()
        with tqdm(unit="frame", desc="validation", file=sys.stderr, dynamic_ncols=True) as bar:

            def show(stage: Stage, done: int, total: int) -> None:
                bar.set_description(stage)
                if stage == "inference":
                    bar.total = total
                    bar.update(done - bar.n)

            rendered = core.render(
                given.source,
                given.audio,
                given.output,
                params,
                aspect_ratio=given.aspect_ratio,
                resolution=given.resolution,
                on_progress=show,
            )
    except MuseTalkError as error:
        print(f"error{f' in {error.stage}' if error.stage else ''}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; no file was written", file=sys.stderr)
        return 130
    _print_summary(given.output, rendered)
    return 0


def _print_summary(output: Path, rendered: Rendered) -> None:
    summary, clock = rendered.summary, rendered.clock
    print(
        f"{output}: {summary.n_frames} frames, {summary.width}x{summary.height}, {float(summary.rate):.3f} fps, "
        f"{summary.duration_s:.3f} s, model {rendered.model}"
    )
    print(
        f"source frames {summary.n_source_frames}, without a face {summary.n_without_face}, "
        f"interpolated {summary.n_interpolated}"
    )
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in clock.seconds.items())
    print(f"{stages}; {summary.n_frames / max(clock.total_s, 1e-9):.2f} frames a second in all")
    for warning in summary.warnings:
        print(f"warning: {warning}")


if __name__ == "__main__":
    configure_logging("warning")
    sys.exit(main())
