"""Faces that the demo model was not made for: recognised, less redrawn, their colours kept."""

from __future__ import annotations

import cv2
import numpy as np

from demo.identity import random_identity
from demo.make_pair import AVATAR
from demo.pictures import random_box
from demo.portrait import Portrait, Pose
from demo.visemes import SHUT
from musetalk.generator import crop_patch
from musetalk.geometry import Box
from musetalk.strangers import give_back, is_demo_portrait, lip_colour, mouth_labels


def crop_of(portrait: Portrait, pose: Pose) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    random = np.random.default_rng(1)
    return crop_patch(portrait.picture(SHUT, pose), random_box(portrait, pose, random, 0.5), 192)


def test_the_demo_portrait_is_recognised_in_any_pose_and_nobody_else_is() -> None:
    assert AVATAR.is_file()
    avatar = Portrait(n_strands=60)
    for pose in (Pose(), Pose(roll_deg=3, dx=8, dy=-5, blink=1), Pose(scale=1.05, light=0.96)):
        assert is_demo_portrait(crop_of(avatar, pose))
    for seed in range(3):
        person = Portrait(random_identity(np.random.default_rng((21, seed, False))), n_strands=10)
        assert not is_demo_portrait(crop_of(person, Pose()))


def landmarks() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A frontal face about 200 px wide in a picture of 400, chin at 320, mouth at 270, nose tip at 225."""
    points = np.zeros((68, 2), np.float32)
    points[:17] = [(100 + 12.5 * index, 320 - 1.9 * (index - 8) ** 2) for index in range(17)]
    points[33] = (200, 225)
    angles = np.linspace(np.pi, 3 * np.pi, 12, endpoint=False)
    points[48:60] = np.stack([200 + 32 * np.cos(angles), 270 + 12 * np.sin(angles)], 1)
    return points


def test_mouth_and_chin_are_redrawn_but_not_nose_jaw_and_hair() -> None:
    labels = mouth_labels(landmarks(), Box(0, 0, 400, 400))

    def at(x: int, y: int) -> int:
        return int(labels[round(y * 512 / 400), round(x * 512 / 400)])

    assert [at(200, 270), at(168, 270), at(232, 270), at(200, 305)] == [1, 1, 1, 1]
    assert [at(200, 225), at(120, 270), at(280, 270), at(130, 300), at(200, 330)] == [0, 0, 0, 0, 0]


def test_what_the_model_lost_of_a_face_comes_back_where_nothing_moved() -> None:
    rng = np.random.default_rng(3)
    crop = rng.integers(60, 200, (64, 64, 3), np.uint8)
    seen = np.full_like(crop, 120)
    np.testing.assert_array_equal(give_back(seen, np.stack([crop, seen])), crop)


def test_a_mouth_that_moved_keeps_its_shape_and_takes_the_skins_colour() -> None:
    crop, seen = np.full((2, 64, 64, 3), (90, 110, 170), np.uint8)
    seen[...] = (100, 120, 150)
    patch = seen.copy()
    patch[24:40, 16:48] = (20, 20, 40)
    result = give_back(patch, np.stack([crop, seen]))
    np.testing.assert_allclose(result[32, 32], (10, 10, 60), atol=1)
    np.testing.assert_array_equal(result[4, 4], crop[4, 4])


SKIN, PINK, BROWN, TEETH = (100, 120, 150), (90, 80, 170), (70, 90, 130), (215, 225, 230)
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def face_with_lips(colour: tuple[int, int, int], opening: int) -> Pixels:
    """A crop of 192 px: skin, lips around an opening of so many px, with teeth in it."""
    picture = np.full((192, 192, 3), SKIN, np.uint8)
    cv2.ellipse(picture, (96, 142), (36, 12 + opening), 0, 0, 360, colour, -1)
    if opening:
        cv2.ellipse(picture, (96, 142), (26, opening), 0, 0, 360, TEETH, -1)
    return picture


def test_the_colour_of_lips_is_taken_from_between_the_landmarks() -> None:
    points = np.zeros((68, 2), np.float32)
    for part, across, down in ((slice(48, 60), 36, 30), (slice(60, 68), 26, 18)):
        angles = np.linspace(np.pi, 3 * np.pi, part.stop - part.start, endpoint=False)
        points[part] = np.stack([196 + 2 * across * np.cos(angles), 384 + 2 * down * np.sin(angles)], 1)
    colour = lip_colour(face_with_lips(BROWN, 18), points, Box(4, 100, 388, 484))
    assert colour is not None
    np.testing.assert_allclose(colour, BROWN, atol=1)
    assert lip_colour(face_with_lips(BROWN, 0), np.zeros((68, 2), np.float32), Box(4, 100, 388, 484)) is None


def test_lips_that_open_keep_the_sources_colour_and_teeth_and_skin_theirs() -> None:
    crop, seen, patch = face_with_lips(BROWN, 0), face_with_lips(BROWN, 0), face_with_lips(PINK, 18)
    original = np.stack([crop, seen])
    plain, kept = give_back(patch, original), give_back(patch, original, np.array(BROWN, np.float32))
    upper_lip, teeth, chin = (118, 96), (142, 96), (184, 96)
    assert np.abs(plain[upper_lip].astype(int) - BROWN).max() > 25
    np.testing.assert_allclose(kept[upper_lip], BROWN, atol=8)
    np.testing.assert_allclose(kept[teeth], TEETH, atol=4)
    np.testing.assert_array_equal(kept[chin], crop[chin])
    np.testing.assert_array_equal(give_back(patch, original, None), plain)
