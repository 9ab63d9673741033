"""The input files of a job: fetched where they are not local, checked for size. Knows no models, no HTTP server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from musetalk.errors import MediaError
from worker.config import Settings
from worker.jobs import Job
from worker.net.downloads import MIN_MEDIA_BYTES, DownloadSettings, fetch_together


@dataclass(frozen=True)
class JobFiles:
    """The files of one job; `n_bytes` are the sizes of its inputs by the request's field, as far as they are known."""

    source: Path
    audio: Path
    output: Path
    n_bytes: Mapping[str, int] = field(default_factory=dict)

    def check_sizes(self) -> None:
        """Raise MediaError for an input too small to be media, such as an empty upload or an error text."""
        for name, n_bytes in self.n_bytes.items():
            if n_bytes < MIN_MEDIA_BYTES:
                raise MediaError(f"the file of {name} has only {n_bytes} bytes", field=name, bytes=n_bytes)


def fetch_inputs(job: Job, folder: Path, settings: Settings, should_stop: Callable[[], bool]) -> JobFiles:
    """Download both inputs of `job` into `folder`; uploaded files stay where they are.

    Raises as `worker.net.downloads.fetch`.
    """
    output = folder / "output.mp4"
    if job.files is not None:
        source, audio = job.files
        return JobFiles(source, audio, output, {"source": source.stat().st_size, "audio": audio.stat().st_size})
    source, audio = folder / "source.bin", folder / "audio.bin"
    video, sound = fetch_together(
        [(job.video_url, source, "video"), (job.audio_url, audio, "audio")], _download_settings(settings), should_stop
    )
    return JobFiles(source, audio, output, {"video_url": video.n_bytes, "audio_url": sound.n_bytes})


def _download_settings(settings: Settings) -> DownloadSettings:
    return DownloadSettings(
        max_video_bytes=settings.max_video_bytes,
        max_audio_bytes=settings.max_audio_bytes,
        total_timeout_s=settings.download_timeout_s,
        allow_private_networks=settings.allow_private_networks,
        allowed_hosts=settings.download_allowed_hosts,
        allow_file_urls=settings.allow_file_urls,
        file_url_roots=settings.file_url_roots,
    )
