"""Results that the page lists: the newest videos of the local folder, described by the JSON files beside them.

Knows files and jobs' sidecars; no Flask.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from musetalk.errors import MuseTalkError, NotFoundError

# Shown on the page.
MAX_RESULTS = 12
# Sidecars are about two kilobytes.
_MAX_SIDECAR_BYTES = 65_536
_THUMBNAIL_PX = 320
_KEPT_THUMBNAILS = 48
_FIELDS = ("musetalk_job_id", "model", "params", "stage_times", "video", "warnings", "create_time_utc", "size_bytes")


class History:
    """The finished videos of one folder, and small pictures of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thumbnails: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def newest(self) -> list[dict[str, Any]]:
        """The newest results, each with its name and the path that serves it; files that are no result are left out."""
        found = []
        for path in sorted(self._sidecars(), key=_age, reverse=True):
            if (result := _read(path)) is not None:
                found.append(result)
            if len(found) == MAX_RESULTS:
                break
        return found

    def stamp(self) -> str:
        """A text that changes when a result is added or removed."""
        try:
            return f"{self._folder.stat().st_mtime_ns:x}"
        except OSError:
            return ""

    def delete(self, name: str) -> None:
        """Remove a video and its JSON file; raises NotFoundError when there is no such result."""
        video = self._video(name)
        video.unlink(missing_ok=True)
        video.with_suffix(".json").unlink(missing_ok=True)

    def thumbnail(self, name: str) -> bytes:
        """A small JPEG of a result; raises NotFoundError."""
        from musetalk import media

        video = self._video(name)
        key = (name, video.stat().st_mtime_ns)
        # One at a time: each starts processes that decode.
        with self._lock:
            if key not in self._thumbnails:
                try:
                    self._thumbnails[key] = media.thumbnail(video, _THUMBNAIL_PX)
                except MuseTalkError:
                    raise NotFoundError("this result has no picture") from None
            self._thumbnails.move_to_end(key)
            while len(self._thumbnails) > _KEPT_THUMBNAILS:
                self._thumbnails.popitem(last=False)
            return self._thumbnails[key]

    def _video(self, name: str) -> Path:
        """The file of a result; a name never leads out of the folder."""
        video = self._folder / name
        is_plain = "/" not in name and "\\" not in name and "\0" not in name and name.endswith(".mp4")
        if not is_plain or not video.is_file() or not video.with_suffix(".json").is_file():
            raise NotFoundError("no such result is here")
        return video

    def _sidecars(self) -> list[Path]:
        return list(self._folder.glob("*.json"))


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> dict[str, Any] | None:
    """The result that a sidecar describes; None for any other file."""
    try:
        if path.stat().st_size > _MAX_SIDECAR_BYTES or not path.with_suffix(".mp4").is_file():
            return None
        body = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or not isinstance(body.get("video"), dict) or "musetalk_job_id" not in body:
        return None
    name = path.with_suffix(".mp4").name
    return {"name": name, "path": f"/outputs/{quote(name)}", **{field: body.get(field) for field in _FIELDS}}
