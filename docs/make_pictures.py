"""Draw the documents' pictures again: the demo model on the project's own portrait, nothing of anybody else.

.venv/bin/python -m docs.make_pictures [--folder docs/pictures]
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    _parser = argparse.ArgumentParser(prog="python -m docs.make_pictures", description="Draw the documents' pictures.")
    _parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent / "pictures")
    _GIVEN = _parser.parse_args()

import tempfile
import wave
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from benchmarks.detail import drawn
from demo.evaluate import read_frames
from demo.make_pair import AVATAR, SPEECH
from demo.stages import MODELS
from demo.texture import TexturedPortrait
from musetalk.blending import blend_mask, crop_for_parsing, face_mask
from musetalk.devices import choose_dtype
from musetalk.face_track import smooth_boxes
from musetalk.frames import planes_to_bgr
from musetalk.geometry import blend_box
from musetalk.models import Models, load_models
from musetalk.options import MaskMode, version_defaults
from musetalk.pasting import paste
from musetalk.render import RenderSession
from musetalk.restoration import Restorer, SteadyRestoration

Picture = NDArray[np.uint8]
# Of the avatar, in px: head and shoulders; and the mouth alone.
_HEAD = (slice(60, 420), slice(110, 402))
_MOUTH = (slice(225, 355), slice(175, 337))
_QUALITY = 85
# The animation: every second frame of the first four seconds, at half the pixels, so that it stays near 1 MB.
_ANIMATED = slice(0, 100, 2)
_ANIMATION_STEP_MS = 80
_ANIMATION_HEIGHT = 240
_ANIMATION_COLOURS = 128
_PINK = (180, 60, 255)


def render(models: Models, folder: Path, source: Path = AVATAR, audio: Path = SPEECH, **options: Any) -> list[Picture]:
    """All frames of the demo pair, or of other files, made with `options`."""
    output = folder / "out.mp4"
    with RenderSession(models, source, audio, output, replace(version_defaults("demo"), **options)) as session:
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


def save_animation(folder: Path, name: str, pictures: list[Picture]) -> None:
    """Write a GIF that repeats, with one palette for all frames, and say how large it is."""
    # Lips cover few pixels: a palette of one whole frame would paint them grey, so it sees the lower right of all.
    height, width = pictures[0].shape[:2]
    mouth = (slice(round(0.62 * height), round(0.8 * height)), slice(round(0.67 * width), round(0.83 * width)))
    sample = np.vstack([pictures[0].reshape(-1, 3), *(picture[mouth].reshape(-1, 3) for picture in pictures)])
    palette = _image(sample[None]).quantize(_ANIMATION_COLOURS, method=Image.Quantize.MEDIANCUT)
    first, *others = [_image(picture).quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    path = folder / f"{name}.gif"
    first.save(path, save_all=True, append_images=others, duration=_ANIMATION_STEP_MS, loop=0, optimize=True)
    print(f"{path.name}: {first.width} x {first.height}, {path.stat().st_size / 1024:.0f} KB")


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture[..., ::-1]))


def liveliest(frames: list[Picture], count: int) -> list[int]:
    """Frames with the most different mouths, in order of time: each the farthest from those chosen before."""
    mouths = np.stack([cv2.resize(frame[_MOUTH], (24, 20)).astype(np.float32).ravel() for frame in frames])
    chosen = [0]
    distance = np.linalg.norm(mouths - mouths[0], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(mouths - mouths[chosen[-1]], axis=1))
    return sorted(chosen)


def main(folder: Path) -> None:
    """Make every picture, in `folder`."""
    folder.mkdir(exist_ok=True)
    # In the precision a worker would choose here.
    device = torch.device("cpu")
    models = load_models(MODELS, "demo", device=device, dtype=choose_dtype("auto", device)[0])
    with tempfile.TemporaryDirectory() as name:
        usual = render(models, Path(name))
        source = [np.asarray(frame, np.uint8) for frame in read_frames(AVATAR)]
        picks = liveliest(usual, 6)
        save(folder, "speaking", row([usual[pick][_HEAD] for pick in picks], 200))
        pairs = list(zip(source, usual, strict=False))[_ANIMATED]
        save_animation(
            folder, "demo", [row([before[_HEAD], after[_HEAD]], _ANIMATION_HEIGHT) for before, after in pairs]
        )
        widest = max(picks, key=lambda pick: float(np.abs(usual[pick][_MOUTH].astype(int) - source[0][_MOUTH]).mean()))
        for title, choices in _COMPARED.items():
            shown = [source[min(widest, len(source) - 1)][_MOUTH]]
            shown += [render(models, Path(name), **options)[widest][_MOUTH] for options in choices]
            save(folder, title, row(shown, 170))
        save(folder, "preview", compare_preview(models, source[min(widest, len(source) - 1)], Fraction(widest, 25)))
        save(folder, "cheeks", compare_cheeks(models, source[0]))
        save(folder, "smoothing", compare_smoothing(models, source[0]))
        detail, restore = compare_detail(models, Path(name))
        cv2.imwrite(str(folder / "detail.png"), detail)
        cv2.imwrite(str(folder / "restore.png"), restore)
        save(folder, "silence", compare_silence(models, Path(name)))
        save(folder, "loop", compare_loops(models, Path(name)))


def compare_preview(models: Models, frame: Picture, time_s: Fraction) -> Picture:
    """The source's frame at a time, and the preview of the output's."""
    with RenderSession(models, AVATAR, SPEECH, None, version_defaults("demo")) as session:
        session.probe()
        session.prepare(preview_s=float(time_s))
        preview = session.preview(float(time_s))
    made = planes_to_bgr(preview.planes, preview.matrix)
    return row([frame[_HEAD], made[_HEAD]], 240)


def compare_cheeks(models: Models, frame: Picture) -> Picture:
    """The frame, and in pink what would be redrawn of it: three cheek widths with `jaw`, then `raw`."""
    (face,) = models.faces.find([frame])
    assert face is not None
    margin = round(version_defaults("demo").margin_share * face.box.height)
    box = face.box.with_bottom_margin(margin, len(frame))
    around = blend_box(box)
    (labels,) = models.parser.labels([crop_for_parsing(frame, around)])
    part = (slice(150, 400), slice(130, 382))
    shown = [frame[part]]
    choices: list[tuple[MaskMode, int]] = [("jaw", 40), ("jaw", 90), ("jaw", 130), ("raw", 90)]
    for mode, cheek in choices:
        weights = np.zeros(frame.shape[:2], np.float32)
        mask = blend_mask(face_mask(labels, mode, cheek, cheek), box, around).astype(np.float32) / 255
        inside = around.clipped(frame.shape[1], frame.shape[0])
        seen = inside.shifted(-around.x0, -around.y0)
        weights[inside.y0 : inside.y1, inside.x0 : inside.x1] = mask[seen.y0 : seen.y1, seen.x0 : seen.x1]
        shown.append(tinted(frame, weights)[part])
    return row(shown, 190)


def tinted(frame: Picture, weights: NDArray[np.float32]) -> Picture:
    """`frame` with pink over it where the weights are 1."""
    share = 0.65 * weights[..., None]
    return np.asarray(frame * (1 - share) + share * np.asarray(_PINK), np.uint8)


def compare_smoothing(models: Models, frame: Picture) -> Picture:
    """A still face under a noisy camera: the chin's column of each frame, and the box's lower edge over it."""
    random = np.random.default_rng(1)

    def noisy() -> Picture:
        noise = cv2.GaussianBlur(random.normal(0, 45, frame.shape), (0, 0), 1.5)
        return np.asarray(np.clip(frame + noise, 0, 255), np.uint8)

    frames = [noisy() for _ in range(60)]
    found = models.faces.find(frames)
    top, bottom, wide, high = 335, 375, 8, 5
    columns = np.stack([picture[top:bottom, 254:259].mean(axis=1) for picture in frames], 1).astype(np.uint8)
    panels = []
    for sigma in (0.0, 2.0):
        panel = cv2.resize(columns, (wide * len(frames), high * (bottom - top)), interpolation=cv2.INTER_NEAREST)
        edges = [
            (wide * index + wide // 2, high * (face.box.y1 - top))
            for index, face in enumerate(smooth_boxes(found, sigma))
            if face is not None
        ]
        cv2.polylines(panel, [np.array(edges, np.int32)], False, _PINK, 3, cv2.LINE_AA)
        panels.append(np.asarray(panel, np.uint8))
    return row(panels, len(panels[0]))


def noisy_pause(folder: Path) -> Path:
    """Two seconds of the sentence, then two of a quiet murmur below speech."""
    with av.open(str(SPEECH)) as container:
        rate = container.streams.audio[0].rate
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    samples: NDArray[Any] = np.concatenate(parts)
    voice = samples.astype(np.float32) / (np.iinfo(samples.dtype).max if samples.dtype.kind == "i" else 1)
    spoken = voice[: 2 * rate]
    murmur = 0.05 * voice[2 * rate : 4 * rate]
    sound = np.concatenate([spoken, murmur])
    path = folder / "pause.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((sound * 32767).astype("<i2").tobytes())
    return path


def compare_detail(models: Models, folder: Path) -> tuple[Picture, Picture]:
    """A freckled, unshaven portrait at 1:1: the source, without and with detail; without, restored, and both."""
    *_, shot = drawn(TexturedPortrait(), 12, folder, models)
    restored = SteadyRestoration(sharpener(), 1.0)(torch.from_numpy(shot.patch[None])).numpy()[0]
    box = shot.plan.box
    middle = (box.x0 + box.x1) // 2
    part = slice(box.y1 - 250, box.y1 - 10), slice(middle - 140, middle + 140)

    def shown(patch: Picture | None, strength: float) -> Picture:
        planes = shot.source.copy()
        if patch is not None:
            paste(planes, shot.plan, patch, "bt709", strength)
        return planes_to_bgr(planes, "bt709")[part]

    plain, detailed = shown(shot.patch, 0), shown(shot.patch, 1)
    return (
        row([shown(None, 0), plain, detailed], 240),
        row([plain, shown(restored, 0), shown(restored, 1)], 240),
    )


def sharpener() -> Restorer:
    """A stand-in for a restorer: it doubles the size and strengthens edges, and knows nothing of faces."""

    def network(pictures: torch.Tensor) -> torch.Tensor:
        larger = functional.interpolate(pictures, scale_factor=2, mode="bicubic")
        soft = functional.avg_pool2d(functional.pad(larger, (3, 3, 3, 3), mode="replicate"), 7, 1)
        return larger + 0.8 * (larger - soft)

    return Restorer("sharpener", network, lambda side: side, torch.device("cpu"))


def compare_silence(models: Models, folder: Path) -> Picture:
    """A source that talks: three moments of one pause below each other, in the source and with each setting."""
    talking = folder / "talking.mp4"
    render(models, folder)
    (folder / "out.mp4").rename(talking)
    source = [np.asarray(frame, np.uint8) for frame in read_frames(talking)]
    audio = noisy_pause(folder)
    made = {
        name: render(models, folder, source=talking, audio=audio, silence=name, batch_size=4)
        for name in ("generate", "closed", "source")
    }
    pause = range(60, 95)
    moments = [pause[index] for index in liveliest([source[at] for at in pause], 3)]
    lines = [row([source[at][_MOUTH], *(frames[at][_MOUTH] for frames in made.values())], 130) for at in moments]
    gap = np.full((6, lines[0].shape[1], 3), 255, np.uint8)
    return np.asarray(np.vstack([lines[0], gap, lines[1], gap, lines[2]]), np.uint8)


def compare_loops(models: Models, folder: Path) -> Picture:
    """A row for each mode: frames on both sides of the end of a source of one second."""
    short = folder / "short.mp4"
    with av.open(str(AVATAR)) as given, av.open(str(short), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 512, 512, "yuv420p"
        # The head turns fast enough there to distinguish one way from the other.
        for index, frame in enumerate(given.decode(video=0)):
            if index % 6 == 0 and index < 150:
                picture = frame.reformat(format="yuv420p")
                picture.pts, picture.time_base = index // 6, Fraction(1, 25)
                container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    lines = []
    for mode in ("ping_pong", "loop", "hold"):
        frames = render(models, folder, source=short, audio=noisy_pause(folder), loop_mode=mode)
        lines.append(row([frames[at][_HEAD] for at in (15, 20, 24, 25, 29, 34)], 120))
    gap = np.full((6, lines[0].shape[1], 3), 255, np.uint8)
    return np.asarray(np.vstack([lines[0], gap, lines[1], gap, lines[2]]), np.uint8)


# The source first, then each of these.
_COMPARED: dict[str, list[dict[str, Any]]] = {
    "margin": [{"margin_share": 0.0}, {}, {"margin_share": 0.25}],
}


if __name__ == "__main__":
    main(_GIVEN.folder)
