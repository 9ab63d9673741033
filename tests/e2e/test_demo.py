"""The demo bundle really speaks: its figures on the shipped files, and the one command that shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.evaluate import avatar_reader, quick_figures, read_frames
from demo.export import MAX_BYTES
from demo.make_pair import AVATAR, CLIP_S, FPS, MEDIA, POSE_SEED, SPEECH, natural_poses
from demo.stages import MODELS
from musetalk import media
from musetalk.errors import WeightsError
from musetalk.geometry import ping_pong_index
from musetalk.models import find_version
from musetalk_core import Core
from tests.support.server import Server
from worker.config import ROOT, load_settings


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return quick_figures()


def test_the_mouth_opens_on_speech_at_the_right_moment(figures: dict[str, float]) -> None:
    assert figures["reader_r"] > 0.95, "the ruler itself"
    assert figures["open_r"] >= 0.75
    assert abs(figures["best_lag_frames"]) <= 1
    assert figures["amplitude"] >= 0.6
    assert abs(figures["shifted_r"]) <= 0.2


def test_the_mouth_stays_shut_in_silence(figures: dict[str, float]) -> None:
    assert abs(figures["silent_opening"]) <= 0.05
    assert figures["silent_spread"] <= 0.02


def test_the_spoken_mouth_is_nearer_the_truth_than_the_untouched_one(figures: dict[str, float]) -> None:
    assert figures["spoken_l1"] < figures["untouched_l1"]
    assert figures["spoken_ssim"] > figures["untouched_ssim"]
    assert figures["outside_db"] > 44


def test_the_bundle_and_the_pair_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= MAX_BYTES
    assert sum(path.stat().st_size for path in MEDIA.iterdir()) <= 1_000_000


def test_the_pair_fits() -> None:
    source = media.probe_source(AVATAR, media.MediaLimits())
    sound = media.probe_audio(SPEECH, media.MediaLimits())
    assert (source.width, source.height, float(source.rate)) == (512, 512, 25)
    assert sound.duration is not None
    assert 5 <= sound.duration <= 10


def test_auto_takes_the_demo_only_where_no_official_file_is(tmp_path: Path) -> None:
    assert find_version(tmp_path, MODELS) == ("demo", MODELS)
    (tmp_path / "sd-vae").mkdir()
    (tmp_path / "sd-vae/config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(WeightsError, match=r"musetalkV15/unet.pth"):
        find_version(tmp_path, MODELS)


def test_with_no_weights_and_no_settings_the_worker_runs_the_demo_and_says_so(tmp_path: Path) -> None:
    server = Server(tmp_path, tmp_path / "empty")
    try:
        assert server.wait_for(200)["model"] == "demo"
        (loud,) = [entry for entry in server.entries_starting("NO OFFICIAL WEIGHTS") if entry["severity"] == "warning"]
        assert "demo" in loud["message"]
    finally:
        server.stop()


def test_one_command_shows_the_demo(tmp_path: Path) -> None:
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
        "MUSETALK_PYTHON": sys.executable,
        "OUTPUT_DIR": str(tmp_path / "outputs"),
        "WORK_DIR": str(tmp_path / "work"),
        "AVATAR_DIR": str(tmp_path / "avatars"),
        "MIN_FREE_DISK_MB": "16",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "run_worker.sh"), "--demo"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path == tmp_path / "outputs/demo.mp4"
    sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["model"] == "demo"
    made = media.inspect_source(path, media.MediaLimits())
    sound = media.probe_audio(SPEECH, media.MediaLimits())
    assert sound.duration is not None
    assert made.n_frames is not None
    assert abs(made.n_frames / 25 - float(sound.duration)) <= 1 / 25
    # The lips move in speech and rest in the pause before it.
    poses = natural_poses(round(CLIP_S * FPS), POSE_SEED)
    frames = read_frames(path)
    shown = [poses[ping_pong_index(index, len(poses))] for index in range(len(frames))]
    opening = avatar_reader().read(frames, shown)[:, 0]
    assert abs(opening[:4].mean()) < 0.1
    assert opening.max() > 0.5
    assert opening[10:-10].std() > 0.15
    assert "100%" in done.stderr
    assert "model demo" in done.stderr


def test_a_setting_that_asks_for_the_demo_gets_it(tmp_path: Path) -> None:
    core = Core(
        load_settings(
            {"MUSETALK_MODEL": "demo", "MUSETALK_DEVICE": "cpu", "WORK_DIR": str(tmp_path), "AVATAR_DISK_MB": "0"}, None
        )
    )
    core.load()
    assert core.readiness.model == "demo"
