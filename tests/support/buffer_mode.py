"""A real worker in buffer mode, beside a loopback orchestrator."""

from __future__ import annotations

from pathlib import Path

from tests.support.fake_orchestrator import FakeOrchestrator
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
