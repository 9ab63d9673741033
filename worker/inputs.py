"""The input files of a job: fetched where they are not local, checked for size. Knows no models, no HTTP server."""

from __future__ import annotations

import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from musetalk.errors import MediaError
from worker.config import Settings
from worker.jobs import Job
from worker.net.downloads import MIN_MEDIA_BYTES, DownloadSettings, fetch_together
from worker.net.input_part import Kind
from worker.own_files import OwnFiles, link_or_copy

# Enough for a track without sound, and accepted by every decoder.
_SILENCE_RATE = 8000


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


def fetch_inputs(
    job: Job, folder: Path, settings: Settings, should_stop: Callable[[], bool], *, silence_s: float = 0.0
) -> JobFiles:
    """Get both inputs of `job` into `folder`; uploaded files of its own request stay where they are.

    A job without audio gets `silence_s` seconds of silence. Raises as `worker.net.downloads.fetch`.
    """
    output = folder / "output.mp4"
    if job.files is not None:
        source, audio = job.files
        return JobFiles(source, audio, output, {"source": source.stat().st_size, "audio": audio.stat().st_size})
    source, audio = folder / "source.bin", folder / "audio.bin"
    own, sizes, remote = OwnFiles(settings.work_dir), dict[str, int](), list[tuple[str, Path, Kind]]()
    fields: list[tuple[str, str, Path, Kind]] = [
        ("video_url", job.video_url, source, "video"),
        ("audio_url", job.audio_url, audio, "audio"),
    ]
    names: list[str] = []
    for name, url, path, kind in fields:
        if not url:
            write_silence(path, min(silence_s, settings.max_audio_s))
        elif (here := own.find(url, name)) is not None:
            link_or_copy(here, path)
            sizes[name] = path.stat().st_size
        else:
            remote.append((url, path, kind))
            names.append(name)
    if remote:
        fetched = fetch_together(remote, _download_settings(settings), should_stop)
        sizes.update({name: file.n_bytes for name, file in zip(names, fetched, strict=True)})
    return JobFiles(source, audio, output, sizes)


def write_silence(path: Path, seconds: float) -> None:
    """Write a WAV file without sound."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(_SILENCE_RATE)
        # 128 is zero in eight bits.
        file.writeframes(b"\x80" * round(seconds * _SILENCE_RATE))


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
