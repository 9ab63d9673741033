"""The project's own Gunicorn configuration, in a worker that waits or fails where the test's folder says.

Files in FAULTS_DIR are the commands: `hold-<stage>` makes the next job wait when it enters that stage (`held-<stage>`
appears, and it goes on when the command is gone); `fail-<kind>` makes the networks or the disk fail once; `slow` makes
each chunk take its time (`generating` appears); `decoder-<fault>` makes the decoder crash, hang or eat memory in the
middle of each file; `break-<thread>` makes the next step of a thread raise what nobody foresees.
"""

from __future__ import annotations

import errno
import os
import runpy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_own = runpy.run_path(str(_ROOT / "gunicorn.conf.py"))
globals().update({name: value for name, value in _own.items() if not name.startswith("__")})
_folder = Path(os.environ["FAULTS_DIR"])


def _take(name: str) -> bool:
    """Whether the command was given; it is used up by that."""
    try:
        (_folder / name).unlink()
    except FileNotFoundError:
        return False
    return True


_DECODER_FAULTS = """
folder = pathlib.Path({folder!r})
if (folder / "decoder-crash").exists():
    os.kill(os.getpid(), signal.SIGSEGV)
if (folder / "decoder-hang").exists():
    signal.pause()
if (folder / "decoder-memory").exists():
    hoard = [numpy.empty(2**27) for _ in range(99)]
"""


def _breaking(step: Any, thread: str) -> Any:
    def broken(self: Any) -> Any:
        if _take(f"break-{thread}"):
            raise KeyError("nobody foresees this")
        return step(self)

    return broken


def _install() -> None:
    import torch

    import poller
    from musetalk.media import decoder_main
    from tests.support.faulty_decoder import write_faulty_main
    from worker import engine

    main = write_faulty_main(_folder.parent / "decoder_main.py", _DECODER_FAULTS.format(folder=str(_folder)), after=12)
    decoder_main.__file__ = str(main)
    own_limits = engine._media_limits
    engine._media_limits = lambda settings: replace(own_limits(settings), stall_s=3.0)

    from musetalk.generator import Generator
    from musetalk.media import VideoWriter
    from worker.telemetry import StageClock

    stage_of, start, write = StageClock.stage, Generator.start, VideoWriter.write

    @contextmanager
    def stage(self: StageClock, name: Any) -> Iterator[None]:
        with stage_of(self, name):
            if (_folder / f"hold-{name}").exists():
                (_folder / f"held-{name}").touch()
                while (_folder / f"hold-{name}").exists():
                    time.sleep(0.02)
            yield

    def faulty_start(self: Generator, *given: Any) -> Any:
        if _take("fail-lost"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nsecret detail of the driver")
        if _take("fail-memory-once"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (_folder / "fail-memory").exists():
            raise torch.OutOfMemoryError("CUDA out of memory")
        if _take("fail-odd"):
            raise KeyError("/a/path/of/ours")
        if (_folder / "slow").exists():
            (_folder / "generating").touch()
            time.sleep(0.2)
        return start(self, *given)

    def faulty_write(self: VideoWriter, planes: Any) -> None:
        if _take("fail-disk"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/path/of/ours")
        write(self, planes)

    for owner, name, thread in ((poller.Heartbeat, "beat", "heartbeat"), (poller.Poller, "step", "poller")):
        setattr(owner, name, _breaking(getattr(owner, name), thread))
    StageClock.stage = stage  # type: ignore[method-assign]
    Generator.start = faulty_start  # type: ignore[method-assign, assignment]
    VideoWriter.write = faulty_write  # type: ignore[method-assign]


def post_fork(server: Any, worker: Any) -> None:
    """The faults first, then the worker's own hook."""
    _install()
    _own["post_fork"](server, worker)
