"""Fine detail under the patch: how much comes back, what it does to mouth and flicker, and what it costs.

    .venv/bin/python -m benchmarks.detail [--frames 40] [--clips FILE ...] [--json FILE]

Two drawn people with pores, freckles and stubble (one with the demo model's patches, one with a stand-in), and the
faces of any clips given. A stand-in patch is as soft as a network's: the true picture reduced to 256 px, softened,
shifted by half a pixel and a little brighter. Energy is that of the band of 2 to 8 px, inside the mask and away from
the mouth, over that of a ring of the face around it. Mouth error is the mean difference from the true picture, flicker
the mean change of the band from frame to frame inside the mask. The line "not rounded" has the flicker of the same
levels before they become whole numbers.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.detail(__doc__)

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from demo.evaluate import HELD_OUT_MOUTHS, HELD_OUT_SOUND
from demo.identity import Identity, random_identity
from demo.make_pair import natural_poses, write_clip
from demo.portrait import Portrait
from demo.stages import MODELS
from demo.texture import TexturedPortrait
from demo.visemes import SHUT
from musetalk import media
from musetalk.audio import audio_windows
from musetalk.batches import Batches
from musetalk.blending import PastePlan, blend_mask, face_mask, match_colours, paste_planes, patch_planes
from musetalk.detail import FloatImage, agreement, enlarged_planes, is_enlarged, paste_detailed, plan_detail
from musetalk.frames import Planes, UInt8Array, bgr_to_planes, planes_to_bgr
from musetalk.generator import crop_patch
from musetalk.geometry import Box, blend_box
from musetalk.models import Models, load_models
from musetalk.options import version_defaults
from musetalk.preparing import SourcePreparer

_ZOOM = np.array([[2.0, 0, 0], [0, 2.0, 0]])
_SIZE = (1024, 1024)
_PATCH_PX = 256
# Where the mouth is in a crop box, in shares of its sides.
_MOUTH = (0.28, 0.62, 0.72, 0.9)
_RING = 0.06


@dataclass(frozen=True)
class Shot:
    """A source frame, its patch, where it is pasted, and the picture it should be (None: nobody knows)."""

    source: Planes
    patch: UInt8Array
    plan: PastePlan
    truth: Planes | None


def drawn(portrait: Portrait, n_frames: int, folder: Path, models: Models | None) -> Iterator[Shot]:
    """A drawn person at rest and speaking; patches by the model, or stand-ins of the truth."""
    mouths = json.loads(HELD_OUT_MOUTHS.read_text(encoding="utf-8"))[:n_frames]
    poses = natural_poses(n_frames, 31)
    rest = [portrait.picture(SHUT, pose, _ZOOM, _SIZE) for pose in poses]
    true = [portrait.picture(mouth, pose, _ZOOM, _SIZE) for mouth, pose in zip(mouths, poses, strict=True)]
    if models is not None:
        clip = folder / "rest.mp4"
        write_clip(clip, rest, crf=1)
        for shot, picture in zip(spoken(clip, models, n_frames), true, strict=True):
            yield Shot(shot.source, shot.patch, shot.plan, bgr_to_planes(picture, "bt709"))
        return
    for pose, before, after in zip(poses, rest, true, strict=True):
        points = 2 * portrait.contour(pose)
        top = 2 * points[2, 1] - points[3, 1]
        edges = (points[0, 0], top, points[1, 0], points[3, 1] + 0.04 * (points[3, 1] - top))
        box = Box(*(round(float(edge)) for edge in edges))
        yield Shot(bgr_to_planes(before, "bt709"), stand_in(after, box), oval(box), bgr_to_planes(after, "bt709"))


def spoken(clip: Path, models: Models, n_frames: int) -> Iterator[Shot]:
    """The worker's own preparation and patches of a clip on the held-out speech."""
    limits = media.MediaLimits()
    info, sound = media.probe_both(clip, HELD_OUT_SOUND, limits)
    preparer = SourcePreparer(models, clip, info, version_defaults("demo"), limits, Batches(8))
    preparer.find_faces(n_frames, lambda: False)
    features = models.audio.features(media.read_waveform(HELD_OUT_SOUND, sound, limits))
    for index in range(n_frames):
        record, _ = preparer.output_frame(index)
        if (face := record.face) is None:
            continue
        windows = audio_windows(features, index, 1, Fraction(info.rate))
        (patch,) = models.generator.generate(torch.from_numpy(face.latents[None]), windows)
        patch = patch if face.band is None else match_colours(patch, face.band)
        yield Shot(record.planes, patch, face.plan, None)


def of_clip(clip: Path, models: Models, n_frames: int) -> Iterator[Shot]:
    """A clip with stand-in patches of its own frames: nothing moves, only softness is to be undone."""
    limits = media.MediaLimits()
    info = media.inspect_source(clip, limits)
    for frame in islice(media.read_source(clip, info, limits, max_frames=n_frames), n_frames):
        picture = planes_to_bgr(frame.planes, info.colour.matrix)
        (face,) = models.faces.find([picture])
        if face is not None:
            box = face.box.with_bottom_margin(10, frame.planes.height)
            yield Shot(frame.planes, stand_in(picture, box), oval(box, frame.planes), frame.planes)


def stand_in(picture: UInt8Array, box: Box) -> UInt8Array:
    """The picture's crop as soft as a network's patch: BGR uint8 (256, 256, 3)."""
    small = cv2.GaussianBlur(crop_patch(picture, box, _PATCH_PX), (0, 0), 1.0)
    moved = cv2.warpAffine(
        small, np.array([[1, 0, 0.5], [0, 1, 0.4]]), (_PATCH_PX, _PATCH_PX), borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(np.clip(moved.astype(np.int16) + 2, 0, 255), np.uint8)


def oval(box: Box, planes: Planes | None = None) -> PastePlan:
    """The paste of a face whose skin is an oval, by the official version's mask."""
    labels = np.zeros((512, 512), np.uint8)
    cv2.ellipse(labels, (256, 256), (150, 172), 0, 0, 360, 1, -1)
    around = blend_box(box)
    width, height = (planes.width, planes.height) if planes is not None else _SIZE
    return PastePlan.prepare(blend_mask(face_mask(labels, "jaw"), box, around), box, around, width, height)


# -- figures ----------------------------------------------------------------------------------------------------------


def band(luma: UInt8Array | FloatImage) -> FloatImage:
    """The band of 2 to 8 px of a picture."""
    picture = luma.astype(np.float32)
    return np.asarray(picture - cv2.blur(cv2.blur(picture, (7, 7)), (7, 7)), np.float32)


def zones(shot: Shot) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Pixels that are all patch and away from the mouth, a ring around the mask inside the face, and the mouth."""
    box, region = shot.plan.box, shot.plan.region
    weights = np.zeros(shot.source.y.shape, np.uint8)
    weights[region.y0 : region.y1, region.x0 : region.x1] = shot.plan.luma
    mouth = np.zeros(weights.shape, bool)
    x0, y0, x1, y1 = (
        int(start + share * size)
        for share, start, size in zip(_MOUTH, (box.x0, box.y0) * 2, (box.width, box.height) * 2, strict=True)
    )
    mouth[y0:y1, x0:x1] = True
    # Beside and above the mask but inside the box, and above the jaw, where the face is.
    near = cv2.dilate(weights, np.ones((round(_RING * box.width) | 1,) * 2, np.uint8)) > 0
    face = np.zeros(weights.shape, bool)
    face[box.y0 : int(box.y0 + 0.66 * box.height), box.x0 + box.width // 12 : box.x1 - box.width // 12] = True
    return (weights > 250) & ~mouth & face, near & (weights == 0) & face, mouth & (weights > 250)


def not_rounded(shot: Shot) -> FloatImage:
    """Luma (h, w) with detail, in float32 from the patch to the end."""
    plan, source = shot.plan, shot.source
    sizes = plan_detail(plan, _PATCH_PX, source.width, source.height)
    if is_enlarged(plan, _PATCH_PX):
        new = enlarged_planes(shot.patch, plan, "bt709")[0]
    else:
        new = patch_planes(source, plan, shot.patch, "bt709").y.astype(np.float32)
    old = source.region(plan.region).y.astype(np.float32)
    high, weight = agreement(old - new, sizes)
    luma, share = source.y.astype(np.float32), plan.luma.astype(np.float32) / 255
    luma[plan.region.y0 : plan.region.y1, plan.region.x0 : plan.region.x1] += share * (new + weight * high - old)
    return luma


def figures(shots: list[Shot]) -> dict[str, dict[str, float]]:
    """Energy, error and flicker of the source, of the picture it should be, and of the result without and with detail.

    The truth has a line of its own where it is another picture than the source, because the mouth speaks.
    """
    made: dict[str, list[Planes]] = {"source": [shot.source for shot in shots], "without": [], "with": []}
    truths = [shot.truth for shot in shots if shot.truth is not None and shot.truth is not shot.source]
    if len(truths) == len(shots):
        made["truth"] = truths
    for shot in shots:
        for name, strength in (("without", 0.0), ("with", 1.0)):
            planes = shot.source.copy()
            if strength:
                paste_detailed(planes, shot.plan, shot.patch, "bt709", strength)
            else:
                paste_planes(planes, shot.plan, shot.patch, "bt709")
            made[name].append(planes)
    lumas: dict[str, Sequence[UInt8Array | FloatImage]] = {
        name: [planes.y for planes in pictures] for name, pictures in made.items()
    }
    lumas["not rounded"] = [not_rounded(shot) for shot in shots]
    table = {}
    for name, of_row in lumas.items():
        energies, errors, changes = [], [], []
        previous: FloatImage | None = None
        for shot, luma in zip(shots, of_row, strict=True):
            inside, ring, mouth = zones(shot)
            fine = band(luma)
            energies.append(float((fine[inside] ** 2).mean() / (fine[ring] ** 2).mean()))
            if shot.truth is not None:
                errors.append(float(np.abs(luma[mouth].astype(float) - shot.truth.y[mouth]).mean()))
            if previous is not None:
                changes.append(float(np.abs(fine - previous)[inside].mean()))
            previous = fine
        table[name] = {
            "energy": statistics.mean(energies),
            "mouth_error": statistics.mean(errors) if errors else float("nan"),
            "flicker": statistics.mean(changes),
        }
    return table


def milliseconds(width: int) -> tuple[float, float]:
    """Median milliseconds of a paste into a 1080p frame, without and with detail, for a face box `width` px wide."""
    random = np.random.default_rng(0)
    frame = bgr_to_planes(random.integers(0, 256, (1080, 1920, 3), np.uint8), "bt709")
    patch = random.integers(0, 256, (_PATCH_PX, _PATCH_PX, 3), np.uint8)
    plan = oval(Box(700, 100, 700 + width, 100 + width * 6 // 5), frame)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(100):
        for times, strength in zip(taken, (0.0, 1.0), strict=True):
            # CPU time of this thread: other processes of the machine do not count.
            started = time.thread_time()
            if strength:
                paste_detailed(frame, plan, patch, "bt709", strength)
            else:
                paste_planes(frame, plan, patch, "bt709")
            times.append(1000 * (time.thread_time() - started))
    return statistics.median(taken[0]), statistics.median(taken[1])


def main() -> None:
    """Print the table."""
    given = arguments.detail(__doc__)
    cv2.setNumThreads(1)
    models = load_models(MODELS, "demo", device=torch.device("cpu"), dtype=torch.float32)
    stranger = random_identity(np.random.default_rng(4))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = {
            "demo portrait, demo model": list(drawn(TexturedPortrait(Identity()), given.frames, folder, models)),
            "another drawn person, stand-in": list(drawn(TexturedPortrait(stranger), given.frames, folder, None)),
        }
    for number, clip in enumerate(given.clips):
        cases[f"clip {number + 1}, stand-in"] = list(of_clip(clip, models, given.frames))
    results = {name: figures(shots) for name, shots in cases.items()}
    print(f"{'':32} {'':11} {'energy':>8} {'mouth error':>12} {'flicker':>8}")
    for name, table in results.items():
        for row, numbers in table.items():
            energy, error, flicker = (numbers[key] for key in ("energy", "mouth_error", "flicker"))
            print(f"{name:32} {row:11} {energy:8.2f} {error:12.2f} {flicker:8.3f}")
    timings = {width: milliseconds(width) for width in (250, 320, 400)}
    for width, (plain, detailed) in timings.items():
        print(f"face of {width} px in 1080p: {plain:.2f} ms a paste, {detailed:.2f} ms with detail")
    if given.json:
        given.json.write_text(json.dumps({"figures": results, "milliseconds": timings}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
