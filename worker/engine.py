"""Everything that jobs share once it is loaded, and how it comes to be loaded: machine, weights, networks, encoder.

Translates settings into what the model, the media and the avatars take. Knows no job, no slot, no stages.
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
    from musetalk.avatars import AvatarCache
    from musetalk.fetching import Progress, Watcher
    from musetalk.media import EncoderSettings, MediaLimits
    from musetalk.models import Models
    from musetalk.options import RenderOptions
    from musetalk.render import RenderSession, RenderSummary
    from musetalk.weights import ModelVersion

_MIB = 2**20
# The small model that comes with the project.
DEMO_MODELS = ROOT / "demo/models"
# A line in the log every so many percent of fetched weights.
_LOG_PERCENT = 5
LOADING = "the models are loading"


@dataclass(frozen=True)
class Rendered:
    """A finished local file and how it was made."""

    summary: RenderSummary
    clock: StageClock
    model: str


@dataclass(frozen=True)
class Engine:
    """The networks on their device, the encoder, the avatars (None: nothing is kept), and frames a batch that fit."""

    settings: Settings
    models: Models
    encoder: EncoderSettings
    avatars: AvatarCache | None
    batch_size: int

    def session(self, source: Path, audio: Path, output: Path | None, options: RenderOptions) -> RenderSession:
        """One job's work on local files, within this worker's limits."""
        from musetalk.render import RenderSession

        return RenderSession(
            self.models,
            source,
            audio,
            output,
            options,
            limits=_media_limits(self.settings),
            encoder=self.encoder,
            avatars=self.avatars,
        )

    def options(self, params: JobParams, aspect_ratio: str | None, resolution: str | None) -> RenderOptions:
        """A job's wishes on top of the version's defaults (docs/model.md#version-defaults)."""
        from musetalk.options import RenderOptions, version_defaults

        settings = self.settings
        defaults = version_defaults(self.models.version)
        on_gpu = self.models.device.type == "cuda"
        return RenderOptions(
            face_box=params.face_box,
            bbox_shift=params.bbox_shift,
            left_cheek_width=params.left_cheek_width,
            right_cheek_width=params.right_cheek_width,
            box_smoothing=params.box_smoothing,
            max_gap_frames=params.max_gap_frames,
            loop_mode=params.loop_mode,
            silence=params.silence,
            batch_size=params.batch_size or self.batch_size,
            aspect_ratio=aspect_ratio,
            resolution=resolution,
            frame_memory_bytes=settings.frame_memory_mb * _MIB,
            scratch_disk_bytes=settings.scratch_disk_mb * _MIB,
            device_pixels=on_gpu if settings.device_pixels == "auto" else settings.device_pixels == "1",
            overlap=on_gpu,
            extra_margin=defaults.extra_margin if params.extra_margin is None else params.extra_margin,
            match_colours=defaults.match_colours,
            margin_share=defaults.margin_share if params.extra_margin is None else 0.0,
            mask_mode=defaults.mask_mode if params.parsing_mode is None else params.parsing_mode,
        )


def check_inputs(settings: Settings, source: Path, audio: Path) -> None:
    """Raises MediaError for files that no job would take; needs nothing that is loaded."""
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
    """One loading of the engine; `state` says what it is at, for whoever asks meanwhile."""

    def __init__(self, settings: Settings, metrics: Metrics, *, watcher: Watcher | None = None) -> None:
        """`watcher` sees a fetch of weights come in; the log does where there is none."""
        self._settings, self._metrics, self._watcher = settings, metrics, watcher
        self.state = LOADING

    def load(self) -> Engine:
        """Check the machine, load the networks, run them once, choose the encoder.

        Raises WeightsError for files, ProcessingError for a machine that is not fit.
        """
        self._check_folders()
        models, batch_size = self._load_models()
        return engine_around(self._settings, models, batch_size)

    def _check_folders(self) -> None:
        settings = self._settings
        folders = [(settings.work_dir, "WORK_DIR")]
        if not settings.uses_b2:
            folders.append((settings.output_dir, "OUTPUT_DIR"))
        for folder, name in folders:
            if (problem := folder_problem(folder, name, settings.min_free_disk_mb)) is not None:
                raise ProcessingError(problem)

    def _check_device(self) -> Any:
        """The device (torch's), looked at and tried out before anything large is fetched or loaded for it."""
        from musetalk import devices

        settings = self._settings
        device = devices.choose_device(settings.device)
        if device.type == "cpu" and settings.device == "auto" and has_gpu_hardware():
            raise WeightsError(
                "this machine has an NVIDIA card that torch cannot use (driver too old for this build of torch?); "
                "MUSETALK_DEVICE=cpu would run without it"
            )
        devices.configure_threads(settings.cpu_threads, device)
        if device.type == "cuda":
            facts = devices.gpu_facts(device)
            logger.info("gpu", extra={"gpu": facts.name, "free_mib": facts.free_mib, "total_mib": facts.total_mib})
            if (problem := devices.gpu_problem(facts, settings.min_gpu_memory_mb)) is not None:
                raise ProcessingError(problem)
        devices.try_out(device)
        return device

    def _load_models(self) -> tuple[Models, int]:
        from musetalk import __version__, devices
        from musetalk.models import load_models
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
        loaded = time.monotonic()
        batch_size = warm_up(models, settings.batch_size, settings.acceleration)
        if batch_size != settings.batch_size:
            logger.warning("the batch does not fit the GPU", extra={"batch_size": batch_size})
        build = {"version": __version__, "model": version, "device": str(device), "torch": devices.torch_version()}
        self._metrics.built(**build)
        self._metrics.read_gpu_memory(lambda: devices.memory_bytes(device))
        logger.info(
            "models loaded",
            extra={
                **build,
                "dtype": str(models.dtype),
                "dtype_reason": reason,
                "load_s": round(loaded - started, 2),
                "warm_up_s": round(time.monotonic() - loaded, 2),
            },
        )
        return models, batch_size

    def choose_model(self) -> tuple[ModelVersion, Path]:
        """Which weights, and where they lie; missing ones are fetched where that is wanted. Raises WeightsError."""
        from musetalk.models import find_version
        from musetalk.weights import locate

        settings = self._settings
        if settings.model == "demo":
            return "demo", DEMO_MODELS
        version: Any = "v15" if settings.model == "auto" else settings.model
        may_fetch = self._may_fetch()
        try:
            if settings.model == "auto":
                # Where the real model is to be had, the demo does not quietly stand for it.
                version, models_dir = find_version(settings.models_dir, None if may_fetch else DEMO_MODELS)
            else:
                locate(settings.models_dir, version)
                models_dir = settings.models_dir
        except WeightsError as error:
            if not may_fetch:
                raise
            logger.info("weights are missing and will be fetched", extra={"missing": error.details.get("missing")})
            self._fetch_weights(version)
            return version, settings.models_dir
        if version == "demo":
            logger.warning(
                "NO OFFICIAL WEIGHTS FOUND: the small demo model runs; it is made for the demo portrait, not for real "
                "faces (MUSETALK_MODEL=v15 refuses to start instead)",
                extra={"models_dir": str(settings.models_dir)},
            )
        return version, models_dir

    def _may_fetch(self) -> bool:
        """Whether this worker brings weights it lacks: told to, or run on a GPU, which nobody rents for the demo."""
        settings = self._settings
        if settings.fetch_weights == "auto":
            return settings.device != "cpu" and has_gpu_hardware()
        return settings.fetch_weights == "1"

    def _fetch_weights(self, version: ModelVersion) -> None:
        """Fetch into the models folder, told in the log and in `state`; raises WeightsError."""
        from musetalk import manifest
        from musetalk.fetching import Watcher, every, fetch

        settings = self._settings
        watcher = self._watcher or Watcher(logger.info, every(_LOG_PERCENT, _log_fetched))

        def show(progress: Progress) -> None:
            self.state = f"fetching the weights: {progress.percent} %"
            watcher.on_progress(progress)

        self.state = "fetching the weights: 0 %"
        files = manifest.with_s3fd_url(manifest.MANIFEST, settings.s3fd_url)
        started = time.monotonic()
        fetch(settings.models_dir, version, manifest=files, watcher=Watcher(watcher.say, show))
        self.state = LOADING
        logger.info("weights fetched", extra={"fetch_s": round(time.monotonic() - started, 1)})


def engine_around(settings: Settings, models: Models, batch_size: int) -> Engine:
    """An engine with these networks; raises ProcessingError when the wanted encoder is not to be had."""
    return Engine(settings, models, _choose_encoder(settings, models), _open_avatars(settings), batch_size)


def _log_fetched(progress: Progress) -> None:
    facts = {"percent": progress.percent, "file": progress.name, "bytes": progress.n_done, "of": progress.n_total}
    logger.info("fetching the weights", extra=facts)


def _choose_encoder(settings: Settings, models: Models) -> EncoderSettings:
    from musetalk import media

    is_cpu = models.device.type == "cpu"
    preferred = "libx264" if settings.video_encoder == "auto" and is_cpu else settings.video_encoder
    encoder, reason = media.choose_encoder(preferred)
    if reason:
        logger.info("encoder chosen", extra={"encoder": encoder.codec, "reason": reason})
    return replace(encoder, preset=settings.video_preset, crf=settings.video_crf)


def _open_avatars(settings: Settings) -> AvatarCache | None:
    from musetalk.avatars import AvatarCache

    if not settings.avatar_memory_mb and not settings.avatar_disk_mb:
        return None
    return AvatarCache(
        settings.avatar_dir, memory_bytes=settings.avatar_memory_mb * _MIB, disk_bytes=settings.avatar_disk_mb * _MIB
    )
