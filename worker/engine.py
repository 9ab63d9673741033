"""The engine: networks, encoder and avatars that all jobs share, and the loading of them on a checked machine.

Translates settings into the options of the model, the media and the avatars. Knows no job, no slot, no stages.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musetalk.errors import MuseTalkError, ProcessingError, WeightsError
from worker.config import ROOT, Settings
from worker.jobs import JobParams
from worker.machine import folder_problem, has_gpu_hardware
from worker.telemetry import Metrics, StageClock, logger

if TYPE_CHECKING:
    from musetalk.acceleration import Acceleration
    from musetalk.avatars import AvatarCache
    from musetalk.fetch_progress import Progress, Watcher
    from musetalk.media import EncoderSettings, MediaLimits
    from musetalk.models import Models
    from musetalk.options import RenderOptions
    from musetalk.render import RenderSession, RenderSummary
    from musetalk.weights import ModelVersion

_MIB = 2**20
# The small model that ships with the project.
DEMO_MODELS = ROOT / "demo/models"
# Percent of the weights between two log lines.
_LOG_PERCENT = 5
LOADING = "the models are loading"


@dataclass(frozen=True)
class Rendered:
    """A finished local file: its summary and the clock of its stages."""

    summary: RenderSummary
    clock: StageClock


@dataclass(frozen=True)
class Engine:
    """The networks on their device, the encoder, the avatars (None: nothing is kept), and the batch that fits."""

    settings: Settings
    models: Models
    encoder: EncoderSettings
    avatars: AvatarCache | None
    batch_size: int

    def session(
        self,
        source: Path,
        audio: Path,
        output: Path | None,
        params: JobParams,
        *,
        aspect_ratio: str | None = None,
        resolution: str | None = None,
    ) -> RenderSession:
        """Open one video on local files, with a job's parameters and within this worker's limits."""
        from musetalk.render import RenderSession

        return RenderSession(
            self.models,
            source,
            audio,
            output,
            self.options(params, aspect_ratio, resolution),
            limits=_media_limits(self.settings),
            encoder=self.encoder,
            avatars=self.avatars,
        )

    def options(self, params: JobParams, aspect_ratio: str | None, resolution: str | None) -> RenderOptions:
        """The options of a video: version defaults (docs/model.md#version-defaults), settings, the job's parameters."""
        from musetalk.options import version_defaults

        settings = self.settings
        on_gpu = self.models.device.type == "cuda"
        chosen: dict[str, Any] = {
            "batch_size": self.batch_size,
            "aspect_ratio": aspect_ratio,
            "resolution": resolution,
            "frame_memory_bytes": settings.frame_memory_mb * _MIB,
            "scratch_disk_bytes": settings.scratch_disk_mb * _MIB,
            "device_pixels": on_gpu if settings.device_pixels == "auto" else settings.device_pixels == "1",
            "overlap": on_gpu,
            # A number that somebody chose is kept.
            "yields_cores": not on_gpu and settings.cpu_threads == 0,
            "face_search": settings.face_search,
            **params.chosen(),
        }
        if params.extra_margin is not None:
            # A margin in pixels replaces the demo's margin, which is a share of the face.
            chosen["margin_share"] = 0.0
        return replace(version_defaults(self.models.version), **chosen)


def check_inputs(settings: Settings, source: Path, audio: Path) -> None:
    """Raise MediaError for files that no job would take; nothing has to be loaded."""
    from musetalk import media

    try:
        media.probe_both(source, audio, _media_limits(settings))
    except MuseTalkError as error:
        error.stage = "validation"
        raise


def _media_limits(settings: Settings) -> MediaLimits:
    from musetalk.media import MediaLimits

    return MediaLimits(
        max_side=settings.max_source_side, max_audio_s=settings.max_audio_s, max_frames=settings.max_output_frames
    )


class EngineLoader:
    """One loading of the engine; `state` describes its progress for /hc."""

    def __init__(self, settings: Settings, metrics: Metrics, *, watcher: Watcher | None = None) -> None:
        """`watcher` follows the download of weights; without one the log does."""
        self._settings, self._metrics, self._watcher = settings, metrics, watcher
        self.state = LOADING

    def load(self) -> Engine:
        """Check the machine, load the networks, run them once, choose the encoder.

        Raises WeightsError for files, ProcessingError for an unfit machine.
        """
        from musetalk import media

        self._check_folders()
        # Imports beside the loading of the models what the first job would wait for.
        media.start_decoder()
        models, batch_size = self._load_models()
        return engine_around(self._settings, models, batch_size)

    def _check_folders(self) -> None:
        settings = self._settings
        folders = [(settings.work_dir, "WORK_DIR")]
        if not settings.uses_b2:
            folders.append((settings.output_dir, "OUTPUT_DIR"))
        for folder, name in folders:
            if (problem := folder_problem(folder, name, settings.min_free_disk_mb)) is not None:
                # The answer of /hc must not name a path of this machine; the log of this machine may.
                logger.error("folder not usable", extra={"setting": name, "folder": str(folder), "reason": problem})
                raise ProcessingError(problem)

    def _check_device(self) -> Any:
        """Choose the device (torch's) and try it before anything large is fetched or loaded for it."""
        from musetalk import devices
        from musetalk.acceleration import compiler_problem

        settings = self._settings
        device = devices.choose_device(settings.device)
        if device.type == "cpu" and settings.device == "auto" and has_gpu_hardware():
            raise WeightsError(
                "this machine has an NVIDIA card that torch cannot use (driver too old for this build of torch?); "
                "MUSETALK_DEVICE=cpu would run without it"
            )
        devices.configure_threads(settings.cpu_threads, device)
        if device.type == "cuda":
            gpu = devices.gpu_properties(device)
            logger.info("gpu", extra={"gpu": gpu.name, "free_mib": gpu.free_mib, "total_mib": gpu.total_mib})
            if (problem := devices.gpu_problem(gpu, settings.min_gpu_memory_mb)) is not None:
                raise ProcessingError(problem)
        devices.try_out(device)
        if settings.acceleration == "compile" and device.type == "cuda" and (problem := compiler_problem()) is not None:
            raise ProcessingError(f"MUSETALK_ACCELERATION=compile: {problem}; graphs needs neither", retryable=False)
        return device

    def _load_models(self) -> tuple[Models, int]:
        from musetalk import __version__, devices
        from musetalk.models import load_models
        from musetalk.restoration import load_restorer
        from musetalk.warming import warm_up

        settings = self._settings
        device = self._check_device()
        version, models_dir = self.choose_model()
        dtype, reason = devices.choose_dtype(settings.dtype, device)
        started = time.monotonic()
        models = load_models(
            models_dir,
            version,
            device=device,
            dtype=dtype,
            unet_path=settings.unet_path,
            unet_config_path=settings.unet_config_path,
        )
        if settings.restorer_path is not None:
            restorer = load_restorer(settings.restorer_path, device)
            restorer.try_out(models.generator.crop_px)
            models = replace(models, restorer=restorer)
        loaded = time.monotonic()
        wanted, acceleration = _speed(settings, device)
        batch_size = warm_up(models, wanted, acceleration)
        if batch_size != wanted:
            logger.warning("batch size lowered to fit the GPU", extra={"batch_size": batch_size})
        build = {"version": __version__, "model": version, "device": str(device), "torch": devices.torch_version()}
        self._metrics.set_build_info(**build)
        self._metrics.register_gpu_memory(lambda: devices.memory_bytes(device))
        logger.info(
            "models loaded",
            extra={
                **build,
                "dtype": str(models.dtype),
                "dtype_reason": reason,
                "batch_size": batch_size,
                "acceleration": acceleration,
                "load_s": round(loaded - started, 2),
                "warm_up_s": round(time.monotonic() - loaded, 2),
            },
        )
        return models, batch_size

    def choose_model(self) -> tuple[ModelVersion, Path]:
        """Choose the weights and their folder; fetch missing ones where the settings allow. Raises WeightsError."""
        from musetalk.models import find_version
        from musetalk.weights import locate

        settings = self._settings
        if settings.model == "demo":
            return "demo", DEMO_MODELS
        version: Any = "v15" if settings.model == "auto" else settings.model
        may_fetch = self._may_fetch()
        try:
            if settings.model == "auto":
                # Where the official model can be fetched, the demo must not replace it silently.
                version, models_dir = find_version(settings.models_dir, None if may_fetch else DEMO_MODELS)
            else:
                locate(settings.models_dir, version)
                models_dir = settings.models_dir
        except WeightsError as error:
            if not may_fetch:
                raise
            logger.info("weights missing; fetching", extra={"missing": error.details.get("missing")})
            self._fetch_weights(version)
            return version, settings.models_dir
        if version == "demo":
            logger.warning(
                "NO OFFICIAL WEIGHTS FOUND: running the small demo model, made for the demo portrait and not for real "
                "faces (with MUSETALK_MODEL=v15 the worker refuses to start instead)",
                extra={"models_dir": str(settings.models_dir)},
            )
        return version, models_dir

    def _may_fetch(self) -> bool:
        """Whether missing weights are fetched: by setting, or on a GPU, because nobody rents one for the demo."""
        settings = self._settings
        if settings.fetch_weights == "auto":
            return settings.device != "cpu" and has_gpu_hardware()
        return settings.fetch_weights == "1"

    def _fetch_weights(self, version: ModelVersion) -> None:
        """Fetch into the models folder, with progress in the log and in `state`; raises WeightsError."""
        from musetalk import manifest
        from musetalk.fetch_progress import Watcher, every_percent
        from musetalk.fetching import fetch

        settings = self._settings
        watcher = self._watcher or Watcher(logger.info, every_percent(_LOG_PERCENT, _log_fetched))

        def show(progress: Progress) -> None:
            self.state = f"fetching the weights: {progress.percent} %"
            watcher.on_progress(progress)

        self.state = "fetching the weights: 0 %"
        files = manifest.with_s3fd_url(manifest.MANIFEST, settings.s3fd_url)
        started = time.monotonic()
        fetch(settings.models_dir, version, manifest=files, watcher=Watcher(watcher.say, show))
        self.state = LOADING
        logger.info("weights fetched", extra={"fetch_s": round(time.monotonic() - started, 1)})


def _speed(settings: Settings, device: Any) -> tuple[int, Acceleration]:
    """Batch size and acceleration on a device (torch's): as set, else by the card."""
    from musetalk import devices

    on_gpu = device.type == "cuda"
    by_card = on_gpu and settings.wanted_batch_size is None
    batch_size = devices.batch_for(devices.gpu_properties(device).total_mib) if by_card else settings.batch_size
    if settings.acceleration == "auto":
        return batch_size, "graphs" if on_gpu else "none"
    return batch_size, settings.acceleration


def engine_around(settings: Settings, models: Models, batch_size: int) -> Engine:
    """Build an engine with these networks; raises ProcessingError when the chosen encoder is unavailable."""
    return Engine(settings, models, _choose_encoder(settings, models), _open_avatars(settings), batch_size)


def _log_fetched(progress: Progress) -> None:
    stats = {"percent": progress.percent, "file": progress.name, "bytes": progress.n_done, "of": progress.n_total}
    logger.info("fetching the weights", extra=stats)


def _choose_encoder(settings: Settings, models: Models) -> EncoderSettings:
    from musetalk import media

    is_cpu = models.device.type == "cpu"
    preferred = "libx264" if settings.video_encoder == "auto" and is_cpu else settings.video_encoder
    encoder, reason = media.choose_encoder(preferred)
    preset: str = settings.video_preset
    if preset == "auto":
        # A data-centre card draws faster than the cores beside it encode, and has no encoder of its own.
        preset = "veryfast" if is_cpu or encoder.codec != "libx264" else "lean"
    if reason:
        logger.info("encoder chosen", extra={"encoder": encoder.codec, "preset": preset, "reason": reason})
    return replace(encoder, preset=preset, crf=settings.video_crf, threads=settings.video_threads)


def _open_avatars(settings: Settings) -> AvatarCache | None:
    from musetalk.avatars import AvatarCache

    if not settings.avatar_memory_mb and not settings.avatar_disk_mb:
        return None
    return AvatarCache(
        settings.avatar_dir, memory_bytes=settings.avatar_memory_mb * _MIB, disk_bytes=settings.avatar_disk_mb * _MIB
    )


def video_stats(summary: RenderSummary) -> dict[str, object]:
    """The `video` object of a result: size in px, rate in frames a second, length in seconds, and what was counted."""
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
