"""Draws the documents' pictures anew: the demo model on the project's own portrait, nothing of anybody else.

.venv/bin/python -m docs.make_pictures [--folder docs/pictures]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from demo.evaluate import demo_models, read_frames
from demo.make_pair import AVATAR, SPEECH
from musetalk.models import Models
from musetalk.options import version_defaults
from musetalk.render import RenderSession

Picture = NDArray[np.uint8]
# Of the avatar, in px: head and shoulders; and the mouth alone.
_HEAD = (slice(60, 420), slice(110, 402))
_MOUTH = (slice(225, 355), slice(175, 337))
_QUALITY = 85


def render(models: Models, folder: Path, **options: Any) -> list[Picture]:
    """All frames of the demo pair, made with `options`."""
    output = folder / "out.mp4"
    with RenderSession(models, AVATAR, SPEECH, output, replace(version_defaults("demo"), **options)) as session:
        session.probe()
        session.prepare()
        session.generate()
        session.finish()
    return [np.asarray(frame, np.uint8) for frame in read_frames(output)]


def row(pictures: list[Picture], height: int) -> Picture:
    """Pictures side by side, each scaled to `height` px."""
    scaled = [
        cv2.resize(part, (round(part.shape[1] * height / part.shape[0]), height), interpolation=cv2.INTER_AREA)
        for part in pictures
    ]
    gap = np.full((height, 6, 3), 255, np.uint8)
    parts = [scaled[0]]
    for part in scaled[1:]:
        parts += [gap, np.asarray(part, np.uint8)]
    return np.asarray(np.hstack(parts), np.uint8)


def save(folder: Path, name: str, picture: Picture) -> None:
    """Write a JPEG and say how large it is."""
    path = folder / f"{name}.jpg"
    cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    print(f"{path.name}: {picture.shape[1]} x {picture.shape[0]}, {path.stat().st_size / 1024:.0f} KB")


def liveliest(frames: list[Picture], count: int) -> list[int]:
    """Frames with the most different mouths, in order of time: each the farthest from those chosen before."""
    mouths = np.stack([cv2.resize(frame[_MOUTH], (24, 20)).astype(np.float32).ravel() for frame in frames])
    chosen = [0]
    distance = np.linalg.norm(mouths - mouths[0], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(mouths - mouths[chosen[-1]], axis=1))
    return sorted(chosen)


def main() -> None:
    """Make every picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent / "pictures")
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    models = demo_models()
    with tempfile.TemporaryDirectory() as name:
        usual = render(models, Path(name))
        source = [np.asarray(frame, np.uint8) for frame in read_frames(AVATAR)]
        picks = liveliest(usual, 6)
        save(folder, "speaking", row([usual[pick][_HEAD] for pick in picks], 200))
        widest = max(picks, key=lambda pick: float(np.abs(usual[pick][_MOUTH].astype(int) - source[0][_MOUTH]).mean()))
        for title, choices in _COMPARED.items():
            shown = [source[min(widest, len(source) - 1)][_MOUTH]]
            shown += [render(models, Path(name), **options)[widest][_MOUTH] for options in choices]
            save(folder, title, row(shown, 170))


# The source first, then each of these.
_COMPARED: dict[str, list[dict[str, Any]]] = {
    "margin": [{"margin_share": 0.0}, {}, {"margin_share": 0.25}],
}


if __name__ == "__main__":
    main()
