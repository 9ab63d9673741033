"""Preparation of a source: faces are found once, latents and masks computed once, frames ordered for the output.

Knows the preparation of one source frame and the order of output frames; nothing of sound or encoding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import media
from musetalk.avatars import Arena, Avatar, AvatarCache, PreparedFace, avatar_key, file_digest
from musetalk.blending import PastePlan, blend_mask, colour_band, crop_for_parsing, face_mask
from musetalk.device_pixels import crop_patches
from musetalk.errors import CancelledError, NoFaceError, OutOfMemoryError
from musetalk.faces import Face, fill_gaps, fixed_face, smooth_boxes, smoothing_reach
from musetalk.frame_store import FrameStore
from musetalk.frames import Planes, UInt8Array, planes_to_bgr
from musetalk.generator import crop_patch, to_bgr
from musetalk.geometry import Box, blend_box, source_index
from musetalk.models import Models
from musetalk.options import RenderOptions
from musetalk.strangers import is_demo_portrait, mouth_labels
from musetalk.streaming import BackgroundReader

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Frames that wait between two threads: enough to hide an uneven frame, small enough to stay flat at 1080p (3 MB each).
QUEUE_DEPTH = 4
# Frames looked at together when faces are searched.
FIND_BATCH = 8


@dataclass(frozen=True)
class Record:
    """One source picture and its prepared face; without a face it is shown as it is."""

    planes: Planes
    face: PreparedFace | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The record as named arrays (planes, latents, plan), for the frame store."""
        named: dict[str, NDArray[Any]] = {"y": self.planes.y, "u": self.planes.u, "v": self.planes.v}
        return named if self.face is None else {**named, **self.face.arrays()}

    def faded(self, weight: float) -> Record:
        """The record with its patch shown by `weight`, 0..1; at 0 nothing is to be generated for it."""
        if self.face is None or weight >= 1:
            return self
        if weight <= 0:
            return Record(self.planes)
        return Record(self.planes, replace(self.face, plan=self.face.plan.faded(weight)))

    @staticmethod
    def from_arrays(named: dict[str, NDArray[Any]]) -> Record:
        """Rebuild the record from its `arrays`."""
        planes = Planes(named["y"], named["u"], named["v"])
        return Record(planes, PreparedFace.from_arrays(named) if "latents" in named else None)


class Batches:
    """Runs work in batches that shrink when the GPU's memory runs out; the size is kept for the rest of the job."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, work: Callable[[slice], T], n_items: int) -> list[T]:
        """`work` over consecutive slices of `n_items`; halves the batch when memory runs out.

        Raises OutOfMemoryError when even one item does not fit.
        """
        results: list[T] = []
        start = 0
        while start < n_items:
            stop = min(n_items, start + self.size)
            try:
                results.append(work(slice(start, stop)))
            except torch.OutOfMemoryError:
                fits = False
            else:
                fits = True
            # Outside the except block, because the traceback keeps the tensors that did not fit.
            if fits:
                start = stop
                continue
            torch.cuda.empty_cache()
            if stop - start == 1:
                raise OutOfMemoryError("the GPU's memory is too small for one frame", is_oom=True, batch_size=1)
            self.size = (stop - start) // 2
        return results


class SourcePreparer:
    """Prepares the frames of one source for one job."""

    def __init__(
        self,
        models: Models,
        path: Path,
        info: media.SourceInfo,
        options: RenderOptions,
        limits: media.MediaLimits,
        batches: Batches,
        avatars: AvatarCache | None = None,
    ) -> None:
        """Reuse what `avatars` has of this source. Raises RequestError when the face box does not fit the source."""
        self.models, self.info, self.options = models, info, options
        self._path, self._limits, self._batches = path, limits, batches
        self._avatars = avatars if models.fingerprint else None
        # Its own stream: waiting for latents then does not wait for frames that are being generated.
        on_gpu = options.overlap and models.device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(models.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._kept = Avatar()
        self._fresh: dict[int, PreparedFace] = {}
        self._fresh_bytes = 0
        self._arena = Arena()
        if self._avatars is not None:
            self._key = avatar_key(file_digest(path), models.fingerprint, self._choices())
            if (hit := self._avatars.get(self._key)) is not None:
                self._kept, tier = hit
                logger.info("this source was prepared before", extra={"kept_in": tier})
        self._fixed = None if options.face_box is None else fixed_face(options.face_box, info.width, info.height)
        self._faces: list[Face | None] | None = None
        self._found: tuple[Face | None, ...] = ()
        self._is_whole = False
        self.n_frames = 0
        self.n_without_face = 0
        self.n_interpolated = 0
        # Sentences about the source for the user, the same ones once for each reading.
        self.warnings = list(info.warnings)
        self._reused: set[int] = set()

    def _choices(self) -> dict[str, object]:
        """Everything but the source and the networks that changes what is prepared of a frame."""
        options, info = self.options, self.info
        return {
            "device": self.models.device.type,
            "dtype": str(self.models.dtype),
            "frames": [info.width, info.height, str(info.rate), info.colour.matrix],
            "background": options.background,
            "face_box": options.face_box,
            "bbox_shift": options.bbox_shift,
            "margin": [options.extra_margin, options.margin_share],
            "mask": [options.mask_mode, options.left_cheek_width, options.right_cheek_width, options.mask_blur],
            "match_colours": [options.match_colours, options.careful],
            "device_pixels": options.device_pixels,
            "boxes": [options.box_smoothing, options.max_gap_frames],
        }

    def find_faces(self, max_frames: int, should_stop: Callable[[], bool]) -> list[Box]:
        """Find the face of each of the first `max_frames` frames; returns the crop boxes found (without margin).

        Short gaps are interpolated and boxes smoothed as the options say. With a fixed face box nothing is decoded.
        Raises NoFaceError when no frame shows a face, MediaError for a broken source, CancelledError.
        """
        if self._fixed is not None:
            return [self._fixed.box]
        self._found, self._is_whole = self._kept.found, self._kept.is_whole
        faces = self._kept.faces_of(max_frames)
        if faces is None:
            faces = self._found = self._search(max_frames, should_stop)
            self._is_whole = len(faces) < max_frames
        n_found = sum(face is not None for face in faces)
        if n_found == 0:
            raise NoFaceError("no frame of the source shows a face", frames=len(faces))
        filled = fill_gaps(faces, self._max_gap)
        self.n_interpolated = sum(face is not None for face in filled) - n_found
        self._faces = smooth_boxes(filled, self.options.box_smoothing)
        return [face.box for face in self._faces if face is not None]

    @property
    def _max_gap(self) -> int:
        max_gap = self.options.max_gap_frames
        return round(self.info.rate / 2) if max_gap is None else max_gap

    @property
    def n_ahead(self) -> int:
        """Frames behind one that have to be searched for its own box: smoothing looks at them, gaps end there."""
        return smoothing_reach(self.options.box_smoothing) + self._max_gap + 1

    def _search(self, max_frames: int, should_stop: Callable[[], bool]) -> tuple[Face | None, ...]:
        """Faces of the first `max_frames` frames; frames that were searched before are not searched again."""
        faces = list(self._kept.found)
        n_known = len(faces)
        with self._open(max_frames) as frames:
            for batch in _batched(islice(frames, n_known, None), FIND_BATCH):
                if should_stop():
                    raise CancelledError("the job was cancelled")
                new = [frame for frame in batch if not frame.is_repeat or (not faces and frame is batch[0])]
                pictures = [planes_to_bgr(frame.planes, self.info.colour.matrix) for frame in new]
                shift = self.options.bbox_shift
                found = iter(self.models.faces.find(pictures, bbox_shift=shift) if pictures else [])
                for frame in batch:
                    faces.append(faces[-1] if frame.is_repeat and faces else next(found))
        return tuple(faces)

    def keep(self) -> None:
        """Leave what was prepared to later jobs, unless it is too large or nothing is new."""
        is_new = bool(self._fresh) or len(self._found) > len(self._kept.found) or self._is_whole != self._kept.is_whole
        if self._avatars is None or not is_new or self._is_too_large():
            return
        avatar = Avatar(self._found, self._is_whole, {**self._kept.prepared, **self._fresh})
        self._avatars.put(self._key, avatar)

    def _is_too_large(self) -> bool:
        return self._avatars is None or self._kept.n_bytes + self._fresh_bytes > self._avatars.largest_bytes

    def count_frames(self, max_frames: int, should_stop: Callable[[], bool]) -> int:
        """Number of source frames, `max_frames` at most: headers only estimate it, so frames are decoded and counted.

        After a search for faces the number is known. Raises MediaError for a broken source, CancelledError.
        """
        if self._faces is not None:
            return len(self._faces)
        n_frames = 0
        with self._open(max_frames) as frames:
            for batch in _batched(frames, FIND_BATCH):
                if should_stop():
                    raise CancelledError("the job was cancelled")
                n_frames += len(batch)
        return n_frames

    def in_output_order(self, n_output: int, store: FrameStore) -> Generator[Record, None, None]:
        """The prepared picture of each of `n_output` output frames: forwards, then as `loop_mode` says.

        Pictures that are shown again are kept in `store`. A source longer than the output is streamed; with `hold` only
        the last picture is kept.
        """
        comes_back = self.options.loop_mode in ("ping_pong", "loop")
        expected = len(self._faces) if self._faces is not None else self.info.n_frames
        keep = comes_back and (expected is None or expected < n_output)
        order: list[int] = []
        last: Record | None = None
        with closing(self._forward(n_output)) as forward:
            for frame, record in forward:
                if frame.is_repeat and order:
                    order.append(order[-1])
                else:
                    order.append(order[-1] + 1 if order else 0)
                    if keep:
                        store.put(order[-1], record.arrays())
                self.n_without_face += record.face is None
                last = record
                yield record
        self.n_frames = len(order)
        if not comes_back and last is not None:
            yield from repeat(last, n_output - len(order))
            return
        if len(order) < n_output and not keep:
            # The header promised more frames than exist: read the source again, this time keeping them.
            self._keep_all(n_output, store)
        for index in range(len(order), n_output):
            shown = source_index(self.options.loop_mode, index, len(order))
            yield Record.from_arrays(store.get(order[shown]))

    def output_frame(self, index: int) -> Record:
        """The prepared picture of output frame `index` alone."""
        frame, n_seen = self._picture_at(index)
        if n_seen <= index:
            frame, _ = self._picture_at(source_index(self.options.loop_mode, index, n_seen))
        record = self._prepare([frame])[0]
        # Not kept: a whole video prepares it together with others, and keeps that to the last digit.
        self._fresh.clear()
        self._fresh_bytes = 0
        return record

    def _picture_at(self, index: int) -> tuple[media.SourceFrame, int]:
        """Return the distinct picture visible at frame `index` (or the last one) and the number of frames decoded."""
        shown: media.SourceFrame | None = None
        n_seen = 0
        with self._open(index + 1) as frames:
            for frame in frames:
                n_seen += 1
                if shown is None or not frame.is_repeat:
                    shown = frame
        assert shown is not None, "a source without any picture is refused when it is read"
        return shown, n_seen

    def _keep_all(self, n_output: int, store: FrameStore) -> None:
        index = 0
        for frame, record in self._forward(n_output):
            if index == 0 or not frame.is_repeat:
                store.put(index, record.arrays())
                index += 1

    def _open(self, max_frames: int) -> BackgroundReader[media.SourceFrame]:
        frames = media.read_source(
            self._path,
            self.info,
            self._limits,
            max_frames=max_frames,
            background=self.options.background_rgb,
            on_warning=self.warnings.append,
        )
        return BackgroundReader(frames, depth=QUEUE_DEPTH, name="decoder")

    def _forward(self, max_frames: int) -> Generator[tuple[media.SourceFrame, Record], None, None]:
        """Decode from the first frame on, a batch at a time; repeated pictures share one record."""
        with self._open(max_frames) as frames:
            previous: Record | None = None
            for batch in _batched(frames, self.options.batch_size):
                fresh = [frame for frame in batch if not frame.is_repeat or (previous is None and frame is batch[0])]
                prepared = iter(self._prepare(fresh))
                for frame in batch:
                    if previous is None or not frame.is_repeat:
                        previous = next(prepared)
                    yield frame, previous

    def _prepare(self, frames: Sequence[media.SourceFrame]) -> list[Record]:
        """Latents and masks of source frames, each network run once over all of them."""
        boxes = [self._box(frame) for frame in frames]
        kept = [
            None if box is None else self._kept_face(frame.index, box) for frame, box in zip(frames, boxes, strict=True)
        ]
        missing = [
            (frame, box)
            for frame, box, face in zip(frames, boxes, kept, strict=True)
            if box is not None and face is None
        ]
        fresh = iter(self._encode(missing))
        records = []
        for frame, box, face in zip(frames, boxes, kept, strict=True):
            if box is not None and face is None:
                face = next(fresh)  # noqa: PLW2901 - the missing preparation was just added
                self._remember(frame.index, face)
            records.append(Record(frame.planes, face))
        return records

    def _box(self, frame: media.SourceFrame) -> Box | None:
        """The crop box in a source frame, margin included; None without a face."""
        face = self._face(frame.index)
        if face is None:
            return None
        margin = self.options.extra_margin + round(self.options.margin_share * face.box.height)
        return face.box.with_bottom_margin(margin, frame.planes.height)

    def _kept_face(self, index: int, box: Box) -> PreparedFace | None:
        """The existing preparation of a frame, if its box is still the same; boxes depend on later frames."""
        if (face := self._fresh.get(index)) is not None and face.plan.box == box:
            return face
        if (face := self._kept.prepared.get(index)) is not None and face.plan.box == box:
            self._reused.add(index)
            return face
        return None

    @property
    def n_reused(self) -> int:
        """Frames of the source that an earlier job had prepared."""
        return len(self._reused)

    def _remember(self, index: int, face: PreparedFace) -> None:
        """Collect for `keep`, as long as it does not grow beyond what will be kept."""
        if self._is_too_large():
            self._fresh.clear()
            return
        self._fresh[index] = face.moved_to(self._arena)
        self._fresh_bytes += face.n_bytes

    def _encode(self, places: Sequence[tuple[media.SourceFrame, Box]]) -> Iterator[PreparedFace]:
        """Run both networks over the faces at `places`, in whole batches."""
        if not places:
            return
        crops: list[UInt8Array] = []
        squares: list[UInt8Array] = []
        on_device = self._crops_on_device(places)
        for frame, box in places:
            around = blend_box(box)
            region = _union(box, around).clipped(frame.planes.width, frame.planes.height)
            picture = planes_to_bgr(frame.planes, self.info.colour.matrix, region)
            if on_device is None:
                crops.append(crop_patch(picture, box.shifted(-region.x0, -region.y0), self.models.generator.crop_px))
            squares.append(crop_for_parsing(picture, around.shifted(-region.x0, -region.y0)))
        with torch.cuda.stream(self._stream):
            latents = list(self._latents(np.stack(crops) if on_device is None else on_device))
            labels = list(self._labels(squares))
        for index, (frame, box) in enumerate(places):
            band, original, classes = None, None, labels[index]
            if self.options.careful and on_device is None and not is_demo_portrait(crops[index]):
                original = self._original(crops[index], latents[index])
                classes = self._mouth_labels(frame.index, box, classes)
            elif self.options.match_colours:
                band = colour_band(crops[index])
            yield PreparedFace(self._paste_plan(classes, box, frame.planes), latents[index], band, original)

    def _original(self, crop: UInt8Array, latents: NDArray[Any]) -> UInt8Array:
        """The crop, and what the VAE makes of it, (2, s, s, 3)."""
        reference = torch.from_numpy(latents[None, len(latents) // 2 :])
        return np.stack([crop, to_bgr(self.models.generator.decode(reference))[0]])

    def _mouth_labels(self, index: int, box: Box, labels: UInt8Array) -> UInt8Array:
        """Mouth and chin by the landmarks; the parser's own labels where there are none (a given face box)."""
        face = self._face(index)
        return labels if face is None or face.landmarks is None else mouth_labels(face.landmarks, blend_box(box))

    def _face(self, index: int) -> Face | None:
        if self._fixed is not None:
            return self._fixed
        assert self._faces is not None, "find_faces comes first"
        return self._faces[index] if index < len(self._faces) else None

    def _crops_on_device(self, places: Sequence[tuple[media.SourceFrame, Box]]) -> torch.Tensor | None:
        """All crops, cut where the networks run; None where they are cut on the CPU (colours are matched there)."""
        if not self.options.device_pixels or self.options.match_colours:
            return None
        generator = self.models.generator
        frames, boxes = [frame.planes for frame, _ in places], [box for _, box in places]
        with torch.cuda.stream(self._stream):
            return crop_patches(frames, boxes, generator.crop_px, self.info.colour.matrix, generator.device)

    def _latents(self, crops: UInt8Array | torch.Tensor) -> Iterator[NDArray[Any]]:
        for part in self._batches.run(lambda part: self.models.generator.encode(crops[part]), len(crops)):
            # NumPy has no bfloat16; float32 represents it without loss.
            yield from (part.float() if part.dtype == torch.bfloat16 else part).cpu().numpy()

    def _labels(self, squares: Sequence[UInt8Array]) -> Iterator[UInt8Array]:
        for part in self._batches.run(lambda part: self.models.parser.labels(squares[part]), len(squares)):
            yield from part

    def _paste_plan(self, labels: UInt8Array, box: Box, planes: Planes) -> PastePlan:
        options, around = self.options, blend_box(box)
        mask = face_mask(labels, options.mask_mode, options.left_cheek_width, options.right_cheek_width)
        mask = blend_mask(mask, box, around, blur=options.mask_blur)
        return PastePlan.prepare(mask, box, around, planes.width, planes.height)


def _union(first: Box, second: Box) -> Box:
    return Box(min(first.x0, second.x0), min(first.y0, second.y0), max(first.x1, second.x1), max(first.y1, second.y1))


def _batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
