"""The tree of errors, and what each branch means to the caller.

    MuseTalkError
    ├── MediaError            caused by the input: a retry fails again
    │   ├── DownloadError     an address could not be turned into a file
    │   ├── NoFaceError       no frame of the source shows a face
    │   └── RequestError      the request itself: missing or malformed field
    │       ├── UnauthorizedError      it lacks the key
    │       ├── NotFoundError          no such route, job or file
    │       └── MethodNotAllowedError  the route exists, with other methods
    ├── ProcessingError       caused by the worker or something it depends on
    │   ├── WeightsError      a model file is missing, cut short or of another network
    │   ├── EncodeError       the output could not be written or failed its check
    │   ├── DiskFullError     no room left for this job
    │   ├── OutOfMemoryError  the GPU ran out of memory, also at the smallest batch
    │   ├── StorageError      the finished file could not be stored
    │   ├── DeadlineError     a time limit passed
    │   ├── CancelledError    the job was stopped
    │   │   ├── JobCancelledError  by its caller: nobody retries
    │   │   └── ShutdownError      because the worker shuts down
    │   ├── GpuLostError      the GPU needs a new process
    │   └── UnavailableError  busy, starting or shutting down
    └── SettingsError         the environment is wrong: the process does not start

A branch is what the caller can do; the HTTP statuses are in `worker.jobs`. The core sets `stage` and `stage_times`.
`details` are values for a person or a program, never a secret, a signed address or a path of this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class MuseTalkError(Exception):
    """Base of all errors raised on purpose; the text is written for the reader of the log."""

    error_type: ClassVar[str] = "unknown_error"
    default_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retryable: bool | None = None, **details: object) -> None:
        """`message` names the wrong field or file; `details` (JSON values) go into the error body unchanged."""
        super().__init__(message)
        self.message = message
        self.retryable = self.default_retryable if retryable is None else retryable
        self.details = details
        self.stage: str | None = None
        self.stage_times: Mapping[str, float] = {}


class MediaError(MuseTalkError):
    """The input caused the error; the worker is healthy and a retry would fail again."""

    error_type = "media_error"


class DownloadError(MediaError):
    """The address could not be turned into a file."""


class NoFaceError(MediaError):
    """No frame of the source shows a face."""


class RequestError(MediaError):
    """The request is invalid: a field is missing, malformed or out of range."""


class UnauthorizedError(RequestError):
    """The request lacks the right key."""

    error_type = "unauthorized"


class NotFoundError(RequestError):
    """The request names a route, a job or a file that this worker does not have."""

    error_type = "not_found"


class MethodNotAllowedError(RequestError):
    """The route exists, but not with this method."""

    error_type = "method_not_allowed"


class ProcessingError(MuseTalkError):
    """The worker, or something it depends on, caused the error."""

    error_type = "processing_error"
    default_retryable = True


class WeightsError(ProcessingError):
    """A model file is missing, cut short, or belongs to another network."""

    default_retryable = False


class EncodeError(ProcessingError):
    """The output could not be written, or failed its check."""

    default_retryable = False


class DiskFullError(ProcessingError):
    """There is no room left on the disk for this job."""


class OutOfMemoryError(ProcessingError):
    """The GPU ran out of memory, also with the smallest batch."""


class StorageError(ProcessingError):
    """The finished file could not be stored."""


class DeadlineError(ProcessingError):
    """A time limit passed before the work was done."""


class CancelledError(ProcessingError):
    """The job was stopped before it was finished."""


class JobCancelledError(CancelledError):
    """The caller cancelled the job. Not retryable, so that no queue runs it again."""

    default_retryable = False


class ShutdownError(CancelledError):
    """The worker shuts down before the job is finished; another worker should run it."""


class GpuLostError(ProcessingError):
    """The GPU is in a state that only a new process repairs (an illegal access, a lost device)."""


class UnavailableError(ProcessingError):
    """The worker is busy, starting or shutting down."""


class SettingsError(MuseTalkError):
    """The environment is wrong; every problem found is listed in the message."""
