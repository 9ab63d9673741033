"""Preparation of a source: faces are found once, latents and masks computed once, frames ordered for the output.

Knows the preparation of one source frame and the order of output frames; nothing of sound or encoding.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import media
from musetalk.avatars import Arena, Avatar, AvatarCache, PreparedFace, avatar_key, file_digest
from musetalk.batches import Batches, queue_depth
from musetalk.blending import colour_band, crop_for_parsing
from musetalk.device_pixels import crop_patches
from musetalk.errors import CancelledError, NoFaceError
from musetalk.face_search import FIND_BATCH, FaceSearch, FrameSearch, interval_for, start_search
from musetalk.face_track import FaceTrack, smoothing_reach
from musetalk.faces import Face, fixed_face
from musetalk.frame_store import FrameStore
from musetalk.frames import Planes, UInt8Array, planes_to_bgr
from musetalk.generator import crop_patch, to_bgr
from musetalk.geometry import Box, blend_box, source_index
from musetalk.masking import Masking
from musetalk.models import Models
from musetalk.options import RenderOptions
from musetalk.strangers import is_demo_portrait, lip_colour, mouth_labels
from musetalk.streaming import BackgroundReader

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Choices that change what is made of a face, and not where it is: a preview with another margin searches nothing again.
_AFTER_FINDING = {"margin", "mask", "match_colours", "device_pixels", "boxes"}
# Frames may wait for their faces in so much memory; a source that needs more is searched first and decoded again.
_AHEAD_BYTES = 384 * 2**20


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
        self._stream: Any = models.preparing_stream if options.overlap else None
        self._masking = Masking(models.parser, options, info.colour.matrix, models.device, batches)
        self._kept = Avatar()
        self._fresh: dict[int, PreparedFace] = {}
        self._fresh_bytes = 0
        self._arena = Arena()
        if self._avatars is not None:
            digest, choices = file_digest(path), self._choices()
            self._key = avatar_key(digest, models.fingerprint, choices)
            finding = {name: choice for name, choice in choices.items() if name not in _AFTER_FINDING}
            self._faces_key = avatar_key(digest, models.fingerprint, finding)
            if (hit := self._avatars.get(self._key)) is not None:
                self._kept, tier = hit
                logger.info("this source was prepared before", extra={"kept_in": tier})
            elif options.face_box is None and (known := self._avatars.known_faces(self._faces_key)) is not None:
                self._kept = known
        self._fixed = None if options.face_box is None else fixed_face(options.face_box, info.width, info.height)
        self._track: FaceTrack | None = None
        self._found: Sequence[Face | None] = ()
        self._is_whole = False
        self.n_frames = 0
        self.n_without_face = 0
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
            "face_search": options.face_search,
            "margin": [options.extra_margin, options.margin_share],
            "mask": [options.mask_mode, options.left_cheek_width, options.right_cheek_width, options.mask_blur],
            "match_colours": [options.match_colours, options.careful],
            "device_pixels": options.device_pixels,
            "boxes": [options.box_smoothing, options.max_gap_frames],
        }

    def find_faces(self, max_frames: int, should_stop: Callable[[], bool], *, until_first: bool = False) -> list[Box]:
        """Find the face of each of the first `max_frames` frames; returns the crop boxes found (without margin).

        Short gaps are interpolated and boxes smoothed as the options say. With a fixed face box nothing is decoded.
        With `until_first` the search ends at the first face where it can; the others are searched while the source is
        prepared. Raises NoFaceError when no frame shows a face, MediaError for a broken source, CancelledError.
        """
        if self._fixed is not None:
            return [self._fixed.box]
        self._track = track = FaceTrack(self._max_gap, self.options.box_smoothing)
        self._found, self._is_whole = self._kept.found, self._kept.is_whole
        known = self._kept.faces_of(max_frames)
        track.extend(self._kept.found if known is None else known)
        if known is not None:
            track.complete()
        elif not (until_first and self._is_searched_ahead and track.has_face):
            self._search(track, max_frames, should_stop, until_first=until_first and self._is_searched_ahead)
        if not track.has_face:
            raise NoFaceError("no frame of the source shows a face", frames=len(track.found))
        return track.boxes() or [face.box for face in track.found if face is not None]

    @property
    def _is_searched_ahead(self) -> bool:
        """Whether faces can be searched while the source is prepared: little waits, and the length is known."""
        info = self.info
        n_waiting = self.n_ahead + interval_for(info.width, info.height)
        is_kept = self.options.loop_mode in ("ping_pong", "loop") and info.n_frames is None
        return not is_kept and n_waiting * info.width * info.height * 3 // 2 <= _AHEAD_BYTES

    @property
    def boxes(self) -> list[Box]:
        """Crop boxes (without margin) of the frames whose face is known."""
        if self._fixed is not None:
            return [self._fixed.box]
        return [] if self._track is None else self._track.boxes()

    @property
    def n_interpolated(self) -> int:
        """Frames whose face lies in a short gap between two that were found."""
        return 0 if self._track is None else self._track.n_interpolated

    @property
    def _max_gap(self) -> int:
        max_gap = self.options.max_gap_frames
        return round(self.info.rate / 2) if max_gap is None else max_gap

    @property
    def n_ahead(self) -> int:
        """Frames behind one that have to be searched for its own box: smoothing looks at them, gaps end there."""
        return smoothing_reach(self.options.box_smoothing) + self._max_gap + 1

    def _search(self, track: FaceTrack, max_frames: int, should_stop: Callable[[], bool], *, until_first: bool) -> None:
        """Faces of the first `max_frames` frames; frames that were searched before are not searched again."""
        search = FrameSearch(self._new_search(), track.found)
        self._found = track.found
        with self._open(max_frames) as frames:
            for batch in _batched(islice(frames, len(track.found), None), FIND_BATCH):
                if should_stop():
                    raise CancelledError("the job was cancelled")
                for frame in batch:
                    track.extend(search.add(frame.planes, is_repeat=frame.is_repeat))
                    if until_first and track.has_face:
                        return
        self._end_search(track, search, max_frames)

    def _end_search(self, track: FaceTrack, search: FrameSearch, max_frames: int) -> None:
        track.extend(search.finish())
        track.complete()
        self._is_whole = len(track.found) < max_frames

    def _with_faces(
        self, frames: Iterator[media.SourceFrame], max_frames: int
    ) -> Generator[media.SourceFrame, None, None]:
        """The frames, each as soon as its face is known."""
        track = self._track
        if track is None or track.is_complete:
            yield from frames
            return
        n_known = len(track.found)
        search = FrameSearch(self._new_search(), track.found)
        self._found = track.found
        waiting: deque[media.SourceFrame] = deque()
        for frame in frames:
            waiting.append(frame)
            if frame.index >= n_known:
                with torch.cuda.stream(self._stream):
                    track.extend(search.add(frame.planes, is_repeat=frame.is_repeat))
            while waiting and waiting[0].index < track.n_settled:
                yield waiting.popleft()
        with torch.cuda.stream(self._stream):
            self._end_search(track, search, max_frames)
        yield from waiting

    def _new_search(self) -> FaceSearch:
        info, options = self.info, self.options
        size, matrix = (info.width, info.height), info.colour.matrix
        return start_search(self.models.faces, options.face_search, size, matrix, options.bbox_shift)

    def keep(self) -> None:
        """Leave what was prepared to later jobs, unless it is too large or nothing is new."""
        if self._avatars is not None and self._found:
            self._avatars.remember_faces(self._faces_key, Avatar(tuple(self._found), self._is_whole))
        is_new = bool(self._fresh) or len(self._found) > len(self._kept.found) or self._is_whole != self._kept.is_whole
        if self._avatars is None or not is_new or self._is_too_large():
            return
        avatar = Avatar(tuple(self._found), self._is_whole, {**self._kept.prepared, **self._fresh})
        self._avatars.put(self._key, avatar)

    def _is_too_large(self) -> bool:
        return self._avatars is None or self._kept.n_bytes + self._fresh_bytes > self._avatars.largest_bytes

    def count_frames(self, max_frames: int, should_stop: Callable[[], bool]) -> int:
        """Number of source frames, `max_frames` at most: headers only estimate it, so frames are decoded and counted.

        After a search for faces the number is known. Raises MediaError for a broken source, CancelledError.
        """
        if self._track is not None and self._track.is_complete:
            return len(self._track.found)
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
        is_counted = self._track is not None and self._track.is_complete
        expected = len(self._track.found) if self._track is not None and is_counted else self.info.n_frames
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

    def output_frame(self, index: int) -> tuple[Record, Box | None]:
        """The prepared picture of output frame `index` alone, and the face's box in it, without margin."""
        frame, n_seen = self._picture_at(index)
        if n_seen <= index:
            frame, _ = self._picture_at(source_index(self.options.loop_mode, index, n_seen))
        record = self._prepare([frame])[0]
        # Not kept: a whole video prepares it together with others, and keeps that to the last digit.
        self._fresh.clear()
        self._fresh_bytes = 0
        face = self._face(frame.index)
        return record, None if face is None else face.box

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
        return BackgroundReader(frames, depth=self._queue_depth(), name="decoder")

    def _queue_depth(self) -> int:
        return queue_depth(self.info.width * self.info.height * 3 // 2, self.options.batch_size)

    def _forward(self, max_frames: int) -> Generator[tuple[media.SourceFrame, Record], None, None]:
        """Decode from the first frame on, a batch at a time; repeated pictures share one record."""
        with ExitStack() as stack:
            decoded = stack.enter_context(self._open(max_frames))
            searched = self._with_faces(decoded, max_frames)
            frames: Iterator[media.SourceFrame] = searched
            if self.options.overlap:
                # Searching, encoding and decoding each in a thread of their own.
                reader = BackgroundReader(searched, depth=self._queue_depth(), name="searcher")
                frames = stack.enter_context(reader)
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
        frames, boxes = [frame.planes for frame, _ in places], [box for _, box in places]
        on_device = self._crops_on_device(frames, boxes)
        reads_planes = self._masking.reads_planes(boxes)
        for planes, box in zip(frames, boxes, strict=True) if on_device is None or not reads_planes else ():
            around = blend_box(box)
            region = _union(box, around).clipped(planes.width, planes.height)
            picture = planes_to_bgr(planes, self.info.colour.matrix, region)
            if on_device is None:
                crops.append(crop_patch(picture, box.shifted(-region.x0, -region.y0), self.models.generator.crop_px))
            if not reads_planes:
                squares.append(crop_for_parsing(picture, around.shifted(-region.x0, -region.y0)))
        with torch.cuda.stream(self._stream):
            latents = list(self._latents(np.stack(crops) if on_device is None else on_device))
            labels = list(self._masking.labels(frames, boxes, squares))
        originals: list[UInt8Array | None] = [None] * len(places)
        lips: list[NDArray[np.float32] | None] = [None] * len(places)
        if self.options.careful and on_device is None:
            for index, (frame, box) in enumerate(places):
                if not is_demo_portrait(crops[index]):
                    originals[index] = self._original(crops[index], latents[index])
                    labels[index] = self._mouth_labels(frame.index, box, labels[index])
                    lips[index] = self._lip_colour(frame.index, box, crops[index])
        for index, plan in enumerate(self._masking.plans(labels, boxes, frames)):
            original = originals[index]
            band = colour_band(crops[index]) if self.options.match_colours and original is None else None
            yield PreparedFace(plan, latents[index], band, original, lips[index])

    def _original(self, crop: UInt8Array, latents: NDArray[Any]) -> UInt8Array:
        """The crop, and what the VAE makes of it, (2, s, s, 3)."""
        reference = torch.from_numpy(latents[None, len(latents) // 2 :])
        return np.stack([crop, to_bgr(self.models.generator.decode(reference))[0]])

    def _mouth_labels(self, index: int, box: Box, labels: UInt8Array) -> UInt8Array:
        """Mouth and chin by the landmarks; the parser's own labels where there are none (a given face box)."""
        face = self._face(index)
        return labels if face is None or face.landmarks is None else mouth_labels(face.landmarks, blend_box(box))

    def _lip_colour(self, index: int, box: Box, crop: UInt8Array) -> NDArray[np.float32] | None:
        face = self._face(index)
        return None if face is None or face.landmarks is None else lip_colour(crop, face.landmarks, box)

    def _face(self, index: int) -> Face | None:
        if self._fixed is not None:
            return self._fixed
        assert self._track is not None, "find_faces comes first"
        return self._track.face(index)

    def _crops_on_device(self, frames: Sequence[Planes], boxes: Sequence[Box]) -> torch.Tensor | None:
        """All crops, cut where the networks run; None where they are cut on the CPU (colours are matched there)."""
        if not self.options.device_pixels or self.options.match_colours:
            return None
        generator = self.models.generator
        with torch.cuda.stream(self._stream):
            return crop_patches(frames, boxes, generator.crop_px, self.info.colour.matrix, generator.device)

    def _latents(self, crops: UInt8Array | torch.Tensor) -> Iterator[NDArray[Any]]:
        for part in self._batches.run(lambda part: self.models.generator.encode(crops[part]), len(crops)):
            # NumPy has no bfloat16; float32 represents it without loss.
            yield from (part.float() if part.dtype == torch.bfloat16 else part).cpu().numpy()


def _union(first: Box, second: Box) -> Box:
    return Box(min(first.x0, second.x0), min(first.y0, second.y0), max(first.x1, second.x1), max(first.y1, second.y1))


def _batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
