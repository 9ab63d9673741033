"""Whole jobs through the core: cold, warm, the same source again; time by stage and the share of the model.

    .venv/bin/python -m benchmarks.job [--model tiny|demo|full] [--sizes 720p,1080p] [--seconds 10,60] [--batch 8]
        [--dtype NAME] [--source-seconds S] [--acceleration none|graphs|compile] [--jobs cold,repeat] [--json FILE]
        [--demo-pair]

"cold" is the first job of a process whose networks ran once, on a new source; "warm" another new source;
"repeat" the first source, already prepared, with another speech. Model-only is the rate of the same networks at that
batch in the same process (benchmarks.engine, launched ahead); its share of the whole job's rate shows the loss
around it. Peak memory is the process's, beside its value before the first job. Synthetic clips, a given
face box, no network.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.job(__doc__)

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import FRAME_SIZES
from benchmarks.engine import inputs, launched_ahead, timed
from benchmarks.material import centred_box, make_audio, make_clip
from benchmarks.measuring import memory
from benchmarks.networks import build, dtype_of, machine
from musetalk.devices import choose_device, choose_dtype, configure_threads
from musetalk.warming import warm_up
from musetalk_core import Core
from worker.config import ROOT, load_settings
from worker.engine import engine_around
from worker.jobs import JobParams

_IN_A_ROW = 4


@dataclass(frozen=True)
class Outcome:
    """One job: seconds by stage, rate, and peak memory of the process."""

    size: str
    audio_s: float
    kind: str
    n_frames: int
    wall_s: float
    stages: dict[str, float]
    reused: int
    model_fps: float
    peak_rss_mib: float
    before_rss_mib: float
    peak_vram_mib: float | None

    @property
    def fps(self) -> float:
        """Output frames a second of the whole job."""
        return self.n_frames / self.wall_s

    @property
    def share(self) -> float:
        """Of the model-only rate."""
        return self.fps / self.model_fps

    @property
    def preparing(self) -> float:
        """Share of the job before its first frame: validation and preprocessing."""
        return (self.stages.get("validation", 0) + self.stages.get("preprocessing", 0)) / self.wall_s


def start_core(given: argparse.Namespace, folder: Path) -> Core:
    """A core around benchmark networks, as loading would have left it."""
    device = choose_device(given.device)
    configure_threads(given.threads, device)
    dtype = dtype_of(given.dtype) if given.dtype else choose_dtype("auto", device)[0]
    variables = {
        "WORK_DIR": str(folder / "work"),
        "OUTPUT_DIR": str(folder / "out"),
        "AVATAR_DIR": str(folder / "avatars"),
        "BATCH_SIZE": str(given.batch),
        "MAX_AUDIO_SEC": "3600",
        "MAX_OUTPUT_FRAMES": "100000",
    }
    core = Core(load_settings(variables, env_file=None))
    models = build(given.model, device, dtype)
    core.engine = engine_around(core.settings, models, warm_up(models, given.batch, given.acceleration))
    return core


def model_fps(core: Core, rounds: int = 3) -> float:
    """Frames a second of the networks alone, chunks launched ahead."""
    models = core.engine.models
    latents, windows = inputs(models, core.engine.batch_size)
    seconds = timed(lambda: launched_ahead(models.generator, latents, windows), models.device, rounds)
    return core.engine.batch_size * _IN_A_ROW / seconds


def run(core: Core, size: str, audio_s: float, kind: str, files: tuple[Path, Path, Path]) -> Outcome:
    """One job, timed."""
    source, audio, output = files
    models = core.engine.models
    on_gpu = models.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(models.device)
    before = memory("VmRSS")
    # Reset the kernel's high-water mark, so that each job reports its own.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    box = (*centred_box(*FRAME_SIZES[size]),) if size in FRAME_SIZES else None
    params = JobParams(face_box=box)
    started = time.perf_counter()
    rendered = core.render(source, audio, output, params)
    wall = time.perf_counter() - started
    return Outcome(
        size=size,
        audio_s=audio_s,
        kind=kind,
        n_frames=rendered.summary.n_frames,
        wall_s=wall,
        stages={str(stage): seconds for stage, seconds in rendered.clock.seconds.items()},
        reused=rendered.summary.n_reused,
        model_fps=model_fps(core),
        peak_rss_mib=memory("VmHWM") / 2**20,
        before_rss_mib=before / 2**20,
        peak_vram_mib=torch.cuda.max_memory_allocated(models.device) / 2**20 if on_gpu else None,
    )


def run_all(core: Core, given: argparse.Namespace, folder: Path, report: Callable[[Outcome], None]) -> None:
    """Every size and length, three jobs each; each cold source is another one."""
    for size in given.sizes.split(","):
        frame, face = FRAME_SIZES[size]
        for audio_s in (float(part) for part in given.seconds.split(",")):
            n_source = round(25 * min(audio_s, given.source_seconds or audio_s))
            sources: list[Path] = []
            for name in ("a", "b"):
                source = folder / f"{size}-{audio_s:g}-{name}.mp4"
                # One frame more makes it another source.
                make_clip(source, frame, face, n_source + len(sources))
                sources.append(source)
            speeches = []
            for name, longer in (("one", 0), ("two", Fraction(1, 25))):
                speech = folder / f"{audio_s:g}-{name}.wav"
                make_audio(speech, Fraction(audio_s) - longer)
                speeches.append(speech)
            output = folder / "output.mp4"
            for kind, source, speech in (
                ("cold", sources[0], speeches[0]),
                ("warm", sources[1], speeches[0]),
                ("repeat", sources[0], speeches[1]),
            ):
                if kind not in given.jobs.split(","):
                    continue
                report(run(core, size, audio_s, kind, (source, speech, output)))
                output.unlink()
            for source in sources:
                source.unlink()


def run_demo_pair(core: Core, folder: Path, report: Callable[[Outcome], None]) -> None:
    """The clip and the sentence that come with the project, with faces looked for: as a first-time user runs them."""
    media_dir = ROOT / "demo/media"
    for kind in ("cold", "repeat"):
        files = (media_dir / "avatar.mp4", media_dir / "speech.flac", folder / "output.mp4")
        report(run(core, "demo", 0, kind, files))


def header() -> str:
    """The columns of `row`."""
    return (
        f"{'size':<7}{'audio':>6} {'job':<7}{'frames':>7}{'wall s':>8}{'fps':>8}{'model':>8}{'share':>7}{'prep.':>7}"
        f"{'valid.':>8}{'prepr.':>8}{'infer.':>8}{'post.':>7}{'reused':>7}{'RSS MiB':>9}{'+MiB':>7}{'VRAM':>7}"
    )


def row(done: Outcome) -> str:
    """One job as a line."""
    stages = [done.stages.get(name, 0.0) for name in ("validation", "preprocessing", "inference", "postprocessing")]
    vram = "-" if done.peak_vram_mib is None else f"{done.peak_vram_mib:.0f}"
    return (
        f"{done.size:<7}{done.audio_s:>6g} {done.kind:<7}{done.n_frames:>7}{done.wall_s:>8.2f}{done.fps:>8.1f}"
        f"{done.model_fps:>8.1f}{done.share:>7.0%}{done.preparing:>7.1%}"
        f"{stages[0]:>8.2f}{stages[1]:>8.2f}{stages[2]:>8.2f}{stages[3]:>7.2f}{done.reused:>7}"
        f"{done.peak_rss_mib:>9.0f}{done.peak_rss_mib - done.before_rss_mib:>7.0f}{vram:>7}"
    )


def main() -> None:
    """Run the jobs and print a line for each."""
    given = arguments.job(__doc__)
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(row(outcome), flush=True)

    with tempfile.TemporaryDirectory(prefix="job-benchmark-") as name:
        core = start_core(given, Path(name))
        models = core.engine.models
        print(f"{given.model}, {models.dtype}, {models.device}, batch {core.engine.batch_size}")
        print(header())
        if given.demo_pair:
            run_demo_pair(core, Path(name), report)
        else:
            run_all(core, given, Path(name), report)
        if core.engine.avatars is not None:
            core.engine.avatars.flush()
    if given.json:
        facts: dict[str, Any] = {"machine": machine(models.device), "model": given.model}
        facts["jobs"] = [{**asdict(done), "fps": done.fps, "share": done.share} for done in outcomes]
        given.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
