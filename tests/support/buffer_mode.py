"""A real worker in buffer mode, beside a loopback orchestrator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.rendering import make_audio, make_source
from tests.support.server import Server

KEY = "key-of-this-test"
WORKER = "worker/1 ü"


def start_worker(
    folder: Path, models: Path, orchestrator: FakeOrchestrator, *, faulty: bool = False, **environment: str
) -> Server:
    variables = {
        "BUFFER_WORKER_ID": WORKER,
        "ORCHESTRATOR_BASE_URL": orchestrator.url,
        "INTERNAL_API_KEY": KEY,
        "GPU_CLASS": "RTX 3080 (10 GB)",
        "BUFFER_POLL_INTERVAL_SEC": "0.1",
        **environment,
    }
    return Server(folder, models, faulty=faulty, **variables)


def prepare(folder: Path) -> Path:
    """Make the media of a short and a long job in `folder`; return it."""
    (folder / "media").mkdir()
    make_source(folder / "media/source.mp4", 10)
    make_audio(folder / "media/audio.wav", 0.6)
    make_audio(folder / "media/long.wav", 8)
    return folder


def claimed(server: Server, number: int, **fields: Any) -> dict[str, Any]:
    """A short job as the answer to a claim contains it."""
    return {"buffer_job_id": f"buffer/{number}", **server.job(f"muse {number}"), **fields}
