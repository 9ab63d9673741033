"""Evaluation of the demo model: figures on speech it was not trained on, through the worker's own pipeline.

    python -m demo.evaluate [--sheets FOLDER] [--human FILE]

The avatar is drawn at rest, the pipeline makes it speak, and a linear reader, fitted on true renders, measures the
mouth in each frame. The truth is the portrait drawn with the mouths of the phonemes.
"""

from __future__ import annotations

from demo import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped arguments are answered at once.
    arguments.evaluate(__doc__)

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from demo import speech
from demo.identity import Identity, random_identity
from demo.make_pair import FPS, MEDIA, natural_poses, write_clip, write_sound
from demo.portrait import Portrait, Pose
from demo.stages import MODELS
from demo.visemes import NAMES, SHUT, track
from musetalk.avatars import AvatarCache
from musetalk.media import EncoderSettings, MediaLimits, inspect_audio, read_waveform
from musetalk.models import Models, load_models
from musetalk.options import version_defaults
from musetalk.render import RenderSession

HELD_OUT_SOUND, HELD_OUT_MOUTHS = MEDIA / "held_out.flac", MEDIA / "held_out.json"
# Voices that training never heard, and sentences that make sense.
HELD_OUT = (
    ("flite", "kal", "The quick brown fox jumped over a lazy dog by the open barn door, and nobody saw him leave."),
    ("espeak", "en-us+m8", "People often move their mouths far more than they believe."),
)
# The window on the mouth, in face units: x0, y0, x1, y1, and its size in px.
_WINDOW, _WINDOW_PX = (-46.0, 64.0, 46.0, 128.0), (46, 32)
_RIDGE = 3.0
# What a test of every change can afford.
QUICK_FRAMES, QUICK_SILENCE_S = 100, 1.2

Frames = list[NDArray[np.uint8]]
FloatArray = NDArray[np.float64]


def make_held_out() -> None:
    """Speak the held-out sentences and keep sound and mouths; needs the speech programs."""
    waveforms, mouths = [], []
    for kind, voice, text in HELD_OUT:
        spoken = speech.with_flite(text, voice) if kind == "flite" else speech.with_espeak(text, voice)
        waveform = spoken.waveform * (0.6 / np.abs(spoken.waveform).max())
        # Whole frames, with a rest behind.
        n_samples = (int(len(waveform) / speech.RATE * FPS) + 8) * speech.RATE // FPS
        waveforms.append(np.pad(waveform, (0, n_samples - len(waveform))))
        mouths.append(track(spoken.phones, n_samples / speech.RATE))
    write_sound(HELD_OUT_SOUND, np.concatenate(waveforms))
    values = np.concatenate(mouths)
    framed = (values[0::2] + values[1::2]) / 2
    HELD_OUT_MOUTHS.write_text(json.dumps(np.round(framed, 3).tolist()), encoding="utf-8")


def window(
    picture: NDArray[np.uint8], portrait: Portrait, pose: Pose, size: tuple[int, int] = _WINDOW_PX
) -> FloatArray:
    """The mouth of a portrait in a known pose, upright and at one size, float (h, w, 3) 0..1."""
    placing = np.vstack([portrait.placing(pose), [0, 0, 1]])
    x0, y0, x1, y1 = _WINDOW
    to_face = np.array([[(x1 - x0) / size[0], 0, x0], [0, (y1 - y0) / size[1], y0], [0, 0, 1]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    seen = cv2.warpAffine(picture, (placing @ to_face)[:2], size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(seen, np.float64) / 255


@dataclass(frozen=True)
class Reader:
    """A ridge regression from the mouth's pixels to its five values, for one person."""

    portrait: Portrait
    mean: FloatArray
    weights: FloatArray
    offset: FloatArray

    def read(self, pictures: Sequence[NDArray[np.uint8]], poses: Sequence[Pose]) -> FloatArray:
        """Mouths (n, 5) of pictures in known poses."""
        windows = [window(picture, self.portrait, pose) for picture, pose in zip(pictures, poses, strict=True)]
        seen = np.stack(windows).reshape(len(windows), -1)
        values: FloatArray = (seen - self.mean) @ self.weights + self.offset
        return values


def fit_reader(portrait: Portrait, n_samples: int = 180, seed: int = 3) -> Reader:
    """Fit on true renders with mouths as speech has them."""
    random = np.random.default_rng(seed)
    poses = natural_poses(n_samples, seed)
    mouths = np.stack(
        [
            np.clip(random.beta(0.9, 1.6, n_samples) * 1.05, 0, 1),
            random.uniform(-1, 0.9, n_samples),
            random.choice([0.0, 0.0, 0.0, 1.0], n_samples) * random.uniform(0, 1, n_samples),
            random.choice([0.0, 0.5, 1.0], n_samples) * random.uniform(0, 1, n_samples),
            random.choice([0.0, 0.0, 1.0], n_samples) * random.uniform(0, 1, n_samples),
        ],
        axis=1,
    )
    mouths[: n_samples // 5] = 0
    seen = np.stack(
        [window(portrait.picture(m.tolist(), p), portrait, p).ravel() for m, p in zip(mouths, poses, strict=True)]
    )
    mean, offset = seen.mean(axis=0), mouths.mean(axis=0)
    centred = seen - mean
    inner = centred @ centred.T + _RIDGE * np.eye(n_samples)
    return Reader(portrait, mean, centred.T @ np.linalg.solve(inner, mouths - offset), offset)


@cache
def avatar_reader() -> Reader:
    """The avatar's reader, fitted once."""
    return fit_reader(Portrait())


@cache
def demo_models(models_dir: Path = MODELS) -> Models:
    """The bundle on the CPU."""
    return load_models(models_dir, "demo", device=torch.device("cpu"), dtype=torch.float32)


def read_frames(path: Path) -> Frames:
    """All frames of a video as BGR."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="bgr24").astype(np.uint8, copy=False) for frame in container.decode(video=0)]


def speak(
    models: Models, source: Path, audio: Path, output: Path, *, avatars: AvatarCache | None = None, **options: Any
) -> float:
    """The worker's own pipeline, with prepared sources if given; returns the seconds it took."""
    chosen = replace(version_defaults("demo"), **options)
    encoder = EncoderSettings(crf=12)
    begun = time.monotonic()
    with RenderSession(models, source, audio, output, chosen, encoder=encoder, avatars=avatars) as session:
        session.probe()
        session.prepare()
        session.generate()
        session.finish()
    return time.monotonic() - begun


def _held_out_sound() -> NDArray[np.float32]:
    limits = MediaLimits()
    return read_waveform(HELD_OUT_SOUND, inspect_audio(HELD_OUT_SOUND, limits), limits)


def similarity(first: FloatArray, second: FloatArray) -> float:
    """Structural similarity of two pictures 0..1 (Wang et al. 2004, Gaussian window of 1.5 px)."""

    def smooth(values: FloatArray) -> FloatArray:
        return np.asarray(cv2.GaussianBlur(values, (0, 0), 1.5), np.float64)

    mean_a, mean_b = smooth(first), smooth(second)
    var_a, var_b = smooth(first**2) - mean_a**2, smooth(second**2) - mean_b**2
    both = smooth(first * second) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mean_a * mean_b + c1) * (2 * both + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(score.mean())


def correlation(first: FloatArray, second: FloatArray) -> float:
    """Pearson's r."""
    return float(np.corrcoef(first, second)[0, 1])


def speech_figures(
    models: Models, folder: Path, identity: Identity | None = None, seed: int = 91, n_frames: int | None = None
) -> dict[str, float]:
    """Figures of one person (the avatar unless given) on the held-out speech, or its first frames."""
    portrait = Portrait(identity or Identity())
    true = np.asarray(json.loads(HELD_OUT_MOUTHS.read_text(encoding="utf-8")), np.float64)[:n_frames]
    sound = folder / "speech.flac"
    write_sound(sound, _held_out_sound()[: len(true) * speech.RATE // FPS])
    poses = natural_poses(len(true), seed)
    source, output = folder / f"source-{seed}.mp4", folder / f"spoken-{seed}.mp4"
    write_clip(source, [portrait.picture(SHUT, pose) for pose in poses], crf=8)
    seconds = speak(models, source, sound, output)
    made, still = read_frames(output), read_frames(source)
    reader = fit_reader(portrait) if identity else avatar_reader()
    read = reader.read(made, poses)
    opening, wanted = read[:, 0], true[:, 0]
    lags = {lag: correlation(np.roll(opening, -lag)[5:-5], wanted[5:-5]) for lag in range(-4, 5)}
    # Every third frame is enough for what is measured in pixels.
    some = range(0, len(true), 3)
    some_poses = [poses[index] for index in some]
    drawn = [portrait.picture(true[index].tolist(), poses[index]) for index in some]
    size = (92, 64)
    true_windows = [window(picture, portrait, pose, size) for picture, pose in zip(drawn, some_poses, strict=True)]
    figures: dict[str, float] = {}
    for name, pictures in (("spoken", made), ("untouched", still)):
        windows = [window(pictures[index], portrait, poses[index], size) for index in some]
        pairs = list(zip(windows, true_windows, strict=True))
        figures[f"{name}_l1"] = float(np.mean([np.abs(a - b).mean() for a, b in pairs]))
        figures[f"{name}_ssim"] = float(np.mean([similarity(a, b) for a, b in pairs]))
    outside = np.stack([made[index][:200].astype(np.float64) - still[index][:200] for index in some])
    return {
        **{f"{name}_r": correlation(read[:, index], true[:, index]) for index, name in enumerate(NAMES)},
        "best_lag_frames": max(lags, key=lambda lag: lags[lag]),
        "amplitude": float(opening.std() / wanted.std()),
        "shut_where_shut": float(opening[wanted < 0.05].mean()),
        "shifted_r": correlation(np.roll(opening, len(opening) // 2), wanted),
        "truth_shifted_r": correlation(np.roll(wanted, len(wanted) // 2), wanted),
        **figures,
        "outside_db": float(-10 * np.log10((outside**2).mean() / 255**2 + 1e-12)),
        "seconds_per_frame": seconds / len(made),
        "reader_r": correlation(reader.read(drawn, some_poses)[:, 0], wanted[list(some)]),
    }


def silence_figures(models: Models, folder: Path, seconds: float = 2.0) -> dict[str, float]:
    """Opening of the mouth in silence."""
    portrait = Portrait()
    poses = natural_poses(round(seconds * FPS), 17)
    source, quiet, output = folder / "quiet.mp4", folder / "quiet.flac", folder / "quiet-spoken.mp4"
    write_clip(source, [portrait.picture(SHUT, pose) for pose in poses], crf=8)
    write_sound(quiet, np.zeros(round(seconds * speech.RATE), np.float32))
    speak(models, source, quiet, output)
    opening = avatar_reader().read(read_frames(output), poses)[:, 0]
    return {"silent_opening": float(opening.mean()), "silent_spread": float(opening.std())}


def human_figures(models: Models, folder: Path, recording: Path, seconds: float = 10.0) -> dict[str, float]:
    """Correlation of the opening with the loudness of a human recording (its first seconds)."""
    with av.open(str(recording)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=speech.RATE)
        blocks = [part.to_ndarray()[0] for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    waveform = np.concatenate(blocks)[: round(seconds * speech.RATE)].astype(np.float32)
    portrait = Portrait()
    n_frames = len(waveform) * FPS // speech.RATE
    poses = natural_poses(n_frames, 23)
    source, sound, output = folder / "human.mp4", folder / "human.flac", folder / "human-spoken.mp4"
    write_clip(source, [portrait.picture(SHUT, pose) for pose in poses], crf=8)
    write_sound(sound, waveform)
    speak(models, source, sound, output)
    opening = fit_reader(portrait).read(read_frames(output)[:n_frames], poses)[:, 0]
    per_frame = speech.RATE // FPS
    loud = np.sqrt((waveform[: n_frames * per_frame].reshape(n_frames, per_frame) ** 2).mean(axis=1))
    envelope = np.convolve(loud, np.ones(3) / 3, mode="same").astype(np.float64)
    return {
        "human_envelope_r": correlation(opening, envelope),
        "human_sqrt_envelope_r": correlation(opening, envelope**0.5),
    }


def quick_figures(models_dir: Path = MODELS) -> dict[str, float]:
    """The figures a test looks at, on the shipped files alone and the first seconds of them."""
    models = demo_models(models_dir)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            **speech_figures(models, folder, n_frames=QUICK_FRAMES),
            **silence_figures(models, folder, seconds=QUICK_SILENCE_S),
        }


def sheet(frames: Frames, columns: int, size: int) -> NDArray[np.uint8]:
    """Frames side by side, `columns` a row."""
    small = [cv2.resize(frame, (size, round(size * frame.shape[0] / frame.shape[1]))) for frame in frames]
    rows = [np.hstack(small[i : i + columns]) for i in range(0, len(small) - columns + 1, columns)]
    return np.asarray(np.vstack(rows), np.uint8)


def main() -> None:
    """Print all figures as JSON; with --sheets also write contact sheets."""
    given = arguments.evaluate(__doc__)
    if given.make_held_out:
        make_held_out()
        return
    models = demo_models()
    with tempfile.TemporaryDirectory() as name:
        folder = given.sheets or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        figures: dict[str, Any] = {"avatar": {**speech_figures(models, folder), **silence_figures(models, folder)}}
        if given.human:
            figures["human"] = human_figures(models, folder, given.human)
        for number in range(given.strangers):
            person = random_identity(np.random.default_rng((21, number, False)))
            figures[f"stranger {number}"] = speech_figures(models, folder, person, seed=200 + number)
        for number, face in enumerate(given.faces):
            speak(models, face, HELD_OUT_SOUND, folder / f"face-{number}.mp4")
        if given.sheets:
            for video in sorted(folder.glob("*.mp4")):
                if "spoken" in video.name or video.name.startswith("face-"):
                    frames = read_frames(video)
                    cv2.imwrite(str(video.with_suffix(".png")), sheet(frames[20:140:6], 5, 300))
    rounded = {part: {key: round(value, 4) for key, value in values.items()} for part, values in figures.items()}
    print(json.dumps(rounded, indent=1))


if __name__ == "__main__":
    main()
