"""The one way a file of the outside world is opened (docs/media.md#opening-files).

A local path that the worker chose, a list of containers, a list of protocols, time limits and a pixel limit, always all
of them: a playlist or script that names other files or hosts is refused before anything in it is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import av
import av.error

from musetalk.errors import MediaError, ProcessingError
from musetalk.foreign_files import unreadable_reason
from musetalk.media.limits import MediaLimits

PictureFormat = Literal["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]

# FFmpeg's names of the containers that are accepted; a demuxer outside this list is never run.
# (docs/media.md#containers says how each was tried.)
CONTAINERS = (
    *("mov", "mp4", "matroska", "webm", "avi", "mpegts", "wav", "mp3", "ogg", "flac", "aac"),
    *("aiff", "caf", "au", "amr", "asf", "flv", "mpeg", "ac3", "eac3", "w64", "loas", "wv", "tta"),
)

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC
# What only the machine can be the cause of; "input/output error" is what some demuxers say of a file that was cut.
_MACHINE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ESTALE}

# Titles in unknown encodings must not end the job. PyAV 19 and newer never raise for them and dropped the argument.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

_PICTURE_MAGIC: tuple[tuple[bytes, PictureFormat], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
)
# Brands of the ISO container for photographs, not films: FFmpeg would show one tile of them.
_PHOTO_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis"}


def picture_format(path: Path, what: str = "the source") -> PictureFormat | None:
    """Return the picture format that the first bytes of `path` announce, None when it is not a picture.

    Raises MediaError for an empty file and for photograph formats that cannot be read, ProcessingError when the file
    does not exist or is not a regular file.
    """
    head = _head(path, what)
    if head[4:8] == b"ftyp" and head[8:12] in _PHOTO_BRANDS:
        raise MediaError(f"{what} is a HEIC or AVIF picture; send JPEG, PNG or WebP instead")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    # "BM" alone is two letters of any text: a bitmap has zeros in its reserved field as well.
    if head[:2] == b"BM" and head[6:10] != b"\0\0\0\0":
        return None
    return next((name for magic, name in _PICTURE_MAGIC if head.startswith(magic)), None)


def _head(path: Path, what: str) -> bytes:
    try:
        # Looked at before opening: opening a named pipe waits for its other end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ProcessingError(f"{what} is not a regular file")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise ProcessingError(f"{what} cannot be read: {error.strerror}") from None
    if not head:
        raise MediaError(f"{what} is empty")
    return head


@contextmanager
def open_container(
    path: Path, limits: MediaLimits, what: str = "the source", *, span: tuple[int, int] | None = None
) -> Iterator[Any]:
    """Open the container of `path`, or of a `span` of its bytes (first, behind the last), and close it after the block.

    FFmpeg's errors inside the block become ours. Raises MediaError for a container that is not accepted or cannot be
    decoded, ProcessingError for a system error.
    """
    options = {
        "format_whitelist": ",".join(CONTAINERS),
        "protocol_whitelist": "file" if span is None else "file,subfile",
        "max_pixels": str(limits.max_pixels),
    }
    with ffmpeg_errors(what):
        try:
            # The prefix keeps a name such as "concat:a|b" from being read as a protocol.
            address = f"file:{os.path.abspath(path)}"
            if span is not None:
                address = f"subfile,,start,{span[0]},end,{span[1]},,:{address}"
            container = av.open(
                address,
                options=options,
                timeout=(limits.open_timeout_s, limits.read_timeout_s),
                **_METADATA,
            )
        except (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError):
            # The last is what a demuxer outside the list ends with.
            raise MediaError(unreadable_reason(path, what)) from None
        try:
            if not set(container.format.name.split(",")) & set(CONTAINERS):
                raise MediaError(f"{what} is in a container that is not supported", container=container.format.name)
            yield container
        finally:
            container.close()


@contextmanager
def ffmpeg_errors(what: str) -> Iterator[None]:
    """Turn FFmpeg's errors into MediaError (caused by the input) or ProcessingError (caused by the system).

    FFmpeg's own text is dropped because it contains the path.
    """
    try:
        yield
    except (MemoryError, av.error.MemoryError):
        raise ProcessingError(f"there is not enough memory to decode {what}", reason="MemoryError") from None
    except av.error.FFmpegError as error:
        raise _translated(error, what) from None


def _translated(error: av.error.FFmpegError, what: str) -> Exception:
    reason = type(error).__name__
    if isinstance(error, av.error.ExitError):
        return MediaError(f"{what} could not be read in time", reason=reason)
    if error.errno in _MACHINE_ERRORS:
        return ProcessingError(f"{what} cannot be read: {error.strerror}", reason=reason)
    return MediaError(f"{what} cannot be decoded: {error.strerror}", reason=reason)


def video_stream(container: Any, what: str = "the source") -> Any:
    """The video stream to show: the largest that is not a cover picture; raises MediaError when there is none."""
    streams = [stream for stream in container.streams.video if not _is_cover(stream) and stream.codec_context]
    if not streams:
        raise MediaError(f"{what} has no video")
    return max(streams, key=lambda stream: stream.codec_context.width * stream.codec_context.height)


def audio_stream(container: Any, what: str = "the audio") -> Any:
    """The audio stream FFmpeg prefers; raises MediaError when there is none."""
    streams = [stream for stream in container.streams.audio if stream.codec_context]
    if not streams:
        raise MediaError(f"{what} has no sound")
    best = container.streams.best("audio")
    return best if best in streams else streams[0]


def _is_cover(stream: Any) -> bool:
    return bool(int(stream.disposition) & _ATTACHED_PICTURE)


def prepare_decoder(stream: Any, limits: MediaLimits) -> Any:
    """The decoder of `stream` with its pixel limit and threads, before it decodes its first packet."""
    context = stream.codec_context
    alpha = _ALPHA_DECODERS.get(context.name)
    if alpha in av.codecs_available and stream.metadata.get("alpha_mode") == "1":
        # FFmpeg's own decoders of VP8 and VP9 leave transparency out.
        context = av.CodecContext.create(alpha, "r")
    context.thread_count = limits.decoder_threads
    context.thread_type = "AUTO"
    if stream.type == "video":
        # A header may announce a small picture while the stream contains a large one.
        context.options = {"max_pixels": str(limits.max_pixels)}
    return context


def packets(container: Any, wanted: Any, on_break: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """The packets of a stream, or of a tuple of them, and an empty one of each at the end.

    `on_break` is called when the container breaks off.
    """
    streams = wanted if isinstance(wanted, tuple) else (wanted,)
    flushed: set[int] = set()
    try:
        for packet in container.demux(streams):
            if not packet.size:
                flushed.add(packet.stream.index)
            yield packet
    except IndexError:
        # Of PyAV, at the end of a file in whose middle a further track begins (transport streams): nothing is missing.
        pass
    except av.error.FFmpegError as error:
        if error.errno in _MACHINE_ERRORS or isinstance(error, (av.error.ExitError, av.error.MemoryError)):
            raise
        on_break()
    # An empty packet flushes the frames that are still in the decoder.
    for stream in streams:
        if stream.index not in flushed:
            empty = av.Packet()
            empty.stream = stream
            yield empty


def decode(packet: Any, what: str = "the source", decoder: Any = None) -> list[Any]:
    """Decode `packet`, with the `decoder` of its stream or another, and return the frames.

    Raises MediaError when the codec is not known.
    """
    try:
        if decoder is None or decoder is packet.stream.codec_context:
            return list(packet.decode())
        return list(decoder.decode(packet if packet.size else None))
    except av.error.FFmpegError:
        raise
    except ValueError:
        # Since PyAV 19 such streams have a codec that only fails here; before, they have none at all.
        raise MediaError(f"{what} is in a format that cannot be decoded") from None
