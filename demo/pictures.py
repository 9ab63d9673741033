"""Stage `pictures`: crops of drawn people with a shut mouth and with others, cut as the worker cuts them.

Each pose gives one reference (shut) and several targets; the box is MuseTalk's rule on the portrait's own points,
shaken a little, because a landmark finder is never quite right.
"""

from __future__ import annotations

from demo import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped arguments are answered at once.
    arguments.none("pictures", __doc__)

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from demo.encoder import corpus
from demo.identity import Identity, random_identity
from demo.portrait import Portrait, Pose
from demo.stages import BUILD
from demo.visemes import SHUT
from musetalk.generator import crop_patch
from musetalk.geometry import Box

SEED = 21
CROP_PX = 192
# Rows added below the chin, as a share of the box's height: room for the jaw to drop.
MARGIN_SHARE = 0.107
N_AVATAR_POSES, N_AVATAR_MOUTHS = 640, 6
N_OTHERS, N_OTHER_POSES, N_OTHER_MOUTHS = 40, 6, 4
# The first of these are never trained on.
N_HELD_OUT_OTHERS = 4

UInt8Array = NDArray[np.uint8]


@dataclass(frozen=True)
class Pictures:
    """Crops uint8 (n, 192, 192, 3) BGR, mouths float32 (n, 5), and each crop's reference as an index into them."""

    crops: UInt8Array
    mouths: NDArray[np.float32]
    reference: NDArray[np.int64]
    person: NDArray[np.int64]


def random_pose(random: np.random.Generator) -> Pose:
    """A slightly different pose and light."""
    return Pose(
        roll_deg=float(random.normal(0, 2.2)),
        dx=float(random.normal(0, 6)),
        dy=float(random.normal(0, 5)),
        scale=float(random.uniform(0.94, 1.06)),
        blink=float(random.choice([0, 0, 0, 0.5, 1])),
        gaze=(float(random.normal(0, 1)), float(random.normal(0, 0.6))),
        light=float(random.uniform(0.94, 1.04)),
    )


def random_box(portrait: Portrait, pose: Pose, random: np.random.Generator, shake: float = 1.0) -> Box:
    """The crop box with its margin, as the worker would make it from a finder that errs by `shake` times 2 px."""
    points = portrait.contour(pose) + random.normal(0, 2.0 * shake, (4, 2))
    middle, chin = float(points[2, 1]), float(points[3, 1])
    top = 2 * middle - chin
    margin = (MARGIN_SHARE + float(random.normal(0, 0.008)) * shake) * (chin - top)
    return Box(round(points[0, 0]), round(top), round(points[1, 0]), round(chin + margin))


def mouth_shapes(random: np.random.Generator, count: int, spoken: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mouths as speech has them, wide open ones more often than they are."""
    rows = spoken[random.integers(0, len(spoken), 4 * count)]
    open_ones = rows[rows[:, 0] > 0.4][: count // 2]
    moving = rows[rows[:, 0] > 0.05]
    chosen: NDArray[np.float32] = np.concatenate([open_ones, moving])[:count].copy()
    random.shuffle(chosen)
    return chosen


def _draw(person: int) -> tuple[UInt8Array, NDArray[np.float32], NDArray[np.int64]]:
    """All crops of one person (or of one hundredth of the avatar's poses), references before their targets."""
    _, mouths = corpus()
    spoken: NDArray[np.float32] = mouths.reshape(-1, mouths.shape[-1])
    spoken = (spoken[:-1] + spoken[1:]) * np.float32(0.5)
    is_avatar = person < 0
    random = np.random.default_rng((SEED, abs(person), is_avatar))
    portrait = Portrait(Identity() if is_avatar else random_identity(random), 150 if is_avatar else 24)
    n_poses, n_mouths = (N_AVATAR_POSES // 8, N_AVATAR_MOUTHS) if is_avatar else (N_OTHER_POSES, N_OTHER_MOUTHS)
    crops: list[UInt8Array] = []
    shapes: list[NDArray[np.float32]] = []
    references: list[int] = []
    for _ in range(n_poses):
        pose = random_pose(random)
        box = random_box(portrait, pose, random)
        reference = len(crops)
        for shape in [np.asarray(SHUT, np.float32), *mouth_shapes(random, n_mouths, spoken)]:
            picture = portrait.picture(list(shape), pose)
            # A video's own losses.
            _, coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(86, 99))])
            decoded = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
            crops.append(crop_patch(decoded, box, CROP_PX))
            shapes.append(shape)
            references.append(reference)
    return np.stack(crops), np.stack(shapes), np.asarray(references)


def pictures(n_processes: int = 2) -> Pictures:
    """All crops, drawn once; persons below 0 are the avatar, the rest somebody else."""
    path: Path = BUILD / "pictures.npz"
    if not path.is_file():
        BUILD.mkdir(exist_ok=True)
        persons = [*range(-8, 0), *range(N_OTHERS)]
        with multiprocessing.get_context("spawn").Pool(n_processes) as pool:
            drawn = pool.map(_draw, persons, chunksize=1)
        offsets = np.cumsum([0, *(len(crops) for crops, _, _ in drawn)])[:-1]
        np.savez(
            path,
            crops=np.concatenate([crops for crops, _, _ in drawn]),
            mouths=np.concatenate([shapes for _, shapes, _ in drawn]),
            reference=np.concatenate([part[2] + offset for part, offset in zip(drawn, offsets, strict=True)]),
            person=np.concatenate([np.full(len(part[0]), person) for part, person in zip(drawn, persons, strict=True)]),
        )
    with np.load(path) as data:
        return Pictures(data["crops"], data["mouths"], data["reference"], data["person"])


if __name__ == "__main__":
    print(pictures().crops.shape)
