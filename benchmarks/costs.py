"""Cost of a source frame, new and prepared, by stage: arithmetic, bytes over the bus, CPU time beside a GPU.

    python -m benchmarks.costs [--size 720p|1080p] [--seconds 60] [--json FILE]

"Before" is every frame through the detector, pixels made on the CPU; "after" is the worker's way. Arithmetic is counted
on tensors without numbers, at the official sizes; bytes come from shapes. CPU time is that of one thread on a GPU's
host, without waiting and decoding: the work at the picture's size, and the launching, measured on tiny pictures.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    OPTIONS = arguments.costs(__doc__)

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.material import background
from benchmarks.networks import OFFICIAL_UNET, OFFICIAL_VAE
from musetalk import faces
from musetalk.blending import PastePlan, crop_for_parsing, face_mask, soft_mask
from musetalk.device_input import square_pictures, upload_planes, warped_bgr
from musetalk.device_pixels import crop_patches
from musetalk.face_parsing import parse_input
from musetalk.face_search import IntervalSearch, doubts, interval_for
from musetalk.faces import Detection, Pose
from musetalk.frames import Picture, Planes, bgr_to_planes, planes_to_bgr
from musetalk.geometry import Box, blend_box
from musetalk.networks.bisenet import BiseNet
from musetalk.networks.rtmpose import INPUT_HEIGHT, INPUT_WIDTH, RtmPose
from musetalk.networks.s3fd import S3fd

META = torch.device("meta")
BATCH, RATE = 8, 25
KEYPOINTS, BINS = 133, 576 + 768
PATCH_PX = 256


@dataclass
class Cost:
    """One stage of one frame."""

    stage: str
    gflop_before: float = 0.0
    gflop_after: float = 0.0
    mib_before: float = 0.0
    mib_after: float = 0.0
    cpu_ms_before: float = 0.0
    cpu_ms_after: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        mine, its = asdict(self), asdict(other)
        return Cost(self.stage, *(mine[name] + its[name] for name in mine if name != "stage"))


# -- arithmetic -------------------------------------------------------------------------------------------------------


def gflop(work: Callable[[], object]) -> float:
    """Billions of operations of `work` on tensors without numbers."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops()) / 1e9


class Networks:
    """All networks of a frame at official size, without numbers."""

    def __init__(self) -> None:
        with META:
            self.detector, self.pose, self.parser = S3fd().eval(), RtmPose().eval(), BiseNet().eval()
            self.unet = UNet2DConditionModel(**OFFICIAL_UNET).eval()
            self.vae = AutoencoderKL(**OFFICIAL_VAE).eval()

    def detect(self, size: tuple[int, int]) -> float:
        """GFLOP of the detector on one picture."""
        return gflop(lambda: self.detector(torch.empty(1, 3, size[1], size[0], device=META)))

    def others(self) -> dict[str, float]:
        """GFLOP of the other networks for one frame."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=META)

        return {
            "landmarks": gflop(lambda: self.pose(empty(2, 3, INPUT_HEIGHT, INPUT_WIDTH))),
            "encode": gflop(lambda: self.vae.encode(empty(2, 3, 256, 256))),
            "parse": gflop(lambda: self.parser(empty(1, 3, 512, 512))),
            "generate": gflop(lambda: self.unet(empty(1, 8, 32, 32), 0, empty(1, 50, 384)))
            + gflop(lambda: self.vae.decode(empty(1, 4, 32, 32))),
        }


class SteadyFinder:
    """A face at rest; remembers how often the detector looked, at full and at reduced size."""

    def __init__(self, box: Box) -> None:
        grid = np.stack(np.meshgrid(np.linspace(box.x0, box.x1, 4), np.linspace(box.y0, box.y1, 17)), -1)
        self._pose = Pose(grid.reshape(-1, 2), 0.8)
        self.n_looked = self.n_checked = 0

    def detect(self, pictures: Sequence[Picture]) -> list[Detection | None]:
        """A face in each."""
        self.n_looked += len(pictures)
        return [(Box(0, 0, 9, 9), 1.0)] * len(pictures)

    def poses(self, pictures: Sequence[Picture]) -> list[Pose]:
        """The same landmarks in each."""
        return [self._pose] * len(pictures)

    def confirms(self, picture: Picture, pose: Pose) -> float:  # noqa: ARG002
        """Yes."""
        self.n_checked += 1
        return 1.0


def looks_per_frame(planes: Planes, box: Box, n_frames: int) -> tuple[float, float]:
    """How often the detector looks at a frame of a source of `n_frames`, at full and at reduced size."""
    finder = SteadyFinder(box)
    search = IntervalSearch(finder, "bt709", 0, interval_for(planes.width, planes.height))
    for _ in range(n_frames):
        search.add(planes)
    search.finish()
    return finder.n_looked / n_frames, finder.n_checked / n_frames


# -- bytes ------------------------------------------------------------------------------------------------------------


def heads_bytes(size: tuple[int, int]) -> int:
    """Bytes of the detector's answer, scores and offsets, as they come to the host."""
    return sum((size[0] // stride) * (size[1] // stride) * 5 * 4 for stride in (4, 8, 16, 32, 64, 128))


# -- CPU time ---------------------------------------------------------------------------------------------------------


def cpu_ms(work: Callable[[], object], n_frames: int = 1, rounds: int = 9) -> float:
    """Milliseconds of this thread for a frame: the least of some rounds of `work`, which does `n_frames`."""
    work()
    times = []
    for _ in range(rounds):
        started = time.thread_time()
        work()
        times.append(time.thread_time() - started)
    # The least: beside others, a thread shares its core's cache and clock.
    return min(times) * 1000 / n_frames


class Material:
    """A picture of one size with a face in its middle, and what networks would answer."""

    def __init__(self, size: tuple[int, int], face: tuple[int, int]) -> None:
        self.size = size
        self.planes = bgr_to_planes(background(*size), "bt709")
        left, top = (size[0] - face[0]) // 2 | 1, (size[1] - face[1]) // 2 | 1
        self.box = Box(left, top, left + face[0], top + face[1])
        self.around = blend_box(self.box)
        self.labels = np.zeros((512, 512), np.uint8)
        cv2.ellipse(self.labels, (256, 256), (160, 215), 0, 0, 360, 1, -1)
        rng = np.random.default_rng(0)
        self.simcc = rng.random((1, KEYPOINTS, 576), np.float32), rng.random((1, KEYPOINTS, 768), np.float32)
        self.pose = Pose(rng.uniform(100, 400, (68, 2)), 0.8)

    def landmarks(self) -> None:
        """The host's part behind the pose network."""
        keypoints, _ = faces.decode_simcc(*self.simcc)
        faces.keypoints_in_frame(keypoints[0], *self.size)
        doubts(self.pose, [self.pose], [self.size], 0)
        faces.face_of(self.pose, (self.box, 1.0), self.size)

    def paste_plan(self, mask: Any) -> PastePlan:
        """The plan of one face."""
        return PastePlan.prepare(mask, self.box, self.around, *self.size)


# A batch of pictures of one kind, on a device, made so many pixels wide.
_Batch = Callable[[Material, torch.device, int], object]


def host_ms(work: _Batch, material: Material, out_px: int, *staged: Any) -> float:
    """Milliseconds of a GPU's host for a frame.

    The launching is that of tiny pictures on the CPU. What grows with the pictures is the difference between large and
    tiny ones on a device that computes nothing, and the copies of the `staged` arrays to where the bus reads them.
    """
    tiny = Material((64, 36), (16, 16))
    launching = cpu_ms(lambda: work(tiny, torch.device("cpu"), 8), BATCH)
    growing = cpu_ms(lambda: work(material, META, out_px), BATCH) - cpu_ms(lambda: work(tiny, META, 8), BATCH)
    # The pinned memory is there already.
    places = [np.empty_like(array) for array in staged]

    def copy() -> None:
        for place, array in zip(places, staged, strict=True):
            np.copyto(place, array)

    copying = cpu_ms(copy)
    return launching + max(0.0, growing) + copying


def search_before(material: Material) -> None:
    """One frame: all of its pixels on the CPU, the pose network's input in floating point."""
    bgr = planes_to_bgr(material.planes, "bt709")
    np.stack([bgr])
    faces.pose_input(faces.warp_for_pose(bgr))
    material.landmarks()


def warp(material: Material, device: torch.device, out_px: int) -> None:
    """A batch: planes cross the bus and become pixels there."""
    uploaded = upload_planes([material.planes] * BATCH, device)
    shown = (INPUT_WIDTH, INPUT_HEIGHT) if out_px > PATCH_PX else (out_px, out_px)
    warped_bgr(uploaded, "bt709", shown, min(shown[0] / side for side in material.size))


def search_after(material: Material) -> float:
    """Milliseconds of a frame."""
    planes = material.planes
    decoding = cpu_ms(material.landmarks)
    return decoding + host_ms(warp, material, 512, planes.y, planes.u, planes.v)


def crop(material: Material, device: torch.device, out_px: int) -> None:
    """A batch: what is to be encoded, cut on the device."""
    crop_patches([material.planes] * BATCH, [material.box] * BATCH, out_px, "bt709", device)


def square(material: Material, device: torch.device, out_px: int) -> None:
    """A batch: what is to be parsed."""
    square_pictures([material.planes] * BATCH, [material.around] * BATCH, out_px, "bt709", device)


def part_of(material: Material, box: Box) -> list[Any]:
    """The planes inside a box, as they are uploaded."""
    part = material.planes.region(box.clipped(*material.size).evened())
    return [part.y, part.u, part.v]


def parse_before(material: Material) -> None:
    """One frame."""
    region = material.around.clipped(*material.size)
    picture = planes_to_bgr(material.planes, "bt709", region)
    parse_input(crop_for_parsing(picture, material.around.shifted(-region.x0, -region.y0)))


def mask_before(material: Material) -> None:
    """One frame: the mask resized as a whole, its lower half blurred with room for all that is mirrored."""
    around, box = material.around, material.box
    mask = Image.fromarray(face_mask(material.labels, "jaw")).resize((around.width, around.height))
    soft = np.asarray(mask, np.uint8).copy()
    kernel = int(0.05 * around.width // 2 * 2) + 1
    inner = box.shifted(-around.x0, -around.y0)
    rows = slice(around.height // 2 - kernel, inner.y1 + kernel)
    columns = slice(inner.x0 - kernel, inner.x1 + kernel)
    soft[rows, columns] = cv2.GaussianBlur(soft[rows, columns], (kernel, kernel), 0)
    material.paste_plan(soft)


def mask_after(material: Material) -> None:
    """One frame."""
    material.paste_plan(soft_mask(material.labels, material.box, material.around, "jaw"))


# -- the table --------------------------------------------------------------------------------------------------------


def costs(size: tuple[int, int], face: tuple[int, int], n_frames: int) -> list[Cost]:
    """The stages of a new frame; the last is all that a prepared one costs."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    networks, material = Networks(), Material(size, face)
    others = networks.others()
    looked, checked = looks_per_frame(material.planes, material.box, n_frames)
    share = faces.CHECKED_FACE_PX / max(face)
    small = round(size[0] * share), round(size[1] * share)
    mib = 2**20
    planes_mib, bgr_mib = size[0] * size[1] * 1.5 / mib, size[0] * size[1] * 3 / mib
    simcc_mib = KEYPOINTS * BINS * 4 / mib
    parsed = material.around.clipped(*size)
    pose_float, pose_planes = INPUT_WIDTH * INPUT_HEIGHT * 12 / mib, planes_mib
    crop_mib = (material.box.width * material.box.height * 1.5 + 8 * 1024 * 2) / mib
    crop_ms = host_ms(crop, material, PATCH_PX, *part_of(material, material.box))
    drawn_mib = (8 * 1024 * 2 + 50 * 384 * 2 + 256 * 256 * 3) / mib
    full = networks.detect(size)
    return [
        Cost(
            "detector",
            full,
            looked * full + checked * networks.detect(small),
            bgr_mib + heads_bytes(size) / mib,
            (looked + checked) * planes_mib + (looked * heads_bytes(size) + checked * heads_bytes(small)) / mib,
        ),
        Cost(
            "search: pixels, landmarks",
            others["landmarks"],
            others["landmarks"],
            pose_float + simcc_mib,
            pose_planes + simcc_mib,
            cpu_ms(lambda: search_before(material)),
            search_after(material),
        ),
        Cost(
            "encode",
            others["encode"],
            others["encode"],
            crop_mib,
            crop_mib,
            crop_ms,
            crop_ms,
        ),
        Cost(
            "parse",
            others["parse"],
            others["parse"],
            (512 * 512 * 12 + 512 * 512) / mib,
            (parsed.width * parsed.height * 1.5 + 512 * 512 + 2 * 512 * 4 * 6) / mib,
            cpu_ms(lambda: parse_before(material)),
            host_ms(square, material, 512, *part_of(material, material.around)),
        ),
        Cost(
            "mask",
            cpu_ms_before=cpu_ms(lambda: mask_before(material)),
            cpu_ms_after=cpu_ms(lambda: mask_after(material)),
        ),
        Cost("generate", others["generate"], others["generate"], drawn_mib, drawn_mib),
    ]


def print_table(rows: Sequence[Cost]) -> None:
    """The stages and their sum, as Markdown."""
    print("| stage | GFLOP before | after | MiB over the bus before | after | CPU ms before | after |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        numbers = list(asdict(row).values())[1:]
        print(f"| {row.stage} | " + " | ".join(f"{number:,.1f}" for number in numbers) + " |")


def main(options: Any) -> None:
    """Count, measure, print."""
    rows = costs(*arguments.FRAME_SIZES[options.size], round(options.seconds * RATE))
    total = sum(rows[1:], rows[0])
    total.stage = "a new frame"
    prepared = replace(rows[-1], stage="a prepared frame")
    print_table([*rows, total, prepared])
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in [*rows, total, prepared]], indent=1))


if __name__ == "__main__":
    main(OPTIONS)
