"""The command line, as a person runs it."""

from __future__ import annotations

from pathlib import Path

from tests.support.commands import run_core
from tests.support.rendering import FACE, make_audio, make_source

ROOT = Path(__file__).resolve().parents[2]


def test_a_video_is_made_and_summed_up(tmp_path: Path, tiny_models: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 6), make_audio(tmp_path / "a.wav", 0.4)
    box = f"face_box={list(FACE)}"
    done = run_core(tiny_models, str(source), str(audio), str(tmp_path / "out.mp4"), "--param", box)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 1000
    assert "10 frames, 192x256, 25.000 fps, 0.400 s, model v15" in done.stdout
    for stage in ("validation", "preprocessing", "inference", "postprocessing"):
        assert stage in done.stdout
    assert "10/10" in done.stderr  # the bar


def test_a_broken_source_is_one_line_and_status_one(tmp_path: Path, tiny_models: Path) -> None:
    (tmp_path / "source.mp4").write_bytes(b"nothing" * 500)
    audio = make_audio(tmp_path / "a.wav", 0.4)
    done = run_core(tiny_models, str(tmp_path / "source.mp4"), str(audio), str(tmp_path / "out.mp4"))
    assert done.returncode == 1
    assert "error in validation: the source" in done.stderr
    assert "loading the models" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.mp4").exists()


def test_a_file_that_is_not_there_is_named(tmp_path: Path, tiny_models: Path) -> None:
    done = run_core(tiny_models, str(tmp_path / "none.mp4"), str(tmp_path / "none.wav"), str(tmp_path / "out.mp4"))
    assert done.returncode == 1
    assert "the source" in done.stderr
    assert "loading the models" not in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_weights_are_listed(tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 6), make_audio(tmp_path / "a.wav", 0.4)
    done = run_core(tmp_path, str(source), str(audio), str(tmp_path / "out.mp4"))
    assert done.returncode == 1
    assert "dwpose/dw-ll_ucoco_384.pth" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_parameter_is_refused(tmp_path: Path, tiny_models: Path) -> None:
    done = run_core(tiny_models, "a.mp4", "a.wav", "out.mp4", "--param", "guidance=3")
    assert done.returncode == 1
    assert "guidance" in done.stderr
