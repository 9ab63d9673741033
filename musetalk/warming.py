"""Runs every network once in the shapes of a job, before the first job does: compiles, tunes, and finds the batch size.

A set of weights that gives no finite picture is found here and not by a customer.
"""

from __future__ import annotations

import gc
import logging
from fractions import Fraction

import numpy as np
import torch

from musetalk.acceleration import Acceleration, accelerator, frames_that_fit
from musetalk.audio import SAMPLE_RATE, audio_windows
from musetalk.devices import gpu_errors
from musetalk.face_search import FIND_BATCH
from musetalk.models import Models
from musetalk.preparing import Batches

logger = logging.getLogger(__name__)

# What most sources are; the detector's shapes follow the source's size.
_TYPICAL_SIZE = (720, 1280)
_CPU_SIZE = (96, 96)


def warm_up(models: Models, batch_size: int, acceleration: Acceleration = "none") -> int:
    """Run the whole chain on empty pictures and silence; returns the batch size that fits, at most `batch_size`.

    On a CPU, where nothing is compiled for a shape, one frame proves the chain. Raises OutOfMemoryError when one frame
    does not fit, ProcessingError when the numbers are not finite, GpuLostError.
    """
    on_gpu = models.device.type == "cuda"
    wanted = batch_size if on_gpu else 1
    height, width = _TYPICAL_SIZE if on_gpu else _CPU_SIZE
    batches = Batches(wanted)
    side = models.generator.crop_px
    rows = np.linspace(0, 255, side, dtype=np.uint8)
    crops = np.broadcast_to(rows[None, :, None, None], (wanted, side, side, 3)).copy()
    with gpu_errors():
        features = models.audio.features(np.zeros(SAMPLE_RATE, dtype=np.float32))
        windows = audio_windows(features, 0, 1, Fraction(25)).expand(wanted, -1, -1)
        frames = [np.zeros((height, width, 3), dtype=np.uint8)] * (FIND_BATCH if on_gpu else 1)
        models.faces.find(frames)

        def chunk(part: slice) -> None:
            latents = models.generator.encode(crops[part])
            models.generator.generate(latents, windows[part])
            models.parser.labels(list(crops[part]))

        batches.run(chunk, wanted)
        if on_gpu:
            models.generator.decode_batch = _decode_batch(models, batches.size)
            models.generator.fixed_batch = batches.size
            _accelerate(models, batches.size, acceleration, windows)
            batches.run(chunk, batches.size)
            torch.cuda.synchronize(models.device)
            # What loading and trying out took is given back.
            gc.collect()
            torch.cuda.empty_cache()
        elif acceleration != "none":
            logger.warning("the networks are not accelerated: that is for GPUs", extra={"wanted": acceleration})
    return batches.size if on_gpu else batch_size


def _accelerate(models: Models, batch_size: int, acceleration: Acceleration, windows: torch.Tensor) -> None:
    generator = models.generator
    shape = (batch_size, *generator.latent_shape)
    latents = torch.zeros(shape, dtype=models.dtype, device=models.device).contiguous(memory_format=torch.channels_last)
    generator.accelerate(accelerator(acceleration, latents, windows[:batch_size].to(models.device, models.dtype)))


def _decode_batch(models: Models, batch_size: int) -> int:
    """Frames that the decoder can compute at once, estimated from the memory of one and of two."""
    generator, device = models.generator, models.device

    def peak(n_frames: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        generator.decode(torch.zeros(n_frames, generator.latent_shape[0] // 2, *generator.latent_shape[1:]))
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before

    peak(1)  # the first run also loads kernels
    one, two = peak(1), peak(2)
    free = torch.cuda.mem_get_info(device)[0]
    fits = frames_that_fit(free, one, two, batch_size)
    logger.info("decoder's batch", extra={"decode_batch": fits, "frame_mib": (two - one) >> 20, "free_mib": free >> 20})
    return fits
