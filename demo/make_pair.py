"""The demo pair: a clip of the avatar at rest and a spoken sentence, made from nothing but this code and flite's voice.

python -m demo.make_pair            # writes demo/media/avatar.mp4 and demo/media/speech.flac
"""

from __future__ import annotations

from demo import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped arguments are answered at once.
    arguments.none("make_pair", __doc__)

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from demo import speech
from demo.portrait import Portrait, Pose
from demo.visemes import SHUT

FPS = 25
MEDIA = Path(__file__).resolve().parent / "media"
AVATAR, SPEECH = MEDIA / "avatar.mp4", MEDIA / "speech.flac"
CLIP_S = 8.0
POSE_SEED = 7
SENTENCE = (
    "Hello, and welcome. I am the demo of this project. My face was drawn by a program, "
    "and a small model moves my lips to what you hear."
)
VOICE = "slt"


def natural_poses(n_frames: int, seed: int) -> list[Pose]:
    """A head that sways a little and blinks; begins and ends near rest, so that to-and-fro playing shows no jerk."""
    random = np.random.default_rng(seed)
    times = np.arange(n_frames) / FPS

    def sway(amount: float, slowest_s: float) -> NDArray[np.float64]:
        waves = [
            np.sin(2 * np.pi * times / (slowest_s * random.uniform(0.5, 1.0)) + random.uniform(0, 6.28)) * strength
            for strength in (1.0, 0.6, 0.35)
        ]
        return np.asarray(amount * np.sum(waves, axis=0), np.float64)

    roll, dx, dy, scale = sway(0.9, 6.0), sway(2.6, 7.0), sway(1.5, 5.0), 1 + sway(0.004, 6.5)
    blink = np.zeros(n_frames)
    place = random.uniform(1.0, 2.0)
    # Lids fall in two frames, rest one, and rise in four.
    shape = np.array([0.45, 0.95, 1.0, 0.8, 0.5, 0.22, 0.06])
    while place < n_frames / FPS - 0.5:
        first = int(place * FPS)
        blink[first : first + len(shape)] = shape[: n_frames - first]
        place += random.uniform(2.0, 4.2)
    looks = np.repeat(random.normal(0, 1, (n_frames // 30 + 2, 2)), 30, axis=0)[:n_frames] * (1.2, 0.5)
    return [
        Pose(
            roll_deg=float(roll[index]),
            dx=float(dx[index]),
            dy=float(dy[index]),
            scale=float(scale[index]),
            blink=float(blink[index]),
            gaze=(float(looks[index, 0]), float(looks[index, 1])),
        )
        for index in range(n_frames)
    ]


def write_clip(path: Path, frames: Sequence[NDArray[np.uint8]], *, crf: int = 16) -> None:
    """BGR frames as H.264 at 25 fps, with colours tagged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "slow"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        context = stream.codec_context
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1, 1
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="bgr24")
            container.mux(
                stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"))
            )
        container.mux(stream.encode())


def write_sound(path: Path, waveform: NDArray[np.float32]) -> None:
    """Sound at 16 kHz as FLAC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.clip(np.round(waveform * 32767), -32768, 32767).astype(np.int16)[None]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("flac", rate=speech.RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = speech.RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def resting_frames(portrait: Portrait, poses: Sequence[Pose]) -> list[NDArray[np.uint8]]:
    """The portrait in each pose with its mouth shut."""
    return [portrait.picture(SHUT, replace(pose)) for pose in poses]


def main() -> None:
    """Write both files."""
    poses = natural_poses(round(CLIP_S * FPS), POSE_SEED)
    write_clip(AVATAR, resting_frames(Portrait(), poses))
    spoken = speech.with_flite(SENTENCE, VOICE, 1.06)
    quiet = np.zeros(speech.RATE // 4, np.float32)
    waveform = np.concatenate([quiet, spoken.waveform * (0.6 / np.abs(spoken.waveform).max()), quiet])
    write_sound(SPEECH, waveform)
    for path in (AVATAR, SPEECH):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
