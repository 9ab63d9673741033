"""Files of the kinds that strangers bring: packets that are missing or late, parts that were joined, many channels."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from tests.support.clips import Sound, write_sound

Remap = Callable[[Fraction], Fraction | None]


def rewrite(source: Path, target: Path, remap: Remap, *, container_format: str | None = None, **options: str) -> Path:
    """Copy the packets of the only track of `source`; `remap` moves each one's time (s) or leaves it out (None).

    Times count from the first packet.
    """
    with (
        av.open(str(source)) as given,
        av.open(str(target), "w", format=container_format, options=options) as made,
    ):
        stream = given.streams[0]
        copy: Any = made.add_stream_from_template(stream)
        base: Fraction | None = None
        for packet in given.demux(stream):
            if packet.pts is None or not packet.size:
                continue
            unit = Fraction(packet.time_base.numerator, packet.time_base.denominator)
            base = packet.pts * unit if base is None else base
            time = remap(packet.pts * unit - base)
            if time is None:
                continue
            packet.pts = packet.dts = round((time + base) / unit)
            packet.stream = copy
            made.mux(packet)
    return target


def pcm_wav(samples: NDArray[Any], rate: int, *, n_bytes: int | None = None) -> bytes:
    """A WAV of 16 bits from float samples (channels, n); `n_bytes` is the length that its header claims."""
    n_channels = samples.shape[0]
    data: bytes = np.clip(np.rint(samples.T * 32767), -32768, 32767).astype("<i2").tobytes()
    claimed = len(data) if n_bytes is None else n_bytes
    head = struct.pack("<HHIIHH", 1, n_channels, rate, rate * 2 * n_channels, 2 * n_channels, 16)
    total = min(36 + claimed, 2**32 - 1)
    return (
        b"RIFF" + struct.pack("<I", total) + b"WAVEfmt \x10\0\0\0" + head + b"data" + struct.pack("<I", claimed) + data
    )


def many_channels(samples: NDArray[Any], n_channels: int) -> NDArray[np.float32]:
    """The mono samples (n,) in each of `n_channels` channels, a little softer in each further one: (channels, n)."""
    gains = np.linspace(1.0, 0.5, n_channels, dtype=np.float32)
    return np.asarray(gains[:, None] * samples[None, :], np.float32)


def write_many(path: Path, samples: NDArray[Any], rate: int, codec: str, sample_format: str, **options: str) -> Path:
    """Sound of any number of channels; planar formats of eight channels and more cannot be filled by PyAV itself."""
    n_channels = samples.shape[0]
    layouts = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
    layout = layouts.get(n_channels, f"{n_channels} channels")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.codec_context.layout, stream.codec_context.format = layout, sample_format
        stream.options = options
        stream.codec_context.open(strict=False)
        for frame in _frames(samples, rate, layout, sample_format, stream.codec_context.frame_size or 1024):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _frames(samples: NDArray[Any], rate: int, layout: str, sample_format: str, size: int) -> list[Any]:
    graph = av.filter.Graph()
    source = graph.add("abuffer", f"sample_rate={rate}:sample_fmt=flt:channel_layout={layout}:time_base=1/{rate}")
    form = graph.add("aformat", f"sample_fmts={sample_format}")
    graph.link_nodes(source, form, graph.add("abuffersink")).configure()
    frames = []
    for start in range(0, samples.shape[1], size):
        flat = np.ascontiguousarray(samples[:, start : start + size].T, np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(flat, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        graph.push(frame)
        frames.append(graph.pull())
    return frames


def joined(path: Path, parts: Sequence[Path]) -> Path:
    """The bytes of all parts, one behind the other."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def damaged(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The bytes cut, with bits turned, a stretch of zeros, doubled or missing, or joined to another file's."""
    spoiled = bytearray(data)
    kind = rng.choice(["flip", "flip", "flip", "cut", "join", "zeros", "drop", "double"])
    start = rng.randrange(len(spoiled))
    end = min(len(spoiled), start + rng.randrange(1, max(2, len(spoiled) // 4)))
    if kind == "flip":
        for _ in range(rng.choice([1, 4, 16, 64])):
            # Half of the flips in the head, where the sizes and counts are.
            limit = 600 if rng.random() < 0.5 else len(spoiled)
            spoiled[rng.randrange(min(limit, len(spoiled)))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del spoiled[max(1, start) :]
    elif kind == "join":
        spoiled = spoiled[:end] + other[rng.randrange(len(other)) :]
    elif kind == "zeros":
        spoiled[start:end] = bytes(end - start)
    elif kind == "drop":
        del spoiled[start:end]
    else:
        spoiled[start:start] = spoiled[start:end]
    return bytes(spoiled) or b"\0"


__all__ = ["Sound", "damaged", "joined", "many_channels", "pcm_wav", "rewrite", "write_many", "write_sound"]
