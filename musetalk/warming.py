"""Runs every network once in the shapes of a job, before the first job does: compiles, tunes, and finds the batch size.

A set of weights that gives no finite picture is found here and not by a customer.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from musetalk.acceleration import Acceleration, accelerator, frames_that_fit
from musetalk.audio import ENCODER_BATCH, OVERLAP_DIVISOR, SAMPLE_RATE, audio_windows
from musetalk.batches import Batches
from musetalk.blending import PastePlan
from musetalk.device_input import square_pictures
from musetalk.device_pixels import crop_patches, paste_regions
from musetalk.devices import gpu_errors
from musetalk.face_parsing import PARSE_PX, FaceParser
from musetalk.face_search import FIND_BATCH
from musetalk.faces import PoseFaceFinder
from musetalk.frames import Picture, Planes, UInt8Array, black_planes
from musetalk.geometry import Box, blend_box
from musetalk.models import Models

logger = logging.getLogger(__name__)

# What most sources are; the detector's shapes follow the source's size.
_TYPICAL_SIZE = (720, 1280)
_CPU_SIZE = (96, 96)
# Crop boxes in it: one that needs pixels beside the patch, because its edges are odd, and one that does not.
_TYPICAL_BOXES = (Box(521, 201, 762, 500), Box(520, 200, 760, 500))


def warm_up(models: Models, batch_size: int, acceleration: Acceleration = "none") -> int:
    """Run the whole chain on empty pictures and silence; returns the batch size that fits, at most `batch_size`.

    On a CPU, where nothing is compiled for a shape, one frame proves the chain. Raises OutOfMemoryError when one frame
    does not fit, ProcessingError when the numbers are not finite, GpuLostError.
    """
    with gpu_errors():
        if models.device.type == "cuda":
            return _warm_up_gpu(models, batch_size, acceleration)
        _find_faces(models, [Picture(None, bgr=np.zeros((*_CPU_SIZE, 3), dtype=np.uint8))])
        crops = _crops(1, models.generator.crop_px)
        latents = models.generator.encode(crops)
        models.generator.generate(latents, _windows(models, 1))
        models.parser.labels(list(crops))
    if acceleration != "none":
        logger.warning("the networks are not accelerated: that is for GPUs", extra={"wanted": acceleration})
    return batch_size


def _warm_up_gpu(models: Models, batch_size: int, acceleration: Acceleration) -> int:
    audio, generator = models.audio, models.generator
    # A pass over as many windows as the encoder takes at once; the single window of short speech is another shape.
    n_samples = audio.window_samples * (1 + (ENCODER_BATCH - 1) * (OVERLAP_DIVISOR - 1) / OVERLAP_DIVISOR)
    audio.features(np.zeros(int(n_samples), dtype=np.float32))
    audio.silent_window()
    windows = _windows(models, batch_size)
    _find_faces(models, [Picture(_typical_frame(), "bt709") for _ in range(FIND_BATCH)])
    batches = Batches(batch_size)
    batches.run(lambda part: _run_chunk(models, windows[part]), batch_size)
    generator.decode_batch = _decode_batch(models, batches.size)
    generator.fixed_batch = batches.size
    _accelerate(models, batches.size, acceleration, windows)
    batches.run(lambda part: _run_chunk(models, windows[part]), batches.size)
    torch.cuda.synchronize(models.device)
    # What loading and trying out took is given back.
    gc.collect()
    torch.cuda.empty_cache()
    return batches.size


def _windows(models: Models, count: int) -> Tensor:
    features = models.audio.features(np.zeros(SAMPLE_RATE, dtype=np.float32))
    return audio_windows(features, 0, 1, Fraction(25)).expand(count, -1, -1)


def _find_faces(models: Models, pictures: Sequence[Picture]) -> None:
    """Run the finder's networks; on empty frames `find` would leave out the one that looks at faces."""
    if isinstance(models.faces, PoseFaceFinder):
        models.faces.run_once(pictures)
    else:
        models.faces.find([picture.bgr for picture in pictures])


def _parse(models: Models, frames: Sequence[Planes], boxes: Sequence[Box]) -> None:
    """Run the parser as a job does: its pictures are made on the GPU too."""
    if isinstance(models.parser, FaceParser):
        squares = [blend_box(box) for box in boxes]
        models.parser.classes(square_pictures(frames, squares, PARSE_PX, "bt709", models.device))
    else:
        models.parser.labels(list(_crops(len(boxes), models.generator.crop_px)))


def _crops(count: int, side: int) -> UInt8Array:
    rows = np.linspace(0, 255, side, dtype=np.uint8)
    crops: UInt8Array = np.broadcast_to(rows[None, :, None, None], (count, side, side, 3)).copy()
    return crops


def _typical_frame() -> Planes:
    height, width = _TYPICAL_SIZE
    frame = black_planes(width, height)
    frame.y[...] = np.linspace(16, 235, height)[:, None]
    return frame


def _plan(box: Box) -> PastePlan:
    height, width = _TYPICAL_SIZE
    around = blend_box(box)
    return PastePlan.prepare(np.full((around.height, around.width), 255, np.uint8), box, around, width, height)


def _run_chunk(models: Models, windows: Tensor) -> None:
    """One chunk as in a job: prepared on the stream for that, generated and pasted, with both kinds of box."""
    generator, n_frames = models.generator, len(windows)
    frames = [_typical_frame()] * n_frames
    boxes = [_TYPICAL_BOXES[index % 2] for index in range(n_frames)]
    with torch.cuda.stream(models.preparing_stream):
        crops = crop_patches(frames, boxes, generator.crop_px, "bt709", models.device)
        latents = generator.encode(crops).cpu()
        _parse(models, frames, boxes)
    plans = [_plan(box) for box in boxes]
    generator.start(latents, windows, lambda levels: paste_regions(levels, plans, frames, "bt709")).result()


def _accelerate(models: Models, batch_size: int, acceleration: Acceleration, windows: Tensor) -> None:
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
