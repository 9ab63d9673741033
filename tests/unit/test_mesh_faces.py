"""Faces without the official detector: the drawn portrait is found where it was drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo.identity import random_identity
from demo.portrait import Portrait, Pose
from demo.visemes import SHUT
from musetalk import mesh_faces
from musetalk.errors import WeightsError
from musetalk.mesh_faces import JawParser, MeshFaceFinder, NoFaceFinder, find_files, jaw_labels


@pytest.fixture(scope="module")
def finder() -> MeshFaceFinder:
    return MeshFaceFinder(*find_files())


@pytest.fixture(scope="module")
def portrait() -> Portrait:
    return Portrait(n_strands=12)


@pytest.mark.parametrize("pose", [Pose(), Pose(roll_deg=6, dx=20, dy=-15), Pose(scale=0.8, dx=-40), Pose(blink=1)])
def test_the_portrait_is_found_where_it_is(finder: MeshFaceFinder, portrait: Portrait, pose: Pose) -> None:
    (face,) = finder.find([portrait.picture(SHUT, pose)])
    assert face is not None
    assert face.score > 0.5
    left, right, nose, chin = portrait.contour(pose)
    half = chin[1] - nose[1]
    for found, drawn in zip(
        (face.box.x0, face.box.x1, face.box.y1, face.box.y0), (left[0], right[0], chin[1], nose[1] - half), strict=True
    ):
        assert abs(found - drawn) < 0.12 * 2 * half
    assert face.landmarks is not None
    assert face.landmarks.shape == (68, 2)


def test_other_people_and_other_sizes_are_found(finder: MeshFaceFinder) -> None:
    for seed in range(3):
        person = Portrait(random_identity(np.random.default_rng(seed)), n_strands=6)
        picture = person.picture(SHUT, Pose())
        wide = np.pad(picture, ((0, 0), (300, 500), (0, 0)), mode="edge")
        whole, shifted = finder.find([picture, wide])
        assert whole is not None, seed
        assert shifted is not None, seed
        assert abs((shifted.box.x0 - 300) - whole.box.x0) < 14


def test_a_picture_without_a_face_has_none(finder: MeshFaceFinder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3)).astype(np.uint8)
    assert finder.find([np.full((200, 300, 3), 127, np.uint8), noise]) == [None, None]
    assert finder.find([]) == []


def test_missing_files_are_named_when_a_face_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_faces, "_PACKAGE", "no_such_package_at_all")
    with pytest.raises(WeightsError, match=r"requirements-nodeps\.txt") as caught:
        find_files()
    finder = NoFaceFinder(caught.value.message)
    assert finder.find([]) == []
    with pytest.raises(WeightsError, match="face_box"):
        finder.find([np.zeros((8, 8, 3), np.uint8)])


def test_a_file_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "another_package/data"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    for name in ("face_detection_back.tflite", "face_landmark.tflite"):
        (package / name).write_bytes(b"not the file")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(mesh_faces, "_PACKAGE", "another_package")
    with pytest.raises(WeightsError, match=r"face_detection_back.tflite is not the file"):
        find_files()


def test_the_jaw_lies_in_the_lower_half_of_the_crop_and_ends_above_its_last_rows() -> None:
    labels = jaw_labels(512)
    rows, columns = np.nonzero(labels)
    # The crop box is the middle two thirds of the square.
    top, bottom = 512 / 6, 512 * 5 / 6
    assert rows.max() < bottom - 0.04 * (bottom - top)
    assert rows.min() > top + 0.35 * (bottom - top)
    np.testing.assert_allclose(columns.min() + columns.max(), 511, atol=2)
    parsed = JawParser().labels([np.zeros((10, 10, 3), np.uint8)] * 3)
    assert parsed.shape == (3, 512, 512)
    assert (parsed == labels).all()
    assert JawParser().labels([]).shape == (0, 512, 512)
