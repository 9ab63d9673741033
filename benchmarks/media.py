"""Everything of a job but the networks: this worker's way against the way of the original scripts.

    .venv/bin/python -m benchmarks.media [--frames 100] [--sizes 720p,1080p] [--json FILE]
    .venv/bin/python -m benchmarks.media --decoding      only: decoding in a process of its own against decoding here
    .venv/bin/python -m benchmarks.media --encoders      only: x264's presets and NVENC on the same pictures
    .venv/bin/python -m benchmarks.media --clip FILE --audio FILE [--face-box X0,Y0,X1,Y1]

Ours streams: decode, crop and mask once per source frame, paste in the planes, one x264 encode with the sound in it.
The original's order, rewritten for this comparison: all source frames to PNG, all of them read into memory, the mask
built and the whole picture blended by Pillow for each output frame, PNG again, x264, and a second x264 pass that adds
the sound. Both sides get a constant parse map and eight canned patches for the networks, and turn the parse map into a
mask with the same function, ours once per source frame, the other once per output frame as the original does.

Each side runs in a process of its own. Seconds and CPU seconds count from after the imports; peak memory is the whole
process, with what the imports alone took beside it. No face is looked for, nothing is downloaded or uploaded.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.media(__doc__)

import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import psutil

from benchmarks.arguments import FRAME_SIZES, PNG_FILTERS
from benchmarks.encoders import encoder_rows, measure_encoders
from benchmarks.material import RATE, centred_box, make_audio, make_clip
from benchmarks.measuring import cpu_seconds, machine, memory
from benchmarks.original import blend_whole, dump_source, encode_again, encode_pictures, read_picture
from musetalk import media
from musetalk.batches import QUEUE_DEPTH
from musetalk.blending import PastePlan, blend_mask, crop_for_parsing, face_mask, paste_planes
from musetalk.frames import Matrix, Planes, UInt8Array, planes_to_bgr
from musetalk.generator import crop_patch
from musetalk.geometry import Box, blend_box
from musetalk.media import reading
from musetalk.streaming import BackgroundReader, BackgroundWriter

ROOT = Path(__file__).resolve().parent.parent
PATCH_PX = 256
N_PATCHES = 8
# The run that shows whether memory grows is this many times longer.
LONGER = 4
# A longer run may take this share more memory and still be called flat.
FLAT_WITHIN = 0.1


@dataclass(frozen=True)
class Job:
    """Task of one side: the first `n_frames` frames of `clip`, with `audio`, into `folder / "out.mp4"`."""

    clip: Path
    audio: Path
    folder: Path
    n_frames: int
    box: Box
    png_filter: str = PNG_FILTERS[0]
    preset: str = "veryfast"

    @property
    def output(self) -> Path:
        """Path of the finished video."""
        return self.folder / "out.mp4"


@dataclass(frozen=True)
class Report:
    """Resources of one side: CPU is user and system of the process and its children; memory in bytes."""

    side: str
    n_frames: int
    cpu_s: float
    wall_s: float
    peak_rss: int
    imports_rss: int
    temporary_disk: int
    output_bytes: int


# -- the networks' stand-ins ------------------------------------------------------------------------------------------


def canned_patches() -> list[UInt8Array]:
    """Eight face-like pictures, BGR uint8 (256, 256, 3), with a mouth that opens."""
    rng = np.random.default_rng(7)
    grain = cv2.GaussianBlur(rng.normal(0, 40, (PATCH_PX, PATCH_PX, 3)), (0, 0), 1.5)
    patches = []
    for index in range(N_PATCHES):
        patch = np.full((PATCH_PX, PATCH_PX, 3), (120, 150, 205), np.float64) + grain
        cv2.ellipse(patch, (128, 190), (45, 6 + 3 * index), 0, 0, 360, (50, 40, 120), -1)
        patches.append(np.clip(patch, 0, 255).astype(np.uint8))
    return patches


def canned_labels() -> UInt8Array:
    """Classes of a face that fills the parsed square, uint8 (512, 512): skin, nose and mouth."""
    labels = np.zeros((512, 512), np.uint8)
    cv2.ellipse(labels, (256, 256), (160, 215), 0, 0, 360, 1, -1)
    cv2.ellipse(labels, (256, 260), (28, 40), 0, 0, 360, 10, -1)
    cv2.ellipse(labels, (256, 345), (60, 22), 0, 0, 360, 12, -1)
    return labels


# -- ours -------------------------------------------------------------------------------------------------------------


def prepare_frame(planes: Planes, labels: UInt8Array, box: Box, matrix: Matrix) -> tuple[PastePlan, UInt8Array]:
    """Work done once for a source frame: the crop for the encoder, and the place of the patch."""
    around = blend_box(box)
    region = around.clipped(planes.width, planes.height)
    picture = planes_to_bgr(planes, matrix, region)
    crop = crop_patch(picture, box.shifted(-region.x0, -region.y0), PATCH_PX)
    crop_for_parsing(picture, around.shifted(-region.x0, -region.y0))
    soft = blend_mask(face_mask(labels, "jaw"), box, around)
    return PastePlan.prepare(soft, box, around, planes.width, planes.height), crop


def run_ours(job: Job) -> int:
    """The worker's own path; returns the number of frames written."""
    patches, labels = canned_patches(), canned_labels()
    limits = media.MediaLimits()
    info = media.inspect_source(job.clip, limits)
    matrix = info.colour.matrix
    writer = media.VideoWriter(
        job.output,
        width=info.width,
        height=info.height,
        rate=info.rate,
        colour=info.colour,
        n_frames=job.n_frames,
        audio_path=job.audio,
        audio_duration=job.n_frames / info.rate,
        settings=media.EncoderSettings(preset=job.preset),
    )

    def paste_and_encode(item: tuple[Planes, PastePlan, UInt8Array]) -> None:
        planes, plan, patch = item
        planes = planes.copy()
        paste_planes(planes, plan, patch, matrix)
        writer.write(planes)

    source = media.read_source(job.clip, info, limits, max_frames=job.n_frames)
    with writer:
        with (
            BackgroundWriter(paste_and_encode, depth=QUEUE_DEPTH, name="encoder") as sink,
            BackgroundReader(source, depth=QUEUE_DEPTH, name="decoder") as frames,
        ):
            plan: PastePlan | None = None
            for frame in frames:
                if plan is None or not frame.is_repeat:
                    plan, _crop = prepare_frame(frame.planes, labels, job.box, matrix)
                sink.put((frame.planes, plan, patches[frame.index % N_PATCHES]))
        return writer.close().n_frames


# -- the original's way -----------------------------------------------------------------------------------------------


def run_upstream(job: Job) -> int:
    """The original's order of work with its settings; returns the number of frames of the second pass."""
    patches, labels = canned_patches(), canned_labels()
    sources, results = job.folder / "source", job.folder / "result"
    sources.mkdir()
    results.mkdir()
    rate = dump_source(job.clip, sources, job.n_frames, job.png_filter)
    frames = [read_picture(path) for path in sorted(sources.iterdir())]
    box, around = job.box, blend_box(job.box)
    crops = []
    for frame in frames:
        part = frame[box.y0 : box.y1, box.x0 : box.x1]
        crops.append(cv2.resize(part, (PATCH_PX, PATCH_PX), interpolation=cv2.INTER_LANCZOS4))
    for index, source in enumerate(frames):
        frame = copy.deepcopy(source)
        face = cv2.resize(patches[index % N_PATCHES], (box.width, box.height))
        blended = blend_whole(frame, np.asarray(face, np.uint8), labels, box, around)
        cv2.imwrite(str(results / f"{index:08d}.png"), blended)
    silent = job.folder / "silent.mp4"
    encode_pictures(results, silent, rate)
    return encode_again(silent, job.audio, job.output)


SIDES: dict[str, Callable[[Job], int]] = {"ours": run_ours, "upstream": run_upstream}


# -- one side, in the child process -----------------------------------------------------------------------------------


def measure(side: str, job: Job) -> Report:
    """Do the whole job once in this process and say what it took."""
    if side == "ours":
        # The server is started once for all jobs of a worker; its imports are left out like our own.
        media.probe_source(job.clip, media.MediaLimits())
    imports_rss, cpu, wall = memory("VmRSS"), cpu_seconds() + _decoder_seconds(), time.monotonic()
    n_frames = SIDES[side](job)
    return Report(
        side=side,
        n_frames=n_frames,
        cpu_s=cpu_seconds() + _decoder_seconds() - cpu,
        wall_s=time.monotonic() - wall,
        peak_rss=memory("VmHWM"),
        imports_rss=imports_rss,
        # Neither side removes anything, so the files beside the result show what was needed.
        temporary_disk=sum(path.stat().st_size for path in job.folder.rglob("*") if path.is_file())
        - job.output.stat().st_size,
        output_bytes=job.output.stat().st_size,
    )


def _decoder_seconds() -> float:
    """CPU seconds of the decoder server and of its processes, all of which have ended."""
    pid = media.decoder_pid()
    if pid is None:
        return 0.0
    server = psutil.Process(pid)
    while server.children():
        # Its seconds count once the server has reaped it.
        time.sleep(0.001)
    times = server.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def compare_decoding(clip: Path, n_frames: int) -> str:
    """What decoding in a process of its own costs: milliseconds a frame here and there, one after the other."""
    limits = media.MediaLimits()
    info = media.probe_source(clip, limits)

    def in_this_process() -> None:
        for _ in reading.read_source(clip, info, limits, max_frames=n_frames):
            pass

    def apart() -> None:
        for _ in media.read_source(clip, info, limits, max_frames=n_frames):
            pass

    lines = []
    for name, read in (("in this process", in_this_process), ("in a process of its own", apart)) * 3:
        wall, cpu = time.monotonic(), cpu_seconds() + _decoder_seconds()
        read()
        spent = cpu_seconds() + _decoder_seconds() - cpu, time.monotonic() - wall
        lines.append(
            f"decoding {name}: {1000 * spent[0] / n_frames:.2f} ms CPU, {1000 * spent[1] / n_frames:.2f} ms wall"
        )
    return "\n".join([f"{info.width}x{info.height}, per frame of {n_frames}, three rounds", *lines])


def run_side(side: str, job: Job) -> Report:
    """Run one side in a fresh process and check the video it made."""
    job.folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.media", "--side", side, "--frames", str(job.n_frames)]
    command += ["--clip", str(job.clip), "--audio", str(job.audio), "--folder", str(job.folder)]
    command += ["--face-box", ",".join(map(str, job.box)), "--png-filter", job.png_filter, "--preset", job.preset]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    report = Report(**json.loads(done.stdout.splitlines()[-1]))
    check_output(side, job)
    shutil.rmtree(job.folder)
    return report


def check_output(side: str, job: Job) -> None:
    """Raise RuntimeError unless the video contains every requested picture and sound of the same length."""
    n_frames, sound_s, rate = describe(job.output)
    if n_frames != job.n_frames:
        raise RuntimeError(f"{side} made {n_frames} frames of {job.n_frames}")
    # The slack is one block of the decoder and the encoder's padding.
    if sound_s is None or abs(sound_s - float(job.n_frames / rate)) > 0.2:
        raise RuntimeError(f"{side} made {sound_s} s of sound for {job.n_frames} frames")


def describe(path: Path) -> tuple[int, float | None, Fraction]:
    """(number of pictures, seconds of sound or None, frame rate) of a video, counted in its packets."""
    n_frames, sound_s = 0, None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for packet in container.demux():
            if packet.pts is None:
                continue
            if packet.stream.type == "video":
                n_frames += 1
            elif packet.stream.type == "audio":
                sound_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
        assert stream.average_rate is not None
        return n_frames, sound_s, Fraction(stream.average_rate)


# -- the parent -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One clip to measure: `n_available` frames in it, `n_frames` of them for the comparison."""

    name: str
    clip: Path
    audio: Path
    box: Box
    n_frames: int
    n_available: int


@dataclass(frozen=True)
class Result:
    """Result of a case; `longer` is ours on more frames (None: the clip has no more)."""

    name: str
    ours: Report
    upstream: Report
    longer: Report | None

    @property
    def cpu_ratio(self) -> float:
        """CPU of upstream by CPU of ours."""
        return self.upstream.cpu_s / self.ours.cpu_s

    @property
    def growth(self) -> float | None:
        """Growth of memory in the longer run, as a share."""
        return None if self.longer is None else self.longer.peak_rss / self.ours.peak_rss - 1


def synthetic_case(name: str, n_frames: int, folder: Path) -> Case:
    """A case with a clip and sound made for it, long enough for the longer run."""
    size, face = FRAME_SIZES[name]
    clip, audio = folder / f"{name}.mp4", folder / f"{name}.wav"
    make_clip(clip, size, face, LONGER * n_frames)
    make_audio(audio, LONGER * n_frames / RATE)
    return Case(name, clip, audio, centred_box(size, face), n_frames, LONGER * n_frames)


def given_case(clip: Path, audio: Path, n_frames: int, box: Box | None) -> Case:
    """A case with files of the caller's; the face is assumed in the middle and a third of the height if not said."""
    info = media.probe_source(clip, media.MediaLimits())
    n_available, _, _ = describe(clip)
    side = round(info.height * 0.35)
    box = box or centred_box((info.width, info.height), (side, side))
    return Case(f"{info.width}x{info.height}", clip, audio, box, min(n_frames, n_available), n_available)


def run_case(case: Case, folder: Path, png_filter: str, preset: str) -> Result:
    """Both sides of one case, one after the other, then ours again on more frames."""

    def job(name: str, n_frames: int) -> Job:
        return Job(case.clip, case.audio, folder / f"{case.name}-{name}", n_frames, case.box, png_filter, preset)

    ours = run_side("ours", job("ours", case.n_frames))
    upstream = run_side("upstream", job("upstream", case.n_frames))
    if ours.n_frames != upstream.n_frames:
        raise RuntimeError(f"ours made {ours.n_frames} frames, upstream {upstream.n_frames}")
    n_longer = min(case.n_available, LONGER * case.n_frames)
    longer = run_side("ours", job("longer", n_longer)) if n_longer > case.n_frames else None
    return Result(case.name, ours, upstream, longer)


def table(results: list[Result]) -> str:
    """The results as text: a line for each side of each size, then what the longer runs say."""
    header = f"{'size':<10}{'side':<10}{'frames':>7}{'CPU ms':>9}{'wall ms':>9}{'RSS MB':>8}{'disk MB':>9}{'out MB':>8}"
    lines = ["CPU and wall per output frame; RSS is the peak of the process", header]
    for result in results:
        lines += [_row(result.name, report) for report in (result.ours, result.upstream)]
        ours, upstream = result.ours, result.upstream
        lines.append(
            f"{'':<10}upstream / ours: CPU {result.cpu_ratio:.1f}x, wall {upstream.wall_s / ours.wall_s:.1f}x,"
            f" RSS {upstream.peak_rss / ours.peak_rss:.1f}x"
        )
    for result in results:
        if result.longer is None or result.growth is None:
            lines.append(f"{result.name}: the clip has no more frames for a longer run")
            continue
        verdict = "flat" if result.growth <= FLAT_WITHIN else "NOT flat"
        lines.append(
            f"{result.name} ours: {_mb(result.ours.peak_rss):.0f} MB at {result.ours.n_frames} frames,"
            f" {_mb(result.longer.peak_rss):.0f} MB at {result.longer.n_frames} ({result.growth:+.1%}): {verdict};"
            f" {_mb(result.ours.imports_rss):.0f} MB of it are the imports;"
            f" {_per_frame_ms(result.longer.cpu_s, result.longer):.1f} ms CPU per frame in the longer run"
        )
    return "\n".join(lines)


def _row(name: str, report: Report) -> str:
    return (
        f"{name:<10}{report.side:<10}{report.n_frames:>7}{_per_frame_ms(report.cpu_s, report):>9.1f}"
        f"{_per_frame_ms(report.wall_s, report):>9.1f}{_mb(report.peak_rss):>8.0f}"
        f"{_mb(report.temporary_disk):>9.1f}{_mb(report.output_bytes):>8.2f}"
    )


def _per_frame_ms(seconds: float, report: Report) -> float:
    return 1000 * seconds / report.n_frames


def _mb(n_bytes: int) -> float:
    return n_bytes / 2**20


def as_json(results: list[Result], png_filter: str) -> dict[str, Any]:
    """All numbers: seconds, bytes and ratios, with the machine."""
    cases = [{**asdict(result), "cpu_ratio": result.cpu_ratio, "growth": result.growth} for result in results]
    return {"machine": machine(), "png_filter": png_filter, "cases": cases}


def main() -> None:
    """Measure and print; in a child process do one side and print its report as JSON."""
    options = arguments.media(__doc__)
    if options.side is not None:
        files = options.clip, options.audio, options.folder
        job = Job(*files, options.frames, options.face_box, options.png_filter, options.preset)
        print(json.dumps(asdict(measure(options.side, job))))
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-media-") as name:
        folder = Path(name)
        if options.clip is not None:
            clip, audio = options.clip.resolve(), options.audio.resolve()
            case = given_case(clip, audio, options.frames, options.face_box)
            results.append(run_case(case, folder, options.png_filter, options.preset))
        else:
            for size in options.sizes.split(","):
                if options.encoders:
                    encodings = measure_encoders(size, options.frames, with_hardware=True)
                    print("\n".join(encoder_rows(encodings)), flush=True)
                    continue
                if options.decoding:
                    case = synthetic_case(size, options.frames, folder)
                    print(compare_decoding(case.clip, case.n_available))
                    continue
                case = synthetic_case(size, options.frames, folder)
                results.append(run_case(case, folder, options.png_filter, options.preset))
    if options.decoding or options.encoders:
        return
    facts = machine()
    print(f"{facts['date']}  {facts['cpu']}, {facts['cores']} cores, load {facts['load'][0]:.1f}, av {facts['av']}")
    print(f"upstream's source dump with PNG prediction {options.png_filter}; ours with the preset {options.preset}")
    print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(results, options.png_filter), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
