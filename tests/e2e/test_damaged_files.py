"""Files damaged at random, posted to a real worker: each ends as a video or as 422, and the worker is what it was."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.clips import Sound, picture, tone, write_clip, write_sound
from tests.support.rendering import make_audio, make_source
from tests.support.server import Server
from tests.support.strangers import damaged, many_channels, pcm_wav, write_many

RATE = 48_000
SOUNDS: dict[str, dict[str, Any]] = {
    "a.aiff": {"codec": "pcm_s16be"},
    "a.caf": {"codec": "pcm_s16le"},
    "a.au": {"codec": "pcm_s16be"},
    "a.wma": {"codec": "wmav2", "rate": 44_100, "bit_rate": 128_000},
    "a.flv": {"codec": "aac", "rate": 44_100},
    "a.mpg": {"codec": "mp2", "bit_rate": 192_000},
    "a.ac3": {"codec": "ac3", "bit_rate": 192_000},
    "a.eac3": {"codec": "eac3", "bit_rate": 192_000},
    "a.w64": {"codec": "pcm_s16le"},
    "a.wv": {"codec": "wavpack", "sample_format": "s16p"},
    "a.tta": {"codec": "tta", "sample_format": "s16"},
    "a.opus": {"codec": "libopus"},
    "a.flac": {"codec": "flac"},
    "a.mp3": {"codec": "libmp3lame"},
    "a.m4a": {"codec": "aac"},
    "a.aac": {"codec": "aac"},
    "a.webm": {"codec": "libopus"},
    "a.ts": {"codec": "aac"},
    "a.avi": {"codec": "libmp3lame", "rate": 44_100},
    "alac.mov": {"codec": "alac", "sample_format": "s16p"},
}
CLIPS: dict[str, dict[str, Any]] = {
    "c.mp4": {"b_frames": 2},
    "c.mkv": {"codec": "libx265"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "c.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "c.ts": {},
    "c.mpg": {"codec": "mpeg2video"},
    "c.flv": {"codec": "flv"},
    "prores.mov": {"codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "rle.mov": {"codec": "qtrle", "pixel_format": "rgb24"},
    "ffv1.mkv": {"codec": "ffv1"},
}
STILLS = ("s.png", "s.jpg", "s.webp", "s.bmp", "s.tiff", "s.gif", "animated.gif", "animated.webp", "animated.png")


def write_all(folder: Path) -> tuple[list[Path], list[Path]]:
    """(sources, sounds): a small whole file of each container and codec."""
    sources, sounds = [], []
    for name, options in CLIPS.items():
        sources.append(write_clip(folder / name, 6, size=(96, 64), **options))
    image = Image.fromarray(np.ascontiguousarray(picture(3, 96, 64)[..., ::-1]))
    for name in STILLS:
        more: Any = {"save_all": True, "append_images": [image.rotate(90)] * 3} if name.startswith("animated") else {}
        image.save(folder / name, **more)
        sources.append(folder / name)
    for name, options in SOUNDS.items():
        chosen = {"rate": RATE, **options}
        sounds.append(write_sound(folder / name, Sound(tone(0.4, chosen["rate"]), **chosen)))
    sounds.append(write_many(folder / "8.m4a", many_channels(tone(0.4, RATE), 8), RATE, "aac", "fltp"))
    sounds.append(write_many(folder / "8.flac", many_channels(tone(0.4, RATE), 8), RATE, "flac", "s16"))
    (folder / "16.wav").write_bytes(pcm_wav(many_channels(tone(0.4, RATE), 16), RATE))
    return sources, [*sounds, folder / "16.wav"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("damage")
    server = Server(folder, tiny_models, AVATAR_DISK_MB="0", AVATAR_MEMORY_MB="0")
    make_source(folder / "media/source.mp4", 4)
    make_audio(folder / "media/audio.wav", 0.2)
    try:
        server.wait_for(200)
        yield server
    finally:
        server.stop()


def run(worker: Server, n: int, seed: int, folder: Path) -> dict[str, int]:
    """Post `n` jobs about damaged files; returns the number of each outcome."""
    rng = random.Random(seed)
    media = worker.folder / "media"
    sources, sounds = write_all(folder)
    serving = {child.pid for child in psutil.Process(worker.process.pid).children()}
    outcomes: dict[str, int] = {}
    for index in range(n):
        field = rng.choice(["video_url", "audio_url"])
        pool = sources if field == "video_url" else sounds
        whole, other = rng.choice(pool), rng.choice(sources + sounds)
        # Below a kilobyte the worker looks at nothing.
        path = media / "damaged"
        path.write_bytes(damaged(whole.read_bytes(), other.read_bytes(), rng))
        job = worker.job(f"damaged-{index}", **{field: path.as_uri()}, params={"face_box": [8, 8, 72, 60]})
        answer = worker.post(job)
        label = f"seed {seed}, file {index}, {whole.name}: {answer.text[:300]}"
        assert answer.status_code in {200, 422}, label
        body = answer.json()
        if answer.status_code == 422:
            assert body["error_type"] == "media_error", label
            assert str(worker.folder) not in answer.text, label
            assert "unexpected" not in body["error_message"], label
        outcomes[body["status"]] = outcomes.get(body["status"], 0) + 1
        assert worker.leftovers() == [], label
    assert {child.pid for child in psutil.Process(worker.process.pid).children()} == serving
    assert worker.entries("unexpected error in a request") == []
    assert "Traceback" not in worker.log_text()
    return outcomes


def test_damaged_files_are_made_or_refused_and_the_worker_lives(worker: Server, tmp_path: Path) -> None:
    outcomes = run(worker, 30, int(os.environ.get("DAMAGE_SEED", "1")), tmp_path)
    assert set(outcomes) == {"success", "failed"}


@pytest.mark.slow
def test_two_thousand_damaged_files(worker: Server, tmp_path: Path) -> None:
    process = psutil.Process(worker.process.pid).children()[0]
    # Until the largest pictures of all kinds were in the heap once.
    run(worker, 200, 2, tmp_path)
    before = process.memory_info().rss, process.num_fds(), process.num_threads()
    outcomes = run(worker, 1800, 3, tmp_path)
    print(outcomes)
    assert process.memory_info().rss - before[0] < 100 * 2**20
    assert process.num_fds() <= before[1] + 2
    assert process.num_threads() <= before[2] + 2
