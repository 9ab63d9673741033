"""From faces to the masks under which their patches are pasted: the parser's classes, then pixels in a few threads.

Knows the parser and the options of a video, no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from musetalk.blending import PastePlan, soft_mask
from musetalk.device_input import square_pictures
from musetalk.face_parsing import PARSE_PX, FaceParser, FaceParserLike
from musetalk.frames import Matrix, Planes, UInt8Array
from musetalk.geometry import Box, blend_box
from musetalk.options import RenderOptions

# Threads that make masks beside a GPU; more would take cores from the encoder.
_THREADS = 4


class BatchRunner(Protocol):
    """Runs work over consecutive slices, in batches that fit the memory."""

    def run(self, work: Any, n_items: int) -> list[Any]:
        """The results of `work(slice)`."""


class Masking:
    """Makes the plans by which patches are pasted into the frames of one source."""

    def __init__(
        self, parser: FaceParserLike, options: RenderOptions, matrix: Matrix, device: torch.device, batches: BatchRunner
    ) -> None:
        self._parser, self._options, self._matrix = parser, options, matrix
        self._device, self._batches = device, batches

    def reads_planes(self, boxes: Sequence[Box]) -> bool:
        """Whether `labels` makes the parser's pictures itself, on its device, and needs no squares."""
        is_ready = self._options.device_pixels and isinstance(self._parser, FaceParser)
        return is_ready and not any(blend_box(box).is_empty for box in boxes)

    def labels(
        self, frames: Sequence[Planes], boxes: Sequence[Box], squares: Sequence[UInt8Array]
    ) -> Iterator[UInt8Array]:
        """Classes (512, 512) around each crop box, from the frames or from their `squares` (BGR) where those are."""
        parser = self._parser

        def classes(part: slice) -> UInt8Array:
            if squares or not isinstance(parser, FaceParser):
                return parser.labels(squares[part])
            around = [blend_box(box) for box in boxes[part]]
            return parser.classes(square_pictures(frames[part], around, PARSE_PX, self._matrix, self._device))

        for labels in self._batches.run(classes, len(boxes)):
            yield from labels

    def plans(self, labels: Sequence[UInt8Array], boxes: Sequence[Box], frames: Sequence[Planes]) -> list[PastePlan]:
        """The plan of each face; beside a GPU in a few threads, since OpenCV and Pillow let others run."""
        if not self._options.overlap or not boxes:
            return list(map(self._plan, labels, boxes, frames))
        with ThreadPoolExecutor(min(_THREADS, len(boxes)), "masks") as pool:
            return list(pool.map(self._plan, labels, boxes, frames))

    def _plan(self, labels: UInt8Array, box: Box, planes: Planes) -> PastePlan:
        options, around = self._options, blend_box(box)
        cheeks = options.left_cheek_width, options.right_cheek_width
        mask = soft_mask(labels, box, around, options.mask_mode, *cheeks, blur=options.mask_blur)
        return PastePlan.prepare(mask, box, around, planes.width, planes.height)
