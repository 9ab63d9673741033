"""One video, from local files to a local file: probe, prepare, generate, finish; streaming from decoder to encoder.

The source is read up to its first face, so that a missing one is reported before anything is generated, and then from
its start: each picture is searched, prepared once, drawn and pasted on its way. Where the plan depends on all faces (a
crop around them) or on the source's length, all of it is searched first. With a given face box nothing is.
Knows nothing of jobs, HTTP or the environment.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import media
from musetalk.audio import SAMPLE_RATE, hushed, n_output_frames, windows_of
from musetalk.avatars import AvatarCache, PreparedFace
from musetalk.batches import Batches, queue_depth
from musetalk.blending import match_colours
from musetalk.crowding import ThreadsByCrowding
from musetalk.device_pixels import write_region
from musetalk.devices import gpu_errors, peak_memory_mib, release_memory, reset_peak_memory
from musetalk.errors import CancelledError, MediaError, NoFaceError, RequestError
from musetalk.frame_store import FrameStore
from musetalk.frames import Matrix, Planes, UInt8Array
from musetalk.generator import PendingPatches
from musetalk.geometry import Box, median_box
from musetalk.models import Models
from musetalk.options import RenderOptions
from musetalk.output_geometry import OutputPlan, parse_request, plan_output
from musetalk.pasting import device_paste, paste
from musetalk.preparing import Record, SourcePreparer
from musetalk.restoration import SteadyRestoration
from musetalk.silence import quiet_spans, speech_weights
from musetalk.strangers import give_back
from musetalk.streaming import BackgroundReader, BackgroundWriter

# A long stretch without a face is passed through instead of waiting for a batch of faces behind it.
MAX_PENDING_BATCHES = 4
# Chunks that wait for the GPU while the next is launched: with one the GPU idles whenever a launch takes longer.
MAX_CHUNKS_AHEAD = 2
# Finished pictures that wait for the encoder: it takes longer for some than for others.
_PASTED_AHEAD = 4
# Beyond this the network's picture (256 px for MuseTalk) is visibly stretched.
LARGE_FACE_FACTOR = 2


@dataclass(frozen=True)
class RenderSummary:
    """Figures of a finished video, for the result and the log."""

    width: int
    height: int
    rate: Fraction
    n_frames: int
    duration_s: float
    n_bytes: int
    n_source_frames: int
    n_without_face: int
    n_interpolated: int
    n_reused: int
    generator_s: float
    encoder: str
    warnings: tuple[str, ...]
    model: str
    options: RenderOptions
    peak_gpu_memory_mib: float | None


@dataclass(frozen=True)
class Preview:
    """One picture of a video, as it goes to the encoder; shown from `time_s` on."""

    planes: Planes
    matrix: Matrix
    index: int
    time_s: float
    warnings: tuple[str, ...] = ()
    model: str = ""
    # Of the whole video, in s; the face as it was found in the source's picture, in px, without margin.
    duration_s: float = 0.0
    face_box: Box | None = None
    source_size: tuple[int, int] = (0, 0)

    def save(self, path: Path) -> None:
        """Write it as PNG or JPEG, by the name. Raises EncodeError or DiskFullError."""
        media.write_picture(path, self.planes, self.matrix)


# A record, its patch or pasted region, and which of the two it is.
_Item = tuple[Record, UInt8Array | None, bool]


@dataclass
class _Part:
    """Patches that are on their way, or, `is_pasted`, regions with the patches in them.

    `is_shown` says for each face whether there is one: for an empty region nothing is pasted.
    """

    pending: PendingPatches
    is_pasted: bool
    is_shown: Sequence[bool]

    def results(self) -> Iterator[tuple[UInt8Array | None, bool]]:
        """The patch or region of each face; waits for them."""
        arrived = iter(self.pending.result())
        for is_shown in self.is_shown:
            yield (next(arrived) if is_shown else None), self.is_pasted


@dataclass
class _Chunk:
    """Consecutive output frames whose patches were started together."""

    records: tuple[Record, ...]
    parts: list[_Part] = field(default_factory=list)


class _ChunkQueue:
    """Chunks between the networks and the encoder, in order: some are computed while the next is launched."""

    def __init__(self, sink: BackgroundWriter[_Item], on_done: Callable[[int], None]) -> None:
        self._sink, self._on_done = sink, on_done
        self._under_way: deque[_Chunk] = deque()
        self.n_launched = self.n_done = 0
        self.waited_s = 0.0

    def add(self, chunk: _Chunk) -> None:
        """Add a launched chunk; pass on those before it, and itself if it is finished."""
        self._under_way.append(chunk)
        self.n_launched += len(chunk.records)
        while len(self._under_way) > MAX_CHUNKS_AHEAD or (self._under_way and self._is_finished(self._under_way[0])):
            self._pass_on(self._under_way.popleft())

    def finish(self) -> None:
        """Pass on the remaining chunks."""
        while self._under_way:
            self._pass_on(self._under_way.popleft())

    @staticmethod
    def _is_finished(chunk: _Chunk) -> bool:
        return all(part.pending.is_here for part in chunk.parts)

    def _pass_on(self, chunk: _Chunk) -> None:
        started = time.monotonic()
        patches = iter([result for part in chunk.parts for result in part.results()])
        self.waited_s += time.monotonic() - started
        for record in chunk.records:
            self._sink.put((record, None, False) if record.face is None else (record, *next(patches)))
        self.n_done += len(chunk.records)
        self._on_done(self.n_done)


class RenderSession:
    """One video in the making; call probe, prepare, generate, finish in this order inside a `with` block.

    Leaving the block before `finish` removes every file that was begun.
    """

    def __init__(
        self,
        models: Models,
        source: Path,
        audio: Path,
        output: Path | None,
        options: RenderOptions,
        *,
        limits: media.MediaLimits | None = None,
        encoder: media.EncoderSettings | None = None,
        avatars: AvatarCache | None = None,
    ) -> None:
        """`output` may be None if only a preview is needed."""
        self.models, self.options = models, options
        self._source_path, self._audio_path, self._output_path = source, audio, output
        self._limits = limits or media.MediaLimits()
        self._encoder = encoder or media.EncoderSettings()
        self._avatars = avatars
        self._batches = Batches(options.batch_size)
        self._warnings: list[str] = []
        self._stack = ExitStack()
        # How much each output frame shows of the mouth that speaks; None where pauses are not looked for.
        self._speech: NDArray[np.float64] | None = None
        self.generator_s = 0.0
        self._restoration: SteadyRestoration | None = None
        if options.restore > 0 and models.restorer is not None:
            self._restoration = SteadyRestoration(models.restorer, options.restore)

    def __enter__(self) -> RenderSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is not None:
            release_memory(self.models.device)

    def probe(self) -> None:
        """Look at both files; raises MediaError for what cannot or may not be rendered."""
        reset_peak_memory(self.models.device)
        if self.models.version != "v1" and self.options.bbox_shift != 0:
            raise RequestError(
                "params.bbox_shift has an effect with MuseTalk v1.0 only; leave it out", field="params.bbox_shift"
            )
        if self.options.restore > 0 and self.models.restorer is None:
            raise RequestError(
                "params.restore needs a worker with a restorer (MUSETALK_RESTORER); leave it out",
                field="params.restore",
            )
        parse_request(self.options.aspect_ratio, self.options.resolution)
        self._source, self._audio = media.probe_both(self._source_path, self._audio_path, self._limits)
        self._preparer = SourcePreparer(
            self.models,
            self._source_path,
            self._source,
            self.options,
            self._limits,
            self._batches,
            self._avatars,
        )

    def prepare(self, should_stop: Callable[[], bool] = lambda: False, *, preview_s: float | None = None) -> None:
        """Read the sound, fix the output's length and find the faces; for a preview, those near its time (s) alone.

        Raises MediaError when the audio or the source cannot be used, NoFaceError when no frame shows a face,
        CancelledError when `should_stop()` says so.
        """
        waveform = media.read_waveform(self._audio_path, self._audio, self._limits, on_warning=self._warnings.append)
        self._audio_duration = Fraction(len(waveform), SAMPLE_RATE)
        self.n_frames = n_output_frames(len(waveform), self._source.rate)
        if self.options.loop_mode != "trim":
            self._check_length()
        if self.options.silence != "generate":
            spans = quiet_spans(waveform)
            self._speech = speech_weights(spans, len(waveform), self.n_frames, self._source.rate)
        _check(should_stop)
        with gpu_errors():
            self._features = self.models.audio.features(waveform)
            if self.options.silence == "closed":
                # Computed once, and not in the middle of a launch.
                self.models.audio.silent_window()
            _check(should_stop)
            boxes = self._find_faces(should_stop, preview_s)
        if self.options.loop_mode == "trim":
            self._trim(should_stop)
            self._check_length()
        self._plan = self._plan_output(boxes)

    def _find_faces(self, should_stop: Callable[[], bool], preview_s: float | None) -> list[Box]:
        options = self.options
        # The end of the source and a crop around the median face are known only when all was looked at.
        looks_at_all = options.loop_mode == "trim" or options.aspect_ratio or options.resolution
        if preview_s is not None and not looks_at_all:
            n_near = self._index_at(preview_s) + 1 + self._preparer.n_ahead
            try:
                return self._preparer.find_faces(min(n_near, self.n_frames), should_stop)
            except NoFaceError:
                if n_near >= self.n_frames:
                    raise
        # A whole video is searched while it is prepared, unless its plan depends on all faces or their number.
        until_first = preview_s is None and not looks_at_all
        return self._preparer.find_faces(self.n_frames, should_stop, until_first=until_first)

    def _index_at(self, time_s: float) -> int:
        """The output frame that is shown at a time; raises RequestError when there is none."""
        duration = float(self.n_frames / self._source.rate)
        if not 0 <= time_s <= duration:
            raise RequestError(f"the preview's time must be from 0 to {duration:.3f} s", field="time_s")
        # Times are reported in milliseconds: the rounded start of a frame must mean this frame and not the one before.
        return min(int((Fraction(time_s) + Fraction(1, 2000)) * self._source.rate), self.n_frames - 1)

    def _check_length(self) -> None:
        if self.n_frames > self._limits.max_frames:
            raise MediaError(
                f"the output would have {self.n_frames} frames; at most {self._limits.max_frames} are allowed",
                frames=self.n_frames,
                limit=self._limits.max_frames,
            )

    def _trim(self, should_stop: Callable[[], bool]) -> None:
        """End the output, picture and sound, with the source; a still has no end, it is shown as long as the sound."""
        if self._source.kind == "still":
            return
        n_source = self._preparer.count_frames(self.n_frames, should_stop)
        if n_source >= self.n_frames:
            return
        # Fewer whole frames than the sound reaches: always shorter than the sound.
        shown, spoken = n_source / self._source.rate, self._audio_duration
        self.n_frames, self._audio_duration = n_source, shown
        self._warnings.append(
            f"the speech was cut: {float(shown):.2f} of its {float(spoken):.2f} s are in the video, as the source ends"
        )

    def _plan_output(self, boxes: list[Box]) -> OutputPlan:
        """Size and crop of the output, fixed for the clip by the median face."""
        plan = plan_output(
            self._source.width,
            self._source.height,
            median_box(boxes),
            self.options.aspect_ratio,
            self.options.resolution,
        )
        self._warnings.extend(plan.warnings)
        return plan

    def generate(
        self,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Generate and encode all frames; `on_progress(done, total)` and `should_stop()` are called between batches.

        Raises CancelledError, OutOfMemoryError when one frame does not fit the GPU, MediaError for a source that turns
        out broken, EncodeError or DiskFullError when the output cannot be written.
        """
        assert self._output_path is not None, "there is nowhere to write to"
        self._writer = self._stack.enter_context(
            media.VideoWriter(
                self._output_path,
                width=self._plan.width,
                height=self._plan.height,
                rate=self._source.rate,
                colour=self._source.colour,
                n_frames=self.n_frames,
                audio_path=self._audio_path,
                audio_duration=self._audio_duration,
                settings=self._encoder,
                limits=self._limits,
            )
        )
        options, pending = self.options, list[Record]()
        depth = queue_depth(self._source.width * self._source.height * 3 // 2, options.batch_size)
        with (
            gpu_errors(),
            BackgroundWriter(self._writer.write, depth=_PASTED_AHEAD, name="encoder") as encoder,
            BackgroundWriter[_Item](lambda item: encoder.put(self._picture(item)), depth=depth, name="paster") as sink,
            FrameStore(
                self._output_path.parent,
                memory_bytes=options.frame_memory_bytes,
                disk_bytes=options.scratch_disk_bytes,
            ) as store,
            # Closed here and not by the garbage collector: an error's traceback would keep the decoder open.
            closing(self._records(store)) as records,
            ThreadsByCrowding() if options.yields_cores else nullcontext() as threads,
        ):
            chunks = _ChunkQueue(sink, lambda done: on_progress(done, self.n_frames))
            for index, record in enumerate(records):
                pending.append(self._in_speech(record, index))
                n_faces = sum(waiting.face is not None for waiting in pending)
                if n_faces >= options.batch_size or len(pending) >= MAX_PENDING_BATCHES * options.batch_size:
                    _check(should_stop)
                    chunks.add(self._launch(pending, chunks.n_launched))
                    pending.clear()
                    if threads is not None:
                        threads.adjust()
            _check(should_stop)
            chunks.add(self._launch(pending, chunks.n_launched))
            chunks.finish()
            self.generator_s += chunks.waited_s
        self._preparer.keep()

    def preview(self, time_s: float) -> Preview:
        """The picture of the output frame shown at `time_s`, instead of `generate` and `finish`.

        That of the whole video but for the rounding of single levels: there it is computed in a batch with others.
        Raises RequestError when the video is shorter, else as `generate`.
        """
        index = self._index_at(time_s)
        with gpu_errors():
            record, face_box = self._preparer.output_frame(index)
            record = self._in_speech(record, index)
            parts = self._launch([record], index).parts
            patches = [result for part in parts for result in part.results()]
        self._preparer.keep()
        patch, is_pasted = patches[0] if patches else (None, False)
        return Preview(
            self._picture((record, patch, is_pasted)),
            self._source.colour.matrix,
            index,
            float(index / self._source.rate),
            self._all_warnings(),
            self.models.version,
            float(self.n_frames / self._source.rate),
            face_box,
            (self._source.width, self._source.height),
        )

    def _records(self, store: FrameStore) -> Generator[Record, None, None] | BackgroundReader[Record]:
        """The prepared frames in order; with overlap they are prepared in a thread, a batch or two ahead."""
        records = self._preparer.in_output_order(self.n_frames, store)
        if not self.options.overlap:
            return records
        return BackgroundReader(records, depth=2 * self.options.batch_size, name="preparer")

    def _in_speech(self, record: Record, index: int) -> Record:
        """The record for output frame `index`: in a pause the source, if the options say so."""
        if self.options.silence != "source" or self._speech is None:
            return record
        return record.faded(float(self._speech[index]))

    def _windows(self, indices: Sequence[int]) -> torch.Tensor:
        """Audio windows (n, tokens, d) of output frames; silence where the mouth stays shut."""
        windows = windows_of(self._features, indices, self._source.rate)
        if self.options.silence != "closed" or self._speech is None:
            return windows
        weights = self._speech[list(indices)]
        return windows if weights.min() == 1 else hushed(windows, self.models.audio.silent_window(), weights)

    def _launch(self, records: list[Record], first: int) -> _Chunk:
        """Start the patches of consecutive output frames, the first of which has index `first`."""
        with_face = [index for index, record in enumerate(records) if record.face is not None]
        chunk = _Chunk(tuple(records))
        if not with_face:
            return chunk
        started = time.monotonic()
        windows = self._windows([first + index for index in with_face])
        faces = [(record.planes, record.face) for record in records if record.face is not None]
        latents = torch.from_numpy(np.stack([face.latents for _, face in faces]))
        chunk.parts = self._batches.run(
            lambda part: self._start(latents[part], windows[part], faces[part]), len(with_face)
        )
        self.generator_s += time.monotonic() - started
        return chunk

    def _start(self, latents: torch.Tensor, windows: torch.Tensor, faces: list[tuple[Planes, PreparedFace]]) -> _Part:
        generator, restore = self.models.generator, self._restoration
        # Where colours are matched to the source, the CPU does it, and pastes.
        is_matched = any(face.band is not None or face.original is not None for _, face in faces)
        if is_matched or not self.options.device_pixels:
            return _Part(generator.start(latents, windows, restore), False, [True] * len(faces))
        finish, is_shown = device_paste(faces, self._source.colour.matrix, self.options.detail, restore)
        return _Part(generator.start(latents, windows, finish), True, is_shown)

    def _picture(self, item: _Item) -> Planes:
        """Paste into a copy (the record may be shown again), crop or scale."""
        record, patch, is_pasted = item
        planes, face = record.planes, record.face
        if face is not None and patch is not None:
            planes = planes.copy()
            if is_pasted:
                write_region(planes, face.plan.region, patch)
            else:
                if face.original is not None:
                    patch = give_back(patch, face.original, face.lips)
                elif face.band is not None:
                    patch = match_colours(patch, face.band)
                paste(planes, face.plan, patch, self._source.colour.matrix, self.options.detail)
        return media.fit_planes(planes, self._plan.crop, (self._plan.width, self._plan.height))

    def _all_warnings(self) -> tuple[str, ...]:
        """Warnings about the source, the audio, the output and the face, each once."""
        return tuple(dict.fromkeys([*self._preparer.warnings, *self._warnings, *self._size_warnings()]))

    def _size_warnings(self) -> list[str]:
        """What is to be said of the faces' size; known when all were found."""
        if not (boxes := self._preparer.boxes):
            return []
        median, drawn = median_box(boxes), self.models.generator.crop_px
        side = max(median.width, median.height)
        if side <= LARGE_FACE_FACTOR * drawn:
            return []
        return [f"the face is about {side} px large and is drawn at {drawn} px: it will look soft"]

    def finish(self) -> RenderSummary:
        """Close and check the file; only then does it get its name. Raises EncodeError if it is wrong."""
        info = self._writer.close()
        return RenderSummary(
            width=info.width,
            height=info.height,
            rate=info.rate,
            n_frames=info.n_frames,
            duration_s=float(info.duration),
            n_bytes=info.n_bytes,
            n_source_frames=self._preparer.n_frames,
            n_without_face=self._preparer.n_without_face,
            n_interpolated=self._preparer.n_interpolated,
            n_reused=self._preparer.n_reused,
            generator_s=self.generator_s,
            encoder=info.codec,
            warnings=self._all_warnings(),
            model=self.models.version,
            options=self.options,
            peak_gpu_memory_mib=peak_memory_mib(self.models.device),
        )


def _check(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise CancelledError("the job was cancelled")
