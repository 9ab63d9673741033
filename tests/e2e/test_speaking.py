"""Every way into the worker, with the demo model and a real sentence: lips move with the sound and rest without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from demo.evaluate import avatar_reader, read_frames, window
from demo.make_pair import AVATAR, CLIP_S, FPS, POSE_SEED, SPEECH, natural_poses, write_clip
from demo.texture import TexturedPortrait
from demo.visemes import SHUT
from musetalk.geometry import ping_pong_index
from tests.support import clips
from tests.support.buffer_mode import start_worker
from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.server import Server
from worker.config import ROOT

# Sound is made of a stretch of the sentence and a stretch of nothing.
SPOKEN_S, SILENT_S = 1.2, 0.8


def opening_of(path: Path) -> NDArray[np.float64]:
    """How far the mouth is open in each frame of a video of the avatar: 0 shut, 1 wide."""
    frames = read_frames(path)
    poses = natural_poses(round(CLIP_S * FPS), POSE_SEED)
    shown = [poses[ping_pong_index(index, len(poses))] for index in range(len(frames))]
    opening: NDArray[np.float64] = avatar_reader().read(frames, shown)[:, 0]
    return opening


def assert_speaks(path: Path) -> None:
    """The first part speaks, the second is silent; both are read from the pixels."""
    opening = opening_of(path)
    assert len(opening) == round((SPOKEN_S + SILENT_S) * FPS)
    spoken, silent = opening[: round(SPOKEN_S * FPS)], opening[round((SPOKEN_S + 0.4) * FPS) :]
    assert spoken.max() > 0.5
    assert spoken.std() > 0.15
    assert abs(silent.mean()) < 0.08
    assert silent.std() < 0.05


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo sentence's beginning, then silence."""
    with av.open(str(SPEECH)) as container:
        rate = container.streams.audio[0].rate
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    samples: NDArray[Any] = np.concatenate(parts)
    scale = np.iinfo(samples.dtype).max if samples.dtype.kind == "i" else 1
    voice = (samples / scale).astype(np.float32)
    first = int(np.flatnonzero(np.abs(voice) > 0.05)[0])
    spoken = voice[first : first + round(SPOKEN_S * rate)]
    silence = np.zeros(round((SPOKEN_S + SILENT_S) * rate) - len(spoken), np.float32)
    sound = clips.Sound(np.concatenate([spoken, silence]), rate=rate, codec="pcm_s16le", sample_format="s16")
    return clips.write_sound(tmp_path_factory.mktemp("speech") / "speech.wav", sound)


def with_media(folder: Path, speech: Path) -> Path:
    (folder / "media").mkdir()
    shutil.copy(AVATAR, folder / "media/source.mp4")
    shutil.copy(speech, folder / "media/audio.wav")
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, speech: Path) -> Iterator[Server]:
    folder = with_media(tmp_path_factory.mktemp("speaking"), speech)
    server = Server(folder, folder / "no-models")
    try:
        server.wait_for(200)
        yield server
    finally:
        server.stop()


def test_a_posted_job_speaks_and_the_same_source_again_is_prepared_and_speaks_the_same(worker: Server) -> None:
    made = []
    for name in ("first", "again"):
        answer = worker.post(worker.job(name, params={}))
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["model"] == "demo"
        made.append((body["video"]["source_frames_reused"], worker.folder / f"outputs/{name}.mp4"))
    assert made[0][0] == 0
    assert made[1][0] == round((SPOKEN_S + SILENT_S) * FPS)
    assert made[0][1].read_bytes() == made[1][1].read_bytes()
    assert_speaks(made[0][1])


def test_stubble_that_the_model_cannot_draw_comes_back_with_detail(worker: Server) -> None:
    portrait, poses = TexturedPortrait(), natural_poses(6, 31)
    drawn = [portrait.picture(SHUT, pose) for pose in poses]
    write_clip(worker.folder / "media/textured.mp4", drawn, crf=4)
    clips.write_sound(
        worker.folder / "media/quiet.wav",
        clips.Sound(np.zeros(3840, np.float32), rate=16_000, codec="pcm_s16le", sample_format="s16"),
    )

    def fine_energy(frames: list[NDArray[np.uint8]]) -> float:
        """Of the chin, in the band that a patch hardly has."""
        chins = [window(f, portrait, p, (184, 128))[96:].mean(axis=2) for f, p in zip(frames, poses, strict=True)]
        return float(np.std([chin - cv2.GaussianBlur(chin, (0, 0), 2.0) for chin in chins]))

    def made(name: str, **params: float) -> list[NDArray[np.uint8]]:
        media = worker.folder / "media"
        addresses = {"video_url": (media / "textured.mp4").as_uri(), "audio_url": (media / "quiet.wav").as_uri()}
        answer = worker.post(worker.job(name, params=params, **addresses))
        assert answer.status_code == 200, answer.text
        return read_frames(worker.folder / f"outputs/{name}.mp4")

    plain, detailed = made("plain"), made("detailed", detail=1)
    assert fine_energy(plain) < 0.7 * fine_energy(drawn)
    assert fine_energy(detailed) == pytest.approx(fine_energy(drawn), rel=0.25)


def test_restoring_without_a_restorer_is_refused_and_named(worker: Server) -> None:
    answer = worker.post(worker.job("restored", params={"restore": 0.5}))
    assert answer.status_code == 422
    assert answer.json()["details"]["field"] == "params.restore"


def test_a_claimed_job_speaks(tmp_path: Path, speech: Path) -> None:
    folder = with_media(tmp_path, speech)
    with FakeOrchestrator() as orchestrator:
        server = start_worker(folder, folder / "no-models", orchestrator)
        try:
            server.wait_for(200)
            orchestrator.jobs.append({"buffer_job_id": "buffer/1", **server.job("claimed", params={})})
            orchestrator.wait_for(lambda: orchestrator.of("status"), limit_s=240)
        finally:
            server.stop()
    assert_speaks(folder / "outputs/claimed.mp4")


def test_the_command_line_speaks(tmp_path: Path, speech: Path) -> None:
    output = tmp_path / "out.mp4"
    done = subprocess.run(
        [sys.executable, "musetalk_core.py", str(AVATAR), str(speech), str(output)],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "MUSETALK_ENV_FILE": "none",
            "MUSETALK_MODEL": "demo",
            "AVATAR_DISK_MB": "0",
            "MUSETALK_CPU_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_speaks(output)
