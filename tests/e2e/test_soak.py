"""Two hundred short jobs in one process: memory, threads, file handles and disk stay as they were."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.rendering import make_audio, make_source
from tests.support.server import Server, wait_until

N_JOBS = 200
# The first jobs fill caches and pools.
N_WARM = 30


@pytest.mark.slow
def test_two_hundred_jobs_leave_the_process_as_it_was(tmp_path: Path, tiny_models: Path) -> None:
    (tmp_path / "media").mkdir()
    make_source(tmp_path / "media/source.mp4", 8)
    make_audio(tmp_path / "media/audio.wav", 0.3)
    (tmp_path / "media/page.mp4").write_text("<html>" + "not a video " * 200, encoding="utf-8")
    server = Server(tmp_path, tiny_models, faulty=True)
    try:
        server.wait_for(200)
        (worker,) = psutil.Process(server.process.pid).children()
        measured: list[tuple[float, int, int]] = []
        for number in range(N_JOBS):
            if number % 10 == 9:
                # Failures must leave nothing behind either.
                bad = server.job("bad", video_url=(tmp_path / "media/page.mp4").as_uri())
                assert server.post(bad).status_code == 422
            elif number % 25 == 12:
                server.command("fail-disk")
                assert server.post(server.job("full")).status_code == 500
            else:
                assert server.post(server.job("soak")).status_code == 200
            measured.append((worker.memory_info().rss / 2**20, worker.num_threads(), worker.num_fds()))
        wait_until(lambda: server.leftovers() == [])
        early, late = measured[N_WARM : N_WARM + 20], measured[-20:]
        assert min(rss for rss, _, _ in late) - max(rss for rss, _, _ in early) < 40, measured[::20]
        assert max(threads for _, threads, _ in late) <= max(threads for _, threads, _ in early), measured[::20]
        assert max(handles for _, _, handles in late) <= max(handles for _, _, handles in early) + 2, measured[::20]
        assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["soak.json", "soak.mp4"]
    finally:
        server.stop()
