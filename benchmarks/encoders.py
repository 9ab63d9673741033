"""Encoders on the same pictures: CPU and time a frame, size, and what is lost, by setting and thread count."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from benchmarks.arguments import FRAME_SIZES
from benchmarks.material import RATE, camera_frames
from benchmarks.measuring import cpu_seconds
from musetalk import media
from musetalk.frames import BT709, Planes
from musetalk.media import EncoderSettings

_HARDWARE = "h264_nvenc"


@dataclass(frozen=True)
class Encoding:
    """One way to encode: CPU and wall ms a frame, bytes a frame, luma PSNR in dB.

    `equal_bytes` are the bytes a frame at the PSNR of the usual setting; 0 before they are compared.
    """

    name: str
    size: str
    n_frames: int
    cpu_ms: float
    wall_ms: float
    frame_bytes: float
    psnr_db: float
    equal_bytes: float = 0.0

    @property
    def fps(self) -> float:
        """Frames a second."""
        return 1000 / self.wall_ms


PRESETS = ("superfast", "lean", "veryfast", "faster")
# Steps of the constant quality around the usual one, from which sizes at equal PSNR are read.
_CRF_STEPS = (-3, 0, 3)


def settings_to_compare(*, with_hardware: bool, presets: Sequence[str] = PRESETS) -> dict[str, EncoderSettings]:
    """Names and settings: x264's presets by one thread, the usual one by all, and NVENC where it works."""
    usual = EncoderSettings()
    found = {f"x264 {preset}, 1 thread": replace(usual, preset=preset, threads=1) for preset in presets}
    n_threads = usual.n_threads()
    found[f"x264 {usual.preset}, {n_threads} thread{'s' if n_threads > 1 else ''}"] = usual
    if with_hardware:
        hardware, reason = media.choose_encoder(_HARDWARE)
        if reason is None:
            found["NVENC"] = hardware
    return found


def encode(name: str, size: str, frames: Sequence[Planes], settings: EncoderSettings, folder: Path) -> Encoding:
    """Encode the frames without sound and compare the file with them."""
    path = folder / "encoded.mp4"
    wall, cpu = time.perf_counter(), cpu_seconds()
    with media.VideoWriter(
        path,
        width=frames[0].width,
        height=frames[0].height,
        rate=RATE,
        colour=BT709,
        n_frames=len(frames),
        audio_path=None,
        audio_duration=Fraction(0),
        settings=settings,
    ) as writer:
        for planes in frames:
            writer.write(planes)
        # The check of the finished file belongs to the end of a job, not to its frames.
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        info = writer.close()
    made = Encoding(
        name=name,
        size=size,
        n_frames=len(frames),
        cpu_ms=1000 * cpu / len(frames),
        wall_ms=1000 * wall / len(frames),
        frame_bytes=info.n_bytes / len(frames),
        psnr_db=psnr(frames, path),
    )
    path.unlink()
    return made


def psnr(frames: Sequence[Planes], path: Path) -> float:
    """Luma PSNR (dB) of a video against its pictures, over all of them."""
    squares = 0.0
    with av.open(str(path)) as container:
        for planes, frame in zip(frames, container.decode(video=0), strict=True):
            shown = frame.to_ndarray()[: planes.height]
            squares += float(np.square(shown.astype(np.float32) - planes.y).sum(dtype=np.float64))
    mean = squares / sum(planes.y.size for planes in frames)
    return float(10 * np.log10(255**2 / mean)) if mean else float("inf")


def size_at(psnr_db: float, encodings: Sequence[Encoding]) -> float:
    """Bytes a frame that a setting needs for this PSNR, read from its encodings at several qualities."""
    slope, start = np.polyfit([each.psnr_db for each in encodings], [np.log(each.frame_bytes) for each in encodings], 1)
    return float(np.exp(start + slope * psnr_db))


def measure_encoders(size: str, n_frames: int, *, with_hardware: bool) -> list[Encoding]:
    """Every setting on a clip of this size, with the size at the PSNR of the usual setting."""
    frames = list(camera_frames(*FRAME_SIZES[size], n_frames))
    with tempfile.TemporaryDirectory(prefix="encoders-") as name:
        return compare(size, frames, settings_to_compare(with_hardware=with_hardware), Path(name))


def compare(
    size: str, frames: Sequence[Planes], settings: Mapping[str, EncoderSettings], folder: Path
) -> list[Encoding]:
    """Encode the frames with each setting at its own quality, and around it for the size at equal PSNR."""
    found: dict[str, list[Encoding]] = {}
    for label, each in settings.items():
        found[label] = [
            encode(label, size, frames, replace(each, crf=each.crf + step), folder)
            for step in sorted(_CRF_STEPS, key=abs)
        ]
    usual = next((made[0] for label, made in found.items() if EncoderSettings().preset in label), None)
    wanted = usual.psnr_db if usual is not None else next(iter(found.values()))[0].psnr_db
    return [replace(made[0], equal_bytes=size_at(wanted, made)) for made in found.values()]


def encoder_rows(encodings: Sequence[Encoding]) -> list[str]:
    """A Markdown table of the encodings."""
    rows = [
        f"| {each.name} | {each.size} | {each.cpu_ms:.1f} | {each.wall_ms:.1f} | {each.fps:.0f} | "
        f"{each.frame_bytes / 1000:.1f} | {each.psnr_db:.2f} | {each.equal_bytes / 1000:.1f} |"
        for each in encodings
    ]
    head = "| encoder | size | CPU ms a frame | ms a frame | frames/s | kB a frame | PSNR dB | kB at equal PSNR |"
    return [head, "|---|---|---|---|---|---|---|---|", *rows]
