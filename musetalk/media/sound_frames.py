"""Decoded frames of sound as arrays, for any number of channels and every sample format."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

# Values beyond this are no sound (a float file may contain anything); 18 dB above full scale allows overshoot.
_MAX_SAMPLE = 8.0
# PyAV lists the planes of a frame until a pointer is empty, and FFmpeg has eight: with as many planes it reads on.
_MAX_PLANES = 7
# numpy type, middle and full scale of FFmpeg's sample formats, without the mark of planar ones.
_SAMPLE_FORMATS: dict[str, tuple[Any, float, float]] = {
    "u8": (np.uint8, 128.0, 2.0**7),
    "s16": (np.int16, 0.0, 2.0**15),
    "s32": (np.int32, 0.0, 2.0**31),
    "s64": (np.int64, 0.0, 2.0**63),
    "flt": (np.float32, 0.0, 1.0),
    "dbl": (np.float64, 0.0, 1.0),
}


def as_float(frame: Any) -> Float32Array:
    """The samples of a decoded frame as float32 (channels, n) of full scale 1, without NaN or infinity."""
    n_channels = frame.layout.nb_channels
    if frame.format.is_planar and n_channels > _MAX_PLANES:
        frame = _packed(frame)
    is_planar = frame.format.is_planar
    name = frame.format.name
    dtype, middle, scale = _SAMPLE_FORMATS[name.removesuffix("p") if is_planar else name]
    if is_planar:
        channels = np.stack([np.frombuffer(plane, dtype, frame.samples) for plane in frame.planes])
    else:
        channels = np.frombuffer(frame.planes[0], dtype, frame.samples * n_channels).reshape(-1, n_channels).T
    if dtype is np.float32:
        samples = channels.astype(np.float32)
    else:
        samples = ((channels.astype(np.float64) - middle) / scale).astype(np.float32)
    return np.clip(np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0), -_MAX_SAMPLE, _MAX_SAMPLE)


def _packed(frame: Any) -> Any:
    """The frame with its channels interleaved in one plane."""
    unit = f"1/{frame.sample_rate}"
    graph = av.filter.Graph()
    source = graph.add(
        "abuffer",
        f"sample_rate={frame.sample_rate}:sample_fmt={frame.format.name}"
        f":channel_layout={frame.layout.name}:time_base={unit}",
    )
    form = graph.add("aformat", f"sample_fmts={frame.format.name.removesuffix('p')}")
    graph.link_nodes(source, form, graph.add("abuffersink")).configure()
    frame.pts, frame.time_base = 0, Fraction(1, frame.sample_rate)
    graph.push(frame)
    return graph.pull()


def float_frame(samples: Float32Array, rate: int, layout: str) -> av.AudioFrame:
    """A frame of interleaved float samples from (channels, n)."""
    flat = np.ascontiguousarray(samples.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(flat, format="flt", layout=layout)
    frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
    return frame
