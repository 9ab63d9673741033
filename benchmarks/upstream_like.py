"""Whole jobs the upstream way and ours, side by side in one run, with the same networks and weights.

    .venv/bin/python -m benchmarks.upstream_like [--model tiny|demo|full] [--sizes 720p] [--seconds 4] [--rounds 3]
        [--source-seconds 2] [--batch 8] [--dtype float32] [--json FILE]

The upstream procedure, rewritten from its description: all source frames to PNG, all read into memory; each frame's
crop encoded alone, the masked half and the whole after each other; frames and latents doubled back to front; UNet and
decoder in batches, waiting for each; then for each output frame the whole picture copied, the face parsed, the mask
made, blended by Pillow and written as PNG; two x264 passes. Both sides have their networks loaded and have run them
once; both get the face box, so upstream avoids its detection, one frame at a time. Ours runs a new source
("cold") and the same again ("repeat"). Each side and round runs after the other in a process of its own; medians.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.upstream_like(__doc__)

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.arguments import FRAME_SIZES, PNG_FILTERS
from benchmarks.material import centred_box, make_audio, make_clip
from benchmarks.measuring import cpu_seconds, memory
from benchmarks.networks import build, dtype_of, machine, median, synchronise
from benchmarks.original import blend_whole, dump_source, encode_again, encode_pictures, read_picture
from musetalk import media
from musetalk.audio import audio_windows
from musetalk.avatars import AvatarCache
from musetalk.devices import choose_device, configure_threads
from musetalk.frames import UInt8Array
from musetalk.generator import crop_patch
from musetalk.geometry import Box, blend_box, ping_pong_index
from musetalk.models import Models
from musetalk.options import RenderOptions, version_defaults
from musetalk.render import RenderSession
from musetalk.warming import warm_up
from worker.config import ROOT


@dataclass(frozen=True)
class Task:
    """One job for either side."""

    source: Path
    audio: Path
    folder: Path
    box: Box
    batch: int


@dataclass(frozen=True)
class Took:
    """Time and memory of one side."""

    side: str
    n_frames: int
    wall_s: float
    cpu_s: float
    peak_rss_mib: float


def upstream(models: Models, task: Task) -> int:
    """The upstream order of work; returns the number of frames."""
    sources, results = task.folder / "source", task.folder / "result"
    sources.mkdir()
    results.mkdir()
    rate = dump_source(task.source, sources, 10**9, PNG_FILTERS[0])
    frames = [read_picture(path) for path in sorted(sources.iterdir())]
    limits = media.MediaLimits()
    waveform = media.read_waveform(task.audio, media.probe_audio(task.audio, limits), limits)
    features = models.audio.features(waveform)
    box = task.box.with_bottom_margin(version_defaults(models.version).extra_margin, frames[0].shape[0])
    latents = [_encode_alone(models, crop_patch(frame, box, models.generator.crop_px)) for frame in frames]
    n_frames = int(len(waveform) / 16000 * rate)
    patches: list[UInt8Array] = []
    for first in range(0, n_frames, task.batch):
        count = min(task.batch, n_frames - first)
        picks = [ping_pong_index(index, len(frames)) for index in range(first, first + count)]
        windows = audio_windows(features, first, count, rate)
        patches.extend(models.generator.generate(torch.cat([latents[pick] for pick in picks]), windows))
    around = blend_box(box)
    for index, patch in enumerate(patches):
        frame = copy.deepcopy(frames[ping_pong_index(index, len(frames))])
        face = np.asarray(cv2.resize(patch, (box.width, box.height)), np.uint8)
        square = frame[max(0, around.y0) : around.y1, max(0, around.x0) : around.x1]
        labels = models.parser.labels([square])[0]
        blended = blend_whole(frame, face, labels, box, around)
        cv2.imwrite(str(results / f"{index:08d}.png"), blended)
    silent = task.folder / "silent.mp4"
    encode_pictures(results, silent, rate)
    return encode_again(silent, task.audio, task.folder / "out.mp4")


def _encode_alone(models: Models, crop: UInt8Array) -> torch.Tensor:
    """Source latents (1, 8, 32, 32) of one crop: two runs of the encoder, one after the other."""
    generator = models.generator
    views = generator.views(crop[None])
    with torch.inference_mode():
        halves = []
        for view in views:
            batch = view.to(models.dtype)
            halves.append(generator._vae.encode(batch).latent_dist.mean * generator._scaling)
            synchronise(models.device)
    return torch.cat(halves, dim=1)


def ours(models: Models, task: Task, avatars: AvatarCache) -> int:
    """Run the job this worker's way; return the number of frames."""
    defaults = version_defaults(models.version)
    on_gpu = models.device.type == "cuda"
    options = RenderOptions(
        face_box=(*task.box,),
        batch_size=task.batch,
        extra_margin=defaults.extra_margin,
        device_pixels=on_gpu,
        overlap=on_gpu,
    )
    output = task.folder / "out.mp4"
    with RenderSession(models, task.source, task.audio, output, options, avatars=avatars) as session:
        session.probe()
        session.prepare()
        session.generate()
        return session.finish().n_frames


def measure(side: str, given: argparse.Namespace, task: Task) -> list[Took]:
    """Run one side in this process; ours twice, the second time with its source prepared."""
    device = choose_device(given.device)
    configure_threads(given.threads, device)
    models = build(given.model, device, dtype_of(given.dtype))
    warm_up(models, task.batch)
    avatars = AvatarCache(None, memory_bytes=2**30, disk_bytes=0)
    took = []
    for name in ("upstream",) if side == "upstream" else ("cold", "repeat"):
        cpu, wall = cpu_seconds(), time.monotonic()
        n_frames = upstream(models, task) if side == "upstream" else ours(models, task, avatars)
        took.append(
            Took(
                side=name,
                n_frames=n_frames,
                wall_s=time.monotonic() - wall,
                cpu_s=cpu_seconds() - cpu,
                peak_rss_mib=memory("VmHWM") / 2**20,
            )
        )
    return took


def run_side(side: str, given: argparse.Namespace, files: tuple[Path, Path], box: Box) -> list[Took]:
    """One side in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="upstream-like-") as folder:
        command = [sys.executable, "-m", "benchmarks.upstream_like", "--side", side, "--folder", folder]
        command += ["--source", str(files[0]), "--audio", str(files[1]), "--box", ",".join(map(str, box))]
        for name in ("model", "device", "dtype", "batch", "threads"):
            command += [f"--{name}", str(getattr(given, name))]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [Took(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def median_of(runs: list[Took]) -> Took:
    """The middle of the rounds of one side."""
    return Took(
        side=runs[0].side,
        n_frames=runs[0].n_frames,
        wall_s=median([run.wall_s for run in runs]),
        cpu_s=median([run.cpu_s for run in runs]),
        peak_rss_mib=median([run.peak_rss_mib for run in runs]),
    )


def table(size: str, sides: dict[str, Took]) -> str:
    """Both sides of one size, and the ratios."""
    lines = []
    for took in sides.values():
        each = took.n_frames
        lines.append(
            f"{size:<7}{took.side:<10}{each:>7}{1000 * took.wall_s / each:>10.1f}{1000 * took.cpu_s / each:>9.1f}"
            f"{each / took.wall_s:>8.1f}{took.peak_rss_mib:>9.0f}"
            f"{sides['upstream'].wall_s / sides['upstream'].n_frames * each / took.wall_s:>8.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    """Alternate the sides, print medians and ratios."""
    given = arguments.upstream_like(__doc__)
    if given.side:
        box = Box(*(int(edge) for edge in given.box.split(",")))
        task = Task(Path(given.source), Path(given.audio), Path(given.folder), box, given.batch)
        print(json.dumps([asdict(took) for took in measure(given.side, given, task)]))
        return
    results: dict[str, dict[str, Took]] = {}
    print(
        f"{given.model} networks, {given.dtype}, medians of {given.rounds}; x is upstream's wall time over this one's"
    )
    print(f"{'size':<7}{'side':<10}{'frames':>7}{'wall ms':>10}{'CPU ms':>9}{'fps':>8}{'RSS MiB':>9}{'x':>9}")
    with tempfile.TemporaryDirectory(prefix="upstream-like-media-") as name:
        for size in given.sizes.split(","):
            frame, face = FRAME_SIZES[size]
            source, audio = Path(name) / f"{size}.mp4", Path(name) / f"{size}.wav"
            make_clip(source, frame, face, round(25 * given.source_seconds))
            make_audio(audio, Fraction(given.seconds))
            runs: dict[str, list[Took]] = {}
            for _ in range(given.rounds):
                for side in ("upstream", "ours"):
                    for took in run_side(side, given, (source, audio), centred_box(frame, face)):
                        runs.setdefault(took.side, []).append(took)
            results[size] = {side: median_of(rounds) for side, rounds in runs.items()}
            print(table(size, results[size]), flush=True)
    if given.json:
        facts = {"machine": machine(choose_device(given.device)), "model": given.model, "dtype": given.dtype}
        cases = {size: {side: asdict(took) for side, took in sides.items()} for size, sides in results.items()}
        given.json.write_text(json.dumps({**facts, "cases": cases}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
