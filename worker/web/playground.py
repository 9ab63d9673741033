"""The page at `/` to try the worker on, and the uploads it sends; only with `python app.py` or PLAYGROUND=1.

Uploaded files are written to the work folder while they arrive, never kept in memory, and removed with the request.
Knows Flask and jobs, no torch and no media.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flask import Blueprint, Flask, Request, Response, current_app, request, send_from_directory
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import LengthRequired, RequestEntityTooLarge

from musetalk.errors import DiskFullError, RequestError, UnavailableError
from worker.config import ROOT, Settings
from worker.jobs import Job, parse_upload
from worker.web.bodies import decode_json
from worker.work_dir import WORK_PREFIX

_PAGE = Path(__file__).resolve().parent / "page"
_DEMO_MEDIA = ROOT / "demo/media"
# Everything is loaded from this server; a video is the page's own file or a link to the bucket.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob: https:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_FORM = "multipart/form-data"
# For the small fields of a form and its separators.
_FORM_BYTES = 1_000_000
# Two files and a few text fields.
_MAX_PARTS = 8
# Uploads that may arrive at once: one for the next job, one more for a second person at the page.
MAX_UPLOADS = 2
_MIB = 2**20

blueprint = Blueprint("playground", __name__)


class UploadRequest(Request):
    """A request whose uploaded files go to the work folder, each into a folder that a restart would remove."""

    max_form_parts = _MAX_PARTS

    @property
    def settings(self) -> Settings:
        """The settings of the core that this app serves."""
        settings = current_app.extensions["core"].settings
        assert isinstance(settings, Settings)
        return settings

    @property
    def max_content_length(self) -> int | None:
        """Both files and the form around them for an upload, else the usual limit."""
        if self.mimetype == _FORM and current_app.extensions.get("playground"):
            return self.settings.max_video_bytes + self.settings.max_audio_bytes + _FORM_BYTES
        return super().max_content_length

    @max_content_length.setter
    def max_content_length(self, _value: int | None) -> None:
        raise AttributeError("the limit follows the settings")

    def _get_file_stream(self, *_facts: Any, **_more: Any) -> IO[bytes]:
        """Open the file that werkzeug writes an uploaded part to."""
        self.settings.work_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{WORK_PREFIX}upload-", dir=self.settings.work_dir))
        file = (folder / "upload.bin").open("wb+")
        self.environ.setdefault("musetalk.uploads", []).append((folder, file))
        return file


class UploadRoom:
    """The room for uploads that are arriving: their number, and the bytes that are promised to them."""

    def __init__(self, settings: Settings) -> None:
        self._folder, self._reserve_bytes = settings.work_dir, settings.min_free_disk_mb * _MIB
        self._changed = threading.Lock()
        self._n_uploads = self._n_bytes = 0

    @contextmanager
    def reserve(self, n_bytes: int) -> Iterator[None]:
        """Keep room for an upload of `n_bytes` inside the block.

        Raises UnavailableError while others arrive, DiskFullError when the folder has too little room.
        """
        with self._changed:
            if self._n_uploads >= MAX_UPLOADS:
                raise UnavailableError("the worker is busy with other uploads", state="busy")
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < self._n_bytes + n_bytes + self._reserve_bytes:
                raise DiskFullError("the disk has too little room for this upload", kind="disk", needed_bytes=n_bytes)
            self._n_uploads += 1
            self._n_bytes += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._n_uploads -= 1
                self._n_bytes -= n_bytes


@contextmanager
def receiving(given: Request) -> Iterator[None]:
    """Room and time for the files of a form, inside the block.

    Raises LengthRequired for a form of unknown size, RequestEntityTooLarge for one beyond the limits, UnavailableError
    and DiskFullError where there is no room.
    """
    assert isinstance(given, UploadRequest)
    if given.content_length is None:
        raise LengthRequired("an upload needs Content-Length")
    if given.content_length > (given.max_content_length or 0):
        raise RequestEntityTooLarge(f"the upload is larger than {given.max_content_length} bytes")
    room = current_app.extensions["playground"]
    assert isinstance(room, UploadRoom)
    with room.reserve(given.content_length):
        # Only the server under Gunicorn has a limit for the whole body.
        if (connection := given.environ.get("musetalk.connection")) is not None:
            connection.allow_body(given.settings.upload_receive_timeout_s)
        yield


def register(app: Flask) -> None:
    """Serve the page and accept uploads."""
    app.extensions["playground"] = UploadRoom(app.extensions["core"].settings)
    app.register_blueprint(blueprint)
    app.teardown_request(_remove_uploads)


def _remove_uploads(_error: BaseException | None = None) -> None:
    for folder, file in request.environ.pop("musetalk.uploads", []):
        file.close()
        shutil.rmtree(folder, ignore_errors=True)


def is_upload(given: Request) -> bool:
    """Whether a request is a form of the page, and the page is served."""
    return given.mimetype == _FORM and bool(current_app.extensions.get("playground"))


def uploaded_job(given: Request) -> Job:
    """Parse the job in a form: parts `source` and `audio` are files, `params` JSON, `musetalk_job_id` text.

    Raises RequestError that names the wrong part, RequestEntityTooLarge for a file beyond its limit.
    """
    assert isinstance(given, UploadRequest)
    settings, form = given.settings, given.form
    # Also for the answer to a form that is refused below.
    given.environ["musetalk.job_id"] = job_id = form.get("musetalk_job_id") or f"upload-{uuid.uuid4()}"
    paths: dict[str, Path] = {}
    for name, limit in (("source", settings.max_video_bytes), ("audio", settings.max_audio_bytes)):
        file = given.files.get(name)
        if file is None or not file.filename:
            raise RequestError(f"{name} must be a file", field=name)
        paths[name] = path_of(file, name, limit)
    return parse_upload(
        {
            "musetalk_job_id": job_id,
            "aspect_ratio": form.get("aspect_ratio"),
            "resolution": form.get("resolution"),
            "params": _params(form),
        },
        (paths["source"], paths["audio"]),
    )


def path_of(file: FileStorage, name: str, limit: int) -> Path:
    """Path of an uploaded file; raises RequestEntityTooLarge beyond `limit` bytes."""
    stream: Any = file.stream
    stream.flush()
    path = Path(stream.name)
    if path.stat().st_size > limit:
        raise RequestEntityTooLarge(f"{name} is larger than {limit} bytes")
    return path


def _params(form: Mapping[str, str]) -> object:
    try:
        return decode_json(form.get("params") or "{}")
    except ValueError:
        raise RequestError("params must be JSON", field="params") from None


@blueprint.get("/")
def page() -> Response:
    """The page."""
    return guarded(send_from_directory(_PAGE, "index.html", max_age=0))


@blueprint.get("/playground/<name>")
def asset(name: str) -> Response:
    """Its style and its script."""
    return guarded(send_from_directory(_PAGE, name, max_age=0))


@blueprint.get("/playground/demo/<path:name>")
def demo_file(name: str) -> Response:
    """The demo pair and the samples."""
    return guarded(send_from_directory(_DEMO_MEDIA, name, max_age=3600))


def guarded(response: Response) -> Response:
    """Add the headers of the page: nothing may be loaded from elsewhere, and no type is guessed."""
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
