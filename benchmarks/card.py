"""The first look at a card, in one command: is it right, how fast is it, what is left.

    .venv/bin/python -m benchmarks.card [--limit 460] [--out DIR] [--wheels DIR] [--golden DIR] [--parts NAMES]

Correctness (golden vectors in float32, half precision against float32, launches that wait for nothing, forty jobs with
flat memory), rates of the networks by batch, precision and form, of the face networks and the encoders, whole jobs new
and prepared in 720p and 1080p, and a profile. Parts for which no time is left are named as such. Writes card.json and
card.md into DIR after each part, and the rows into benchmarks/RESULTS.md at the end.

Nothing is fetched: weights are random, clips are made. Packages that are missing are installed from the wheels in DIR
into a folder of their own. Ends with 0, with 1 if a check failed, with 3 if there is no card.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    _given = arguments.card(__doc__)
    # The packages that the imports below need may be beside the checkout.
    from benchmarks.wheels import add_missing

    add_missing(_given.wheels)

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks import correctness, engine
from benchmarks.arguments import FRAME_SIZES, Size
from benchmarks.correctness import Check
from benchmarks.encoders import Encoding, encoder_rows, measure_encoders
from benchmarks.job import Outcome, run, start_core
from benchmarks.material import centred_box, make_audio, make_clip
from benchmarks.measuring import memory
from benchmarks.networks import build, dtype_of, machine, matmul_tflops, synchronise
from musetalk.devices import choose_device, configure_threads
from musetalk.networks.rtmpose import RtmPose
from musetalk.networks.s3fd import S3fd
from musetalk_core import Core
from worker.config import ROOT
from worker.jobs import JobParams

NO_CARD = 3
_MARKS = ("<!-- card: made by python -m benchmarks.card -->\n", "<!-- end -->\n")


@dataclass
class Card:
    """What is measured, on which device, until when; and everything found so far."""

    device: torch.device
    size: Size
    folder: Path
    ends: float
    golden: Path | None = None
    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    forms: tuple[str, ...] = ("none", "graphs")
    sizes: tuple[str, ...] = ("720p", "1080p")
    seconds: float = 10.0
    n_jobs: int = 40
    job_batch: int = 8
    n_encoded: int = 60
    checks: list[Check] = field(default_factory=list)
    rates: list[engine.Rate] = field(default_factory=list)
    jobs: list[Outcome] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    face_ms: dict[str, float] = field(default_factory=dict)
    gflop: float = 0.0
    profile: str = ""
    left_out: list[str] = field(default_factory=list)
    part_s: dict[str, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a card."""
        return self.device.type == "cuda"

    @property
    def half(self) -> str:
        """The precision of the jobs: half on a card."""
        return "float16" if self.on_gpu else "float32"

    def has_time(self, seconds: float = 0.0) -> bool:
        """Whether `seconds` are left."""
        return time.monotonic() + seconds < self.ends


# -- parts ------------------------------------------------------------------------------------------------------------


def precision(card: Card) -> None:
    """Half precision against float32, network by network."""
    half = [name for name in card.dtypes if name in correctness.TOLERANCES]
    card.checks += correctness.check_precision(card.size, card.device, half)


def goldens(card: Card) -> None:
    """The golden vectors in float32."""
    if card.golden is None:
        card.left_out.append("golden vectors: GOLDEN_DIR is not set")
        return
    reserve = 300.0 if card.on_gpu else 0.0
    card.checks += correctness.check_goldens(card.golden, card.device, lambda: card.has_time(reserve))


def rates(card: Card) -> None:
    """The networks alone by precision, form and batch."""
    for name in card.dtypes:
        models = build(card.size, card.device, dtype_of(name))
        card.gflop = engine.flops_of_a_frame(models) / 1e9
        peak = matmul_tflops(card.device, models.dtype, lambda work: engine.timed(work, card.device, 3))
        for form in card.forms:
            for batch in card.batches:
                if not card.has_time(120 if card.on_gpu else 0):
                    card.left_out.append(f"rate of {name}, {form}, batch {batch}: no time left")
                    continue
                _rate(card, models, form, batch, peak)
        del models
        _give_back(card.device)


def _rate(card: Card, models: Any, form: str, batch: int, peak: float) -> None:
    """Measure one way; one that does not fit or fails is left out with its reason."""
    try:
        card.rates.append(engine.measure(models, form, batch, 3, int(card.gflop * 1e9), peak))
    except Exception as error:  # noqa: BLE001 - a batch that does not fit must not end the others
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        card.left_out.append(f"rate of {models.dtype}, {form}, batch {batch}: {type(error).__name__}: {reason}")
        models.generator.accelerate(None)
        _give_back(card.device)


def faces(card: Card) -> None:
    """The face networks in ms a frame: what a new source costs beside the model."""
    small = card.size != "full"
    detector: Any = S3fd(2 if small else 64).to(card.device).eval().requires_grad_(False)
    pose: Any = RtmPose(1 / 16 if small else 1.0).to(card.device).eval().requires_grad_(False)

    def milliseconds(network: Any, batch: torch.Tensor) -> float:
        return 1000 * engine.timed(lambda: network(batch), card.device, 3)

    with torch.inference_mode():
        for name in card.sizes:
            (width, height), _ = FRAME_SIZES[name]
            frame = torch.zeros(1, 3, *((96, 96) if small else (height, width)), device=card.device)
            for label, layout in (("plain", torch.contiguous_format), ("channels last", torch.channels_last)):
                shaped = frame.contiguous(memory_format=layout)
                card.face_ms[f"S3FD {name}, {label}"] = milliseconds(detector.to(memory_format=layout), shaped)
        poses = torch.zeros(16, 3, 384, 288, device=card.device)
        card.face_ms["RTMPose, both views, batch 8"] = milliseconds(pose, poses) / 8
    del detector, pose
    _give_back(card.device)


def encoders(card: Card) -> None:
    """x264 and, where the card has it, NVENC."""
    name = card.sizes[-1]
    card.encodings += measure_encoders(name, card.n_encoded, with_hardware=card.on_gpu)


def jobs(card: Card) -> None:
    """Whole jobs, new and prepared; launches that wait for nothing; many jobs with flat memory."""
    core = _core(card)
    try:
        for size in card.sizes:
            source, speech = _files(card, size, card.seconds)
            for kind in ("new", "prepared"):
                output = card.folder / "out.mp4"
                card.jobs.append(run(core, size, card.seconds, kind, (source, speech, output)))
                if kind == "new" and core.engine.avatars is not None:
                    core.engine.avatars.flush()
        _check_launches(card, core)
        _check_memory(card, core)
    finally:
        if core.engine.avatars is not None:
            core.engine.avatars.flush()


def _core(card: Card) -> Core:
    given = argparse.Namespace(
        device=card.device.type,
        threads=0,
        dtype=card.half,
        model=card.size,
        batch=card.job_batch,
        acceleration="graphs" if card.on_gpu and "graphs" in card.forms else "none",
    )
    return start_core(given, card.folder)


def _files(card: Card, size: str, seconds: float, extra_frames: int = 0) -> tuple[Path, Path]:
    """A clip, which other `extra_frames` make another source, and a speech of the same length."""
    source = card.folder / f"{size}-{seconds:g}-{extra_frames}.mp4"
    speech = card.folder / f"{seconds:g}.wav"
    if not source.exists():
        make_clip(source, *FRAME_SIZES[size], round(25 * seconds) + extra_frames)
    if not speech.exists():
        make_audio(speech, Fraction(round(25 * seconds), 25))
    return source, speech


def _params(size: str) -> JobParams:
    return JobParams(face_box=(*centred_box(*FRAME_SIZES[size]),))


def _check_launches(card: Card, core: Core) -> None:
    """A prepared job in which a wait inside a launch is an error."""
    size = card.sizes[0]
    source, speech = _files(card, size, card.seconds)
    set_mode = torch.cuda.set_sync_debug_mode if card.on_gpu else lambda _mode: None

    def work() -> str:
        with correctness.no_waits_in_launches(set_mode) as launched:
            core.render(source, speech, card.folder / "out.mp4", _params(size))
        return f"{len(launched)} launches, {sum(launched)} frames"

    card.checks.append(correctness.timed_check("launches that wait for nothing", work))


def _check_memory(card: Card, core: Core) -> None:
    """Short jobs on three sources in turn, each as new as the first."""
    size, kept = card.sizes[0], core.engine
    core.engine = replace(core.engine, avatars=None)
    sizes: list[int] = []
    try:
        for number in range(card.n_jobs):
            if not card.has_time(20 if card.on_gpu else 0):
                card.left_out.append(f"{card.n_jobs - number} of {card.n_jobs} jobs for the memory: no time left")
                break
            source, speech = _files(card, size, 1.0, number % 3)
            core.render(source, speech, card.folder / "out.mp4", _params(size))
            sizes.append(torch.cuda.memory_reserved(card.device) if card.on_gpu else memory("VmRSS"))
    finally:
        core.engine = kept
    if sizes:
        card.checks.append(correctness.check_flat(sizes))


def profile(card: Card) -> None:
    """The operations that take longest in one precision."""
    card.profile = engine.profile(build(card.size, card.device, dtype_of(card.half)), card.job_batch)


def _give_back(device: torch.device) -> None:
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Name -> the part, and the seconds that it needs at least on a card. The most important first.
PARTS: dict[str, tuple[Callable[[Card], None], float]] = {
    "precision": (precision, 20),
    "jobs": (jobs, 60),
    "rates": (rates, 40),
    "faces": (faces, 10),
    "goldens": (goldens, 20),
    "encoders": (encoders, 20),
    "profile": (profile, 15),
}


def run_parts(card: Card, names: list[str], save: Callable[[], None]) -> None:
    """Run the parts in order; one that fails is a failed check, one without time is left out."""
    for name in names:
        part, needed_s = PARTS[name]
        if card.on_gpu and not card.has_time(needed_s):
            card.left_out.append(f"{name}: no time left")
            continue
        began = time.monotonic()
        try:
            part(card)
        except Exception as error:  # noqa: BLE001 - the other parts must run; the first use of a card is for finding out
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            card.checks.append(Check(f"part {name}", is_right=False, detail=f"{type(error).__name__}: {reason}"))
        card.part_s[name] = time.monotonic() - began
        print(f"{name}: {card.part_s[name]:.0f} s", flush=True)
        save()


# -- results ----------------------------------------------------------------------------------------------------------


def as_json(card: Card) -> dict[str, Any]:
    """All numbers, with the machine."""
    return {
        "machine": machine(card.device),
        "networks": card.size,
        "gflop_a_frame": card.gflop,
        "checks": [asdict(check) for check in card.checks],
        "rates": [{**asdict(rate), "fps": rate.fps} for rate in card.rates],
        "face_ms": card.face_ms,
        "jobs": [{**asdict(job), "fps": job.fps, "share": job.share} for job in card.jobs],
        "encoders": [asdict(each) for each in card.encodings],
        "left_out": card.left_out,
        "part_s": card.part_s,
        "profile": card.profile,
    }


def as_markdown(card: Card) -> str:
    """The rows for benchmarks/RESULTS.md."""
    facts = machine(card.device)
    lines = [
        f"Measured on {facts['date'][:10]} on {facts['device']}, {facts['cores']} CPU cores ({facts['cpu']}), torch "
        f"{facts['torch']}; networks of {card.size} size with random weights.",
        "",
        "| check | | |",
        "|---|---|---|",
        *(f"| {check.name} | {'right' if check.is_right else '**wrong**'} | {check.detail} |" for check in card.checks),
    ]
    if card.rates:
        lines += ["", "| precision | form | batch | frames/s | ms a frame | encode ms | TFLOP/s | of peak | MiB |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [_rate_row(rate) for rate in card.rates]
    if card.jobs:
        lines += ["", "| whole job | frames | frames/s | of the model alone | before the first frame | peak MiB |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_job_row(job) for job in card.jobs]
    if card.face_ms:
        lines += ["", "| face networks, float32 | ms a frame |", "|---|---|"]
        lines += [f"| {name} | {ms:.2f} |" for name, ms in card.face_ms.items()]
    if card.encodings:
        lines += ["", *encoder_rows(card.encodings)]
    if card.left_out:
        lines += ["", "Not measured: " + "; ".join(card.left_out) + "."]
    return "\n".join(lines) + "\n"


def _rate_row(rate: engine.Rate) -> str:
    vram = "–" if rate.vram_mib is None else f"{rate.vram_mib:.0f}"
    return (
        f"| {rate.dtype} | {rate.acceleration} | {rate.batch} | {rate.fps:.1f} | {rate.frame_ms:.2f} | "
        f"{rate.encode_ms:.2f} | {rate.tflops:.2f} | {rate.share_of_peak:.0%} | {vram} |"
    )


def _job_row(job: Outcome) -> str:
    vram = "–" if job.peak_vram_mib is None else f"{job.peak_vram_mib:.0f}"
    return (
        f"| {job.size}, {job.kind} | {job.n_frames} | {job.fps:.1f} | {job.share:.0%} | {job.preparing:.1%} | {vram} |"
    )


def with_rows(text: str, rows: str) -> str:
    """The text of RESULTS.md with `rows` between its marks; raises ValueError without them."""
    start, end = (text.find(mark) for mark in _MARKS)
    if start < 0 or end < start:
        raise ValueError("RESULTS.md has no place for the rows of a card")
    return text[: start + len(_MARKS[0])] + rows + text[end:]


def main() -> int:
    """Run all parts and write what was found; return the exit status."""
    given = arguments.card(__doc__)
    if not torch.cuda.is_available() and given.device != "cpu":
        print("error: torch sees no CUDA device here; this benchmark is about one", file=sys.stderr)
        return NO_CARD
    device = choose_device(given.device)
    configure_threads(0, device)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="card-") as name:
        card = Card(device, given.model, Path(name), time.monotonic() + given.limit, golden=given.golden)

        def save() -> None:
            (given.out / "card.json").write_text(json.dumps(as_json(card), indent=1) + "\n", encoding="utf-8")
            (given.out / "card.md").write_text(as_markdown(card), encoding="utf-8")

        run_parts(card, given.parts, save)
    results = ROOT / "benchmarks/RESULTS.md"
    if card.on_gpu:
        results.write_text(with_rows(results.read_text(encoding="utf-8"), as_markdown(card)), encoding="utf-8")
    print(as_markdown(card))
    print(card.profile)
    return 0 if all(check.is_right for check in card.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
