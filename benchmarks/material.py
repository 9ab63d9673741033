"""Clips and sound made for the benchmarks: a head that moves before a wall, and bursts of noise like speech."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from musetalk import media
from musetalk.frames import BT709, Planes, UInt8Array, bgr_to_planes
from musetalk.geometry import Box

RATE = Fraction(25)
AUDIO_RATE = 16_000


def make_clip(path: Path, size: tuple[int, int], face: tuple[int, int], n_frames: int) -> None:
    """An H.264 clip like a camera's: a textured background that pans slowly behind a moving head."""
    with media.VideoWriter(
        path,
        width=size[0],
        height=size[1],
        rate=RATE,
        colour=BT709,
        n_frames=n_frames,
        audio_path=None,
        audio_duration=Fraction(0),
        settings=media.EncoderSettings(crf=18),
    ) as writer:
        for planes in camera_frames(size, face, n_frames):
            writer.write(planes)
        writer.close()


def camera_frames(size: tuple[int, int], face: tuple[int, int], n_frames: int) -> Iterator[Planes]:
    """The pictures of `make_clip`; everything moves by fractions of a pixel, so that no block is simply repeated."""
    margin = 64
    ground = bgr_to_planes(background(size[0] + 2 * margin, size[1] + 2 * margin), "bt709")
    picture, opacity = head(face)
    blob, luma = bgr_to_planes(picture, "bt709"), opacity
    chroma = cv2.resize(opacity, (opacity.shape[1] // 2, opacity.shape[0] // 2), interpolation=cv2.INTER_AREA)
    left, top = (size[0] - picture.shape[1]) / 2, (size[1] - picture.shape[0]) / 2
    for index in range(n_frames):
        pan_x, pan_y = 48 * np.sin(index / 60), 24 * np.sin(index / 85)
        head_x, head_y = left + 6 * np.sin(index / 9), top + 4 * np.sin(index / 7)
        made = []
        pairs = ((ground.y, blob.y, luma, 1), (ground.u, blob.u, chroma, 2), (ground.v, blob.v, chroma, 2))
        for plane, over, weight, step in pairs:
            target = (size[0] // step, size[1] // step)
            behind = _moved(plane, (pan_x - margin) / step, (pan_y - margin) / step, target)
            alpha = _moved(weight, head_x / step, head_y / step, target).astype(np.float32) / 255
            front = _moved(over, head_x / step, head_y / step, target)
            made.append(np.asarray(cv2.blendLinear(front, behind, alpha, 1 - alpha), np.uint8))
        yield Planes(*made)


def _moved(plane: NDArray[Any], dx: float, dy: float, size: tuple[int, int]) -> UInt8Array:
    """`plane` shifted right and down by (dx, dy) px, as `size` px; black where nothing comes to lie."""
    shift = np.array([[1, 0, dx], [0, 1, dy]], np.float64)
    return np.asarray(cv2.warpAffine(plane, shift, size, flags=cv2.INTER_LINEAR), np.uint8)


def background(width: int, height: int) -> UInt8Array:
    """A lit wall, BGR uint8 (height, width, 3): gradients, soft noise of several sizes and fine grain."""
    rng = np.random.default_rng(1)
    x, y = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    picture = np.array([90.0, 110.0, 120.0]) + 70 * x * np.array([0.8, 1.0, 1.1]) - 45 * y
    for sigma, strength in ((40.0, 22.0), (8.0, 9.0), (1.2, 4.0)):
        noise = cv2.GaussianBlur(rng.normal(0, 1, (height, width, 3)).astype(np.float32), (0, 0), sigma)
        # Mostly light and shade, the same in all three, as surfaces have it; colour varies a quarter as much.
        noise = noise[..., :1] + 0.25 * noise
        picture = picture + strength * noise / noise.std()
    return np.asarray(np.clip(picture, 0, 255), np.uint8)


def head(face: tuple[int, int]) -> tuple[UInt8Array, UInt8Array]:
    """A head for a face of `face` px: BGR uint8 (h, w, 3) of even size and its opacity (h, w)."""
    width, height = (int(side * 1.4) // 2 * 2 for side in face)
    rng = np.random.default_rng(2)
    shade = 30 * np.cos(np.linspace(-1.4, 1.4, width))[None, :, None]
    skin = cv2.GaussianBlur(rng.normal(0, 1, (height, width, 3)).astype(np.float32), (0, 0), 1.2)
    picture = np.ascontiguousarray(np.array([110.0, 140.0, 190.0]) + shade + 5 * skin / skin.std())
    middle = (width // 2, height // 2)
    for side in (-1, 1):
        eye = (middle[0] + side * face[0] // 5, middle[1] - face[1] // 8)
        cv2.ellipse(picture, eye, (face[0] // 11, face[1] // 22), 0, 0, 360, (60, 60, 70), -1)
    cv2.ellipse(
        picture, (middle[0], middle[1] + face[1] // 4), (face[0] // 6, face[1] // 24), 0, 0, 360, (70, 60, 150), -1
    )
    opacity = np.zeros((height, width), np.uint8)
    cv2.ellipse(opacity, middle, (int(face[0] * 0.52), int(face[1] * 0.66)), 0, 0, 360, 255, -1)
    return np.clip(picture, 0, 255).astype(np.uint8), np.asarray(cv2.GaussianBlur(opacity, (0, 0), 2), np.uint8)


def make_audio(path: Path, duration: Fraction) -> None:
    """Speech-like bursts of noise, mono 16 kHz, as WAV."""
    n_samples = int(duration * AUDIO_RATE)
    rng = np.random.default_rng(3)
    at = np.arange(n_samples) / AUDIO_RATE
    envelope = np.clip(np.sin(2 * np.pi * 3.1 * at), 0, 1) * (np.sin(2 * np.pi * 0.4 * at) > -0.5)
    samples = (np.clip(rng.normal(0, 0.15, n_samples) * envelope, -1, 1) * 32767).astype(np.int16)
    with av.open(str(path), "w", format="wav") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=AUDIO_RATE)
        stream.codec_context.layout = "mono"
        for start in range(0, n_samples, 4096):
            block = samples[None, start : start + 4096]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="s16", layout="mono")
            frame.sample_rate, frame.pts = AUDIO_RATE, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def centred_box(size: tuple[int, int], face: tuple[int, int]) -> Box:
    """A face box of `face` px in the middle of a frame of `size` px."""
    left, top = (size[0] - face[0]) // 2, (size[1] - face[1]) // 2
    return Box(left, top, left + face[0], top + face[1])
