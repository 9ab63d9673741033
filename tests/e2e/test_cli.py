"""The command line, as a person runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_a_broken_source_is_one_line_and_the_status_of_a_wrong_input(tmp_path: Path, tiny_models: Path) -> None:
    (tmp_path / "source.mp4").write_bytes(b"nothing" * 500)
    audio = make_audio(tmp_path / "a.wav", 0.4)
    done = run_core(tiny_models, str(tmp_path / "source.mp4"), str(audio), str(tmp_path / "out.mp4"))
    assert done.returncode == 3
    assert "error in validation: the source" in done.stderr
    assert "loading the models" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.mp4").exists()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_source(tmp_path / "source.mp4", 6), make_audio(tmp_path / "a.wav", 0.4)


@pytest.mark.parametrize(
    ("source", "audio", "output", "status", "complaint"),
    [
        ("none.mp4", "a.wav", "out.mp4", 3, "SOURCE does not exist: {}/none.mp4"),
        ("source.mp4", "none.wav", "out.mp4", 3, "AUDIO does not exist: {}/none.wav"),
        (".", "a.wav", "out.mp4", 3, "SOURCE is not a file: {}"),
        ("source.mp4", "a.wav", "source.mp4", 2, "OUTPUT is SOURCE itself and would replace it: {}/source.mp4"),
        ("source.mp4", "a.wav", "link.wav", 2, "OUTPUT is AUDIO itself and would replace it: {}/a.wav"),
        ("source.mp4", "a.wav", "none/out.mp4", 2, "the folder of OUTPUT does not exist: {}/none"),
        ("source.mp4", "a.wav", ".", 2, "OUTPUT is a folder: {}"),
    ],
)
def test_a_path_that_makes_no_sense_is_named_before_anything_is_loaded(
    pair: tuple[Path, Path], tmp_path: Path, source: str, audio: str, output: str, status: int, complaint: str
) -> None:
    (tmp_path / "link.wav").hardlink_to(pair[1])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    done = run_core(tmp_path / "models", *(str(tmp_path / name) for name in (source, audio, output)))
    assert done.returncode == status
    assert done.stderr.strip() == f"error: {complaint.format(tmp_path)}"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_preview_prints_nothing_of_a_library(pair: tuple[Path, Path], tmp_path: Path, tiny_models: Path) -> None:
    box = f"face_box={list(FACE)}"
    arguments = [*map(str, pair), str(tmp_path / "x.png"), "--preview", "0.1", "--param", box]
    done = run_core(tiny_models, *arguments)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("loading the models")] == []


def test_missing_weights_are_listed(tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 6), make_audio(tmp_path / "a.wav", 0.4)
    done = run_core(tmp_path, str(source), str(audio), str(tmp_path / "out.mp4"))
    assert done.returncode == 4
    assert "dwpose/dw-ll_ucoco_384.pth" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_parameter_is_refused(tmp_path: Path, tiny_models: Path) -> None:
    done = run_core(tiny_models, "a.mp4", "a.wav", "out.mp4", "--param", "guidance=3")
    assert done.returncode == 2
    assert "guidance" in done.stderr
