"""Runs every network once in the shapes of a job, before the first job does: compiles, tunes, and finds the batch size.

A set of weights that gives no finite picture is found here and not by a customer.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from musetalk.audio import SAMPLE_RATE, audio_windows
from musetalk.devices import gpu_errors
from musetalk.models import Models
from musetalk.preparing import FIND_BATCH, Batches

# What most sources are; the detector's shapes follow the source's size.
_TYPICAL_SIZE = (720, 1280)
_CPU_SIZE = (96, 96)


def warm_up(models: Models, batch_size: int) -> int:
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
            torch.cuda.synchronize(models.device)
            torch.cuda.empty_cache()
    return batches.size if on_gpu else batch_size
