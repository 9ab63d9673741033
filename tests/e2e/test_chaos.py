"""A real worker in buffer mode while everything around it fails: afterwards every job has its one outcome.

The orchestrator, the bucket, the media host, the disk, connections and processes misbehave at random. Jobs are good and
bad ones; a good one is given out again until it succeeds, as orchestrators do. The last third ends no process, so that
what the process holds at the end can be compared with what it held at first.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.buffer_mode import start_worker
from tests.support.chaos import Chaos, Figures, Ledger, figures_of
from tests.support.fake_b2 import FakeB2
from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.media_host import Answer, MediaHost
from tests.support.rendering import FACE, durations_of, make_audio, make_source
from tests.support.server import Server, wait_until
from tests.support.small_disk import small_disk
from tests.support.strangers import damaged

DISK_MIB = 200
LENGTHS_S = (0.3, 0.6, 1.2)
N_WARM = 6
SETTLE_S = 300
# A quarter of the jobs bring something that no worker can use.
HOSTILE = ("page.mp4", "damaged.mp4", "damaged.wav", "empty.wav", "missing.mp4")


class Stage:
    """The worker and everything around it."""

    def __init__(self, folder: Path, models: Path, stack: ExitStack, seed: int) -> None:
        self.folder, self.models = folder, models
        self.host = stack.enter_context(MediaHost())
        self.bucket = stack.enter_context(FakeB2())
        self.orchestrator = stack.enter_context(FakeOrchestrator())
        # An hour of calls would be memory of the test.
        self.orchestrator.calls = _Forgetful()
        self.rng = random.Random(seed)
        self.ledger = Ledger(self.orchestrator, self.make_job)
        self.work = folder / "work"
        stack.enter_context(small_disk(self.work, mib=DISK_MIB))
        self._serve_media()
        self.n_starts = 0
        self.is_over = False
        self.server = self._start()

    def _serve_media(self) -> None:
        media = self.folder / "made"
        media.mkdir()
        source = make_source(media / "source.mp4", 10).read_bytes()
        self.host.serve("/source.mp4", Answer(body=source, ranges=True, headers={"ETag": '"1"'}))
        sound = b""
        for length_s in LENGTHS_S:
            sound = make_audio(media / f"{length_s}.wav", length_s).read_bytes()
            self.host.serve(f"/{length_s}.wav", Answer(body=sound, ranges=True, headers={"ETag": '"1"'}))
        self.host.serve("/page.mp4", Answer(body=b"<html>" + b"no video " * 500))
        # A cut in the middle of the moov box: no bytes of it make a video.
        self.host.serve("/damaged.mp4", Answer(body=source[:1500]))
        self.host.serve("/damaged.wav", Answer(body=b"RIFF" + bytes(2000)))
        self.host.serve("/empty.wav", Answer(body=b""))
        for number in range(20):
            self.host.serve(f"/odd-{number}.mp4", Answer(body=damaged(source, sound, self.rng)))

    def make_job(self, number: int) -> tuple[dict[str, Any], float, bool]:
        length_s = self.rng.choice(LENGTHS_S)
        video, audio = "/source.mp4", f"/{length_s}.wav"
        must_succeed = number % 4 != 3 and number % 8 != 5
        if number % 4 == 3:
            hostile = self.rng.choice(HOSTILE)
            video, audio = (f"/{hostile}", audio) if hostile.endswith(".mp4") else (video, f"/{hostile}")
        elif number % 8 == 5:
            # May be made or refused: a damaged file is either.
            video = f"/odd-{number % 20}.mp4"
        fields = {
            "buffer_job_id": f"chaos/{number}",
            "musetalk_job_id": f"chaos {number}",
            "video_url": self.host.url(video),
            "audio_url": self.host.url(audio),
            "params": {"face_box": list(FACE)},
        }
        return fields, length_s, must_succeed

    def _start(self) -> Server:
        self.n_starts += 1
        return start_worker(
            self.folder,
            self.models,
            self.orchestrator,
            ALLOW_PRIVATE_NETWORKS="1",
            MIN_FREE_DISK_MB="0",
            AVATAR_DISK_MB="0",
            B2_KEY_ID=self.bucket.key[0],
            B2_APP_KEY=self.bucket.key[1],
            B2_BUCKET_NAME=self.bucket.bucket,
            B2_REALM=self.bucket.realm,
            GRACEFUL_TIMEOUT_SEC="20",
        )

    # -- processes --

    def parent(self) -> psutil.Process | None:
        try:
            return psutil.Process(self.server.process.pid)
        except psutil.NoSuchProcess:
            return None

    def serving(self) -> psutil.Process | None:
        try:
            children = psutil.Process(self.server.process.pid).children()
            return children[0] if children else None
        except psutil.NoSuchProcess:
            return None

    def keep_running(self) -> None:
        """Start the worker again whenever it has ended, as Docker does."""
        while not self.is_over:
            if self.server.process.poll() is not None:
                # The port is the next worker's own.
                self.server.log.close()
                self.server.reservation.close()
                self.server = self._start()
            time.sleep(0.2)

    # -- calm --

    def figures(self) -> Figures:
        """Run a few good jobs without trouble, and look."""
        before = sum(job.final is not None for job in self.ledger.jobs.values())
        self.ledger.is_closed = False
        wait_until(lambda: sum(job.final is not None for job in self.ledger.jobs.values()) >= before + N_WARM, SETTLE_S)
        self.settle()
        process = self.serving()
        assert process is not None
        return figures_of(process, self.work)

    def settle(self) -> None:
        """Wait until every job has its outcome and the worker is idle."""
        self.ledger.is_closed = True
        wait_until(lambda: not self.ledger.open_jobs, SETTLE_S)
        self.server.wait_for(200)
        wait_until(lambda: not self.server.health()[1].get("busy"))
        wait_until(lambda: not list(self.work.glob("outbox/*")) and not list(self.work.glob("job-*")), 60)


class _Forgetful(list[Any]):
    """Keeps the last calls only."""

    def append(self, call: Any) -> None:
        super().append(call)
        del self[:-200]


@contextmanager
def stage(folder: Path, models: Path, seed: int) -> Iterator[Stage]:
    with ExitStack() as stack:
        scene = Stage(folder, models, stack, seed)
        keeper = threading.Thread(target=scene.keep_running)
        keeper.start()
        try:
            yield scene
        finally:
            scene.is_over = True
            keeper.join()
            scene.server.stop()


@pytest.mark.parametrize(
    "minutes",
    [
        pytest.param(0.5, id="half-a-minute"),
        *(pytest.param(m, id=f"{m}-minutes", marks=pytest.mark.slow) for m in (5, 60)),
    ],
)
def test_after_chaos_every_job_has_one_outcome_and_every_video_is_in_the_bucket(
    minutes: float, tmp_path: Path, tiny_models: Path
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "1"))
    print(f"seed {seed}")
    with stage(tmp_path, tiny_models, seed) as scene:
        scene.server.wait_for(200)
        before = scene.figures()
        chaos = Chaos(
            seed,
            ledger=scene.ledger,
            bucket=scene.bucket,
            host=scene.host,
            work=scene.work,
            serving=scene.serving,
            parent=scene.parent,
        )
        scene.ledger.is_closed = False
        begun, length_s = time.monotonic(), minutes * 60
        while (past_s := time.monotonic() - begun) < length_s:
            chaos.act(is_gentle=past_s > length_s * 2 / 3)
            time.sleep(chaos.pause_s())
        scene.settle()
        after = scene.figures()
        jobs = list(scene.ledger.jobs.values())
        print(f"{len(jobs)} jobs, {sum(job.n_claims for job in jobs)} claims, {scene.n_starts} starts")
        print(dict(chaos.happened), dict(scene.ledger.n_calls), before, after, sep="\n")
        check_jobs(scene, tmp_path)
        check_figures(before, after)


def check_jobs(scene: Stage, folder: Path) -> None:
    assert scene.ledger.problems == []
    for job in scene.ledger.jobs.values():
        body = job.final
        assert body is not None, f"{job.id} has no outcome"
        if body["status"] != "succeeded":
            assert not job.must_succeed, f"{job.id}: {body}"
            continue
        name = f"{body['output_url'].split('/file/clips/')[1]}".replace("%20", " ")
        video = folder / "stored.mp4"
        video.write_bytes(scene.bucket.newest(name).body)
        picture_s, sound_s = durations_of(video)
        assert abs(float(picture_s) - job.length_s) <= 0.04, job.id
        assert abs(float(sound_s) - job.length_s) <= 0.05, job.id


def check_figures(before: Figures, after: Figures) -> None:
    # The first thirty jobs of a process fill its caches and pools (test_soak.py); before, there were six.
    assert after.rss_mib - before.rss_mib < 120
    assert after.n_threads <= before.n_threads + 1
    assert after.n_descriptors <= before.n_descriptors + 3
    assert after.names == before.names
    assert abs(after.disk_mib - before.disk_mib) < 4
