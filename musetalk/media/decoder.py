"""Reading of files in processes of their own: a decoder that crashes, hangs or eats memory costs a job, not the models.

Each file that is read gets a process with limits on time and memory, forked from a server that has imported the
decoders (docs/media.md#decoding-apart). Sound comes through a socket, pictures through shared memory.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from musetalk import errors
from musetalk.errors import MediaError, ProcessingError
from musetalk.frames import Planes, UInt8Array
from musetalk.media import decoder_main
from musetalk.media.converting import WHITE, Background
from musetalk.media.decoder_work import BLOCK_BYTES, PICTURE
from musetalk.media.limits import AudioInfo, MediaLimits, SourceInfo, audio_from_json, source_from_json, to_json
from musetalk.media.reading import SourceFrame
from musetalk.media.sound import WAVEFORM_RATE, joined_waveform

Float32Array = NDArray[np.float32]
OnWarning = Callable[[str], None]

SOURCE, AUDIO = "the source", "the audio"
# Pictures that the process may be ahead; more would only fill memory.
_SLOTS = 4
# Signals by which a decoder dies; anything else came from outside and says nothing about the file.
_OUTSIDE_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# What the server needs to find its libraries; nothing of the worker's settings or credentials.
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "LANG", "LC_ALL")
_MESSAGE_BYTES = BLOCK_BYTES + 1
# Between the end of a process and the news of it.
_STATUS_S = 10.0


class _Server:
    """The running decoder server of this process; started at the first use and again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._owner = 0
        self._n_tasks = 0

    def run(self, descriptors: list[int]) -> int:
        """Fork a process for a task with these descriptors and return the task's number; raises ProcessingError."""
        with self._lock:
            self._n_tasks += 1
            for is_last_try in (False, True):
                control = self._running(renew=is_last_try)
                try:
                    socket.send_fds(control, [f"run {self._n_tasks}".encode()], descriptors)
                    return self._n_tasks
                except OSError:
                    # It was killed: the next one serves.
                    continue
        raise ProcessingError("the process that decodes media cannot be started")

    def kill(self, number: int) -> None:
        """End a task's process if it still runs."""
        with self._lock:
            if self._control is not None and self._owner == os.getpid():
                with contextlib.suppress(OSError):
                    self._control.send(f"kill {number}".encode())

    def start(self) -> None:
        """Start the server if it does not run."""
        with self._lock:
            self._running(renew=False)

    def stop(self) -> None:
        """End the server and its tasks."""
        with self._lock:
            if self._control is not None:
                self._control.close()
            if self._process is not None and self._owner == os.getpid():
                self._process.kill()
                self._process.wait()
            self._process = self._control = None

    @property
    def pid(self) -> int | None:
        """The server's process id; None before its start."""
        return None if self._process is None else self._process.pid

    def _running(self, *, renew: bool) -> socket.socket:
        # A forked copy of this process must not talk to its parent's server.
        is_ours = self._owner == os.getpid()
        is_running = is_ours and self._process is not None and self._process.poll() is None
        if self._control is not None and is_running and not renew:
            return self._control
        if self._control is not None:
            self._control.close()
        if self._process is not None and is_ours:
            self._process.kill()
            self._process.wait()
        self._process, self._control = _start_server()
        self._owner = os.getpid()
        return self._control


def _start_server() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # An isolated interpreter knows its own packages only, so the paths of ours and of PYTHONPATH are passed on.
    root = str(Path(__file__).resolve().parents[2])
    sys_path = [root, *(os.path.abspath(entry) for entry in sys.path if entry)]
    with theirs:
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and file, no shell
                [sys.executable, "-I", "-B", decoder_main.__file__, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Decoders write about strangers' files what nobody can use.
                stderr=subprocess.DEVNULL,
                cwd=os.sep,
                # One thread: a process with several cannot be forked safely.
                env={**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                # A signal to the worker's group is the worker's to handle.
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise ProcessingError(f"the process that decodes media cannot be started: {error.strerror}") from None
    ours.send(json.dumps({"sys_path": sys_path}).encode())
    return process, ours


_server = _Server()
# An exit without it would leave the reaping of the process to the interpreter's end, which warns of it.
atexit.register(_server.stop)


def start_decoder() -> None:
    """Start the decoder server, so that the first job does not wait for it; raises ProcessingError."""
    _server.start()


def decoder_pid() -> int | None:
    """The process id of the decoder server; None before its start."""
    return _server.pid


class _ServerGoneError(ProcessingError):
    """The decoder server ended, and with it the news of its tasks."""


class _Task:
    """One file in a process of its own; leaving the `with` block ends the process."""

    def __init__(self, what: str, request: dict[str, Any], limits: MediaLimits, *, shared: int | None = None) -> None:
        self._what, self._limits = what, limits
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status, status = os.pipe()
        try:
            descriptors = [theirs.fileno(), status, *([] if shared is None else [shared])]
            self._number = _server.run(descriptors)
            self.channel.send(json.dumps({**request, "what": what, "limits": limits.to_json()}).encode())
        except BaseException:
            self.channel.close()
            os.close(self._status)
            raise
        finally:
            theirs.close()
            os.close(status)

    def __enter__(self) -> _Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        _server.kill(self._number)
        os.close(self._status)

    def receive(self, limit_s: float) -> tuple[bytes, bytes]:
        """The next message: its letter and its payload.

        Raises the error that the process sent, MediaError when it crashed or sent nothing for `limit_s` seconds,
        ProcessingError when it could not do its work for reasons of the machine.
        """
        self.channel.settimeout(limit_s)
        try:
            message = self._message()
        except TimeoutError:
            raise MediaError(f"{self._what} could not be read within {limit_s:g} s") from None
        if not message:
            raise self._ended()
        letter, payload = message[:1], message[1:]
        if letter == b"J":
            self._check(payload)
        return letter, payload

    def _message(self) -> bytes:
        """The next message, empty at the end."""
        try:
            return self.channel.recv(_MESSAGE_BYTES)
        except ConnectionResetError:
            # It ended without reading the last slots that we gave back; what it sent before is still here.
            return self.channel.recv(_MESSAGE_BYTES)

    def _check(self, payload: bytes) -> None:
        plain = json.loads(payload)
        if "error" in plain:
            raise getattr(errors, plain["error"])(plain["message"], retryable=plain["retryable"], **plain["details"])

    def _ended(self) -> Exception:
        """Why the process ended before its answer."""
        readable, _, _ = select.select([self._status], [], [], _STATUS_S)
        news = os.read(self._status, 16) if readable else b""
        if not news:
            return _ServerGoneError("the process that decodes media has ended")
        status = int(news)
        if status >= 0:
            return ProcessingError(f"the process that decodes media ended with status {status}")
        if -status in _OUTSIDE_SIGNALS:
            return ProcessingError("the process that decodes media was stopped from outside")
        if -status == getattr(signal, "SIGXCPU", None):
            return MediaError(f"{self._what} takes too much time to read")
        return MediaError(f"{self._what} cannot be decoded: it crashes the decoder", signal=-status)


def probe_source(path: Path, limits: MediaLimits) -> SourceInfo:
    """Describe a video, animation or still and decode its first picture, in a limited process.

    Raises MediaError for what is not supported, outside the limits, cannot be decoded or crashes the decoder,
    ProcessingError when the process could not do its work for reasons of the machine.
    """
    info: SourceInfo = _usable(source_from_json, _look("source", SOURCE, path, limits))
    return info


def probe_audio(path: Path, limits: MediaLimits) -> AudioInfo:
    """Describe the audio track of any media file and decode its beginning; see `probe_source`."""
    info: AudioInfo = _usable(audio_from_json, _look("audio", AUDIO, path, limits))
    return info


def probe_both(source: Path, audio: Path, limits: MediaLimits) -> tuple[SourceInfo, AudioInfo]:
    """`probe_source` and `probe_audio` at once; raises as they do, the source's error first."""
    with ThreadPoolExecutor(1, thread_name_prefix="probe") as pool:
        sound = pool.submit(probe_audio, audio, limits)
        return probe_source(source, limits), sound.result()


def _look(task: str, what: str, path: Path, limits: MediaLimits) -> dict[str, Any]:
    request = {"task": task, "path": os.path.abspath(path)}
    try:
        return _answer(what, request, limits)
    except _ServerGoneError:
        # Killed since the last file, for example by the system for want of memory; the next try starts it again.
        return _answer(what, request, limits)


def _answer(what: str, request: dict[str, Any], limits: MediaLimits) -> dict[str, Any]:
    with _Task(what, request, limits) as running:
        _, payload = running.receive(limits.probe_wall_s)
        plain: dict[str, Any] = json.loads(payload)
        return plain


def _usable(parse: Callable[[dict[str, Any]], Any], plain: dict[str, Any]) -> Any:
    try:
        return parse(plain["info"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProcessingError("the process that decodes media gave no usable answer") from error


def read_audio_blocks(
    path: Path,
    limits: MediaLimits,
    *,
    rate: int,
    n_channels: int,
    on_warning: OnWarning = lambda _: None,
) -> Generator[Float32Array, None, None]:
    """`musetalk.media.sound.read_audio_blocks` in a limited process: float32 (n_channels, n), n > 0.

    Closing the generator ends the process. Raises as the function does, and MediaError when the decoder crashes.
    """
    request = {"task": "sound", "path": os.path.abspath(path), "rate": rate, "n_channels": n_channels}
    with _Task(AUDIO, request, limits) as running:
        for payload in _until_end(running, b"B", limits, on_warning):
            yield np.frombuffer(payload, np.float32).reshape(-1, n_channels).T


def read_waveform(
    path: Path,
    info: AudioInfo,  # noqa: ARG001 - see below
    limits: MediaLimits,
    *,
    on_warning: OnWarning = lambda _: None,
) -> Float32Array:
    """The whole track as mono float32 (n,) at 16 kHz, full scale 1 (docs/model.md#sound-to-waveform).

    Its length is that of the decoded sound, not the header's; `info` says that the file was probed. Raises MediaError
    when it is shorter or longer than allowed, or when too much of it cannot be decoded.
    """
    blocks = read_audio_blocks(path, limits, rate=WAVEFORM_RATE, n_channels=1, on_warning=on_warning)
    return joined_waveform(blocks, limits)


def read_source(
    path: Path,
    info: SourceInfo,
    limits: MediaLimits,
    *,
    max_frames: int | None = None,
    background: Background = WHITE,
    on_warning: OnWarning = lambda _: None,
) -> Generator[SourceFrame, None, None]:
    """`musetalk.media.reading.read_source` in a limited process, which decodes ahead by a few pictures.

    Closing the generator ends the process. Raises as the function does, and MediaError when the decoder crashes.
    """
    n_bytes = info.width * info.height * 3 // 2
    request = {
        "task": "pictures",
        "path": os.path.abspath(path),
        "info": to_json(info),
        "max_frames": max_frames,
        "background": background,
        "slots": _SLOTS,
    }
    with (
        _shared_memory(_SLOTS * n_bytes) as (descriptor, memory),
        _Task(SOURCE, request, limits, shared=descriptor) as running,
    ):
        planes: Planes | None = None
        for payload in _until_end(running, b"P", limits, on_warning):
            index, slot = PICTURE.unpack(payload)
            if slot >= 0:
                pixels: UInt8Array = np.frombuffer(memory, np.uint8, n_bytes, slot * n_bytes).copy()
                planes = _as_planes(pixels, info.width, info.height)
                with contextlib.suppress(OSError):
                    running.channel.send(bytes([slot]))
            assert planes is not None
            yield SourceFrame(index, planes, is_repeat=slot < 0)


def _until_end(running: _Task, letter: bytes, limits: MediaLimits, on_warning: OnWarning) -> Iterator[bytes]:
    """The payloads of messages with `letter`; passes the warnings of the last message on."""
    while True:
        kind, payload = running.receive(limits.stall_s)
        if kind == letter:
            yield payload
            continue
        for warning in json.loads(payload).get("warnings", ()):
            on_warning(warning)
        return


@contextlib.contextmanager
def _shared_memory(n_bytes: int) -> Iterator[tuple[int, mmap.mmap]]:
    """Memory of `n_bytes` that a forked process can write to: its descriptor and a view of it."""
    descriptor = os.memfd_create("pictures")
    try:
        os.ftruncate(descriptor, n_bytes)
        memory = mmap.mmap(descriptor, n_bytes, prot=mmap.PROT_READ)
        try:
            yield descriptor, memory
        finally:
            memory.close()
    finally:
        os.close(descriptor)


def _as_planes(pixels: UInt8Array, width: int, height: int) -> Planes:
    """The planes that lie one behind the other in `pixels`."""
    n_luma, n_chroma = width * height, width * height // 4
    chroma = (height // 2, width // 2)
    return Planes(
        pixels[:n_luma].reshape(height, width),
        pixels[n_luma : n_luma + n_chroma].reshape(chroma),
        pixels[n_luma + n_chroma :].reshape(chroma),
    )
