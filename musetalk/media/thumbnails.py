"""Small pictures of videos, for lists. Knows no model."""

from __future__ import annotations

from pathlib import Path

import cv2

from musetalk.errors import ProcessingError
from musetalk.frames import planes_to_bgr
from musetalk.media.decoder import probe_source, read_source
from musetalk.media.limits import MediaLimits

# The first frames of many videos are black or show a mouth that is still shut.
_FRAME = 8
_QUALITY = 80


def thumbnail(path: Path, side_px: int, limits: MediaLimits | None = None) -> bytes:
    """Return one of the first frames of a video as a JPEG whose longer side has `side_px`.

    Raises MediaError for a file that is no video.
    """
    limits = limits or MediaLimits()
    info = probe_source(path, limits)
    shown = None
    for frame in read_source(path, info, limits, max_frames=_FRAME):
        shown = frame
    if shown is None:
        raise ProcessingError("the video has no picture")
    picture = planes_to_bgr(shown.planes, info.colour.matrix)
    scale = side_px / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise ProcessingError("the picture could not be encoded")
    return encoded.tobytes()
