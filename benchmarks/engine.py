"""The networks alone: frames a second by batch, precision and acceleration, and the share of the machine's peak.

    .venv/bin/python -m benchmarks.engine [--model tiny|demo|full] [--batches 1,4,8] [--dtypes float32,bfloat16]
        [--accelerations none,graphs,compile] [--rounds 5] [--threads N] [--profile] [--json FILE]

One frame is the UNet at timestep 0 and the VAE's decoder, to uint8 pixels on the host, as in a job; "launched ahead" is
the same with each chunk started before the one before it is fetched. Operations are counted by torch on one frame; the
peak is a large product of matrices on the same device in the same precision. Weights are random: speed does not depend
on them.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.engine(__doc__)

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks import (
    build,
    dtype_of,
    machine,
    matmul_tflops,
    median,
    n_parameters,
    synchronise,
)
from musetalk.acceleration import accelerator
from musetalk.devices import choose_device, configure_threads
from musetalk.generator import Generator, PendingPatches
from musetalk.models import Models

# Chunks in a row that are timed together.
_IN_A_ROW = 4


@dataclass(frozen=True)
class Rate:
    """One way to run the networks: medians over the rounds."""

    dtype: str
    acceleration: str
    batch: int
    frame_ms: float
    ahead_ms: float
    encode_ms: float
    tflops: float
    share_of_peak: float
    vram_mib: float | None

    @property
    def fps(self) -> float:
        """Frames a second, launched ahead."""
        return 1000 / self.ahead_ms


def timed(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of `work`, after one run that does not count."""
    work()
    times = []
    for _ in range(rounds):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return median(times)


def inputs(models: Models, batch: int) -> tuple[Tensor, Tensor]:
    """Latents and windows on the host, as a job has them."""
    latents = torch.randn(batch, *models.generator.latent_shape)
    windows = torch.randn(batch, 10 * models.audio.n_layers, models.audio.d_model)
    return latents.to(models.dtype), windows.to(models.device, models.dtype)


def flops_of_a_frame(models: Models) -> int:
    """Operations of the UNet and the decoder for one frame, a multiply and an add counted as two."""
    latents, windows = inputs(models, 1)
    with FlopCounterMode(display=False) as counter:
        models.generator.decode(models.generator.predict(latents, windows))
    return int(counter.get_total_flops())


def launched_ahead(generator: Generator, latents: Tensor, windows: Tensor) -> None:
    """Chunks in a row, each started before the one before it is fetched."""
    before: PendingPatches | None = None
    for _ in range(_IN_A_ROW):
        pending = generator.start(latents, windows)
        if before is not None:
            before.result()
        before = pending
    assert before is not None
    before.result()


def measure(
    models: Models, acceleration: str, batch: int, rounds: int, flops: int, peak: float, faster: Any = None
) -> Rate:
    """The rates of one way; the peak of memory is that of this way alone."""
    generator, device = models.generator, models.device
    latents, windows = inputs(models, batch)
    on_device = latents.to(device).contiguous(memory_format=torch.channels_last)
    generator.fixed_batch = None if acceleration == "none" else batch
    generator.accelerate(faster or accelerator(acceleration, on_device, windows))  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    alone = timed(lambda: generator.generate(latents, windows), device, rounds) / batch
    ahead = timed(lambda: launched_ahead(generator, latents, windows), device, rounds) / batch / _IN_A_ROW
    crops = torch.randint(0, 255, (batch, generator.crop_px, generator.crop_px, 3), dtype=torch.uint8)
    encode = timed(lambda: generator.encode(crops), device, rounds) / batch
    tflops = flops / ahead / 1e12
    return Rate(
        dtype=str(models.dtype).removeprefix("torch."),
        acceleration=acceleration,
        batch=batch,
        frame_ms=1000 * alone,
        ahead_ms=1000 * ahead,
        encode_ms=1000 * encode,
        tflops=tflops,
        share_of_peak=tflops / peak,
        vram_mib=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
    )


def profile(models: Models, batch: int) -> str:
    """The operations that take longest on the device, as measured by torch's profiler."""
    latents, windows = inputs(models, batch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = models.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    models.generator.generate(latents, windows)
    with torch.profiler.profile(activities=activities) as profiler:
        launched_ahead(models.generator, latents, windows)
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60))


def table(rates: list[Rate]) -> str:
    """The rates as text; ratios are to the first line."""
    header = f"{'dtype':<10}{'form':<9}{'batch':>6}{'ms/frame':>10}{'ahead':>8}{'fps':>8}{'x':>6}{'encode':>8}"
    lines = [header + f"{'TFLOP/s':>9}{'of peak':>9}{'VRAM MiB':>10}"]
    for rate in rates:
        vram = "-" if rate.vram_mib is None else f"{rate.vram_mib:.0f}"
        lines.append(
            f"{rate.dtype:<10}{rate.acceleration:<9}{rate.batch:>6}{rate.frame_ms:>10.2f}{rate.ahead_ms:>8.2f}"
            f"{rate.fps:>8.1f}{rates[0].ahead_ms / rate.ahead_ms:>6.2f}{rate.encode_ms:>8.2f}"
            f"{rate.tflops:>9.3f}{rate.share_of_peak:>9.1%}{vram:>10}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every combination and print the table."""
    given = arguments.engine(__doc__)
    device = choose_device(given.device)
    configure_threads(given.threads, device)
    on_gpu = device.type == "cuda"
    batches = [int(part) for part in (given.batches or ("1,4,8,16,32" if on_gpu else "1,4,8")).split(",")]
    dtypes = (given.dtypes or ("float32,float16,bfloat16" if on_gpu else "float32,bfloat16")).split(",")
    forms = (given.accelerations or ("none,graphs" if on_gpu else "none")).split(",")
    if not on_gpu and forms != ["none"]:
        raise SystemExit("--accelerations: on a CPU only `none` is possible")
    rates: list[Rate] = []
    peaks: dict[str, float] = {}
    facts: dict[str, Any] = {"machine": machine(device), "model": given.model}
    for name in dtypes:
        models = build(given.model, device, dtype_of(name))
        flops = flops_of_a_frame(models)
        peaks[name] = matmul_tflops(device, models.dtype, lambda work: timed(work, device, given.rounds))
        for form in forms:
            rates += [measure(models, form, batch, given.rounds, flops, peaks[name]) for batch in batches]
        facts["gflop_a_frame"] = flops / 1e9
        facts["unet_parameters"] = n_parameters(models.generator._unet)
        if given.profile:
            print(profile(models, batches[-1]))
        del models
    print(f"{given.model}: {facts['gflop_a_frame']:.1f} GFLOP a frame; measured peak of matrix products: ", end="")
    print(", ".join(f"{name} {peak:.2f} TFLOP/s" for name, peak in peaks.items()))
    print(table(rates))
    if given.json:
        facts.update(peak_tflops=peaks, rates=[{**asdict(rate), "fps": rate.fps} for rate in rates])
        given.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
