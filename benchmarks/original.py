"""The steps of the original scripts' order of work, rewritten: PNG files, Pillow on whole pictures, two encodes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image

from musetalk.blending import blend_mask, face_mask
from musetalk.frames import UInt8Array
from musetalk.geometry import Box

_FIRST_PASS = {"preset": "medium", "crf": "18"}
_SECOND_PASS = {"preset": "medium", "crf": "23"}


def dump_source(clip: Path, folder: Path, n_frames: int, png_filter: str) -> Fraction:
    """The first `n_frames` frames of `clip` as numbered PNG files by FFmpeg's encoder; returns the frame rate."""
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        encoder: Any = av.CodecContext.create("png", "w")
        encoder.width, encoder.height, encoder.pix_fmt = stream.width, stream.height, "rgb24"
        encoder.time_base, encoder.options = Fraction(1, 25), {"pred": png_filter}
        for index, frame in enumerate(container.decode(stream)):
            if index == n_frames:
                break
            rgb = frame.reformat(format="rgb24")
            rgb.pts = index
            data = b"".join(bytes(packet) for packet in encoder.encode(rgb))
            (folder / f"{index:08d}.png").write_bytes(data)
        assert stream.average_rate is not None
        return Fraction(stream.average_rate)


def read_picture(path: Path) -> UInt8Array:
    """A picture file as BGR uint8 (H, W, 3)."""
    picture = cv2.imread(str(path))
    assert picture is not None, path
    return np.asarray(picture, np.uint8)


def blend_whole(frame: UInt8Array, face: UInt8Array, labels: UInt8Array, box: Box, around: Box) -> UInt8Array:
    """The face over a BGR frame (H, W, 3), by Pillow on whole pictures, with a mask made for this frame alone."""
    canvas = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    square = canvas.crop((around.x0, around.y0, around.x1, around.y1))
    square.paste(Image.fromarray(cv2.cvtColor(face, cv2.COLOR_BGR2RGB)), (box.x0 - around.x0, box.y0 - around.y0))
    mask = Image.fromarray(blend_mask(face_mask(labels, "jaw"), box, around))
    canvas.paste(square, (around.x0, around.y0), mask)
    return np.asarray(cv2.cvtColor(np.asarray(canvas), cv2.COLOR_RGB2BGR), np.uint8)


def encode_pictures(folder: Path, output: Path, rate: Fraction) -> None:
    """First pass: the numbered PNG files as H.264 without sound."""
    with av.open(str(output), "w") as container:
        stream: Any = None
        for index, path in enumerate(sorted(folder.iterdir())):
            picture = read_picture(path)
            if stream is None:
                stream = add_x264(container, rate, (picture.shape[1], picture.shape[0]), _FIRST_PASS)
            frame: Any = av.VideoFrame.from_ndarray(picture, format="bgr24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def encode_again(silent: Path, audio: Path, output: Path) -> int:
    """Second pass: decode and encode the video again, with the sound as AAC; return the number of frames."""
    n_frames = 0
    with av.open(str(silent)) as source, av.open(str(audio)) as sound, av.open(str(output), "w") as container:
        pictures, voice = source.streams.video[0], sound.streams.audio[0]
        assert pictures.average_rate is not None
        pictures.thread_type = "AUTO"
        rate = Fraction(pictures.average_rate)
        n_samples = round(pictures.frames / rate * voice.rate)
        video = add_x264(container, rate, (pictures.width, pictures.height), _SECOND_PASS)
        track: Any = container.add_stream("aac", rate=voice.rate)
        track.codec_context.layout = "mono" if voice.codec_context.layout.nb_channels == 1 else "stereo"
        blocks = sound.decode(voice)
        n_heard = 0
        for n_frames, picture in enumerate(source.decode(pictures), start=1):
            frame: Any = picture
            frame.pts, frame.time_base = n_frames - 1, 1 / rate
            frame.pict_type = 0  # or the second encoder would repeat the first one's choice
            container.mux(video.encode(frame))
            n_due = min(float(n_frames / rate * voice.rate), float(n_samples))
            while n_heard < n_due and (block := next(blocks, None)) is not None:
                n_heard += block.samples
                container.mux(track.encode(block))
        container.mux(video.encode(None))
        container.mux(track.encode(None))
    return n_frames


def add_x264(container: Any, rate: Fraction, size: tuple[int, int], options: dict[str, str]) -> Any:
    """A new H.264 stream of `size` px, with as many threads as x264 likes."""
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 0
    return stream
