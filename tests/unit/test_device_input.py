"""The face networks' inputs by tensor operations against OpenCV and Pillow, which make them on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk import faces
from musetalk.blending import crop_for_parsing
from musetalk.device_input import reduced_bgr, square_pictures, to_bgr, upload_planes, warped_bgr
from musetalk.errors import OutOfMemoryError
from musetalk.face_parsing import FaceParser, parse_input, parse_picture
from musetalk.frames import Matrix, Picture, Planes, from_yuv, planes_to_bgr
from musetalk.geometry import Box
from musetalk.networks.rtmpose import INPUT_HEIGHT, INPUT_WIDTH

CPU = torch.device("cpu")
MATRICES: list[Matrix] = ["bt601", "bt709"]
POSE = (INPUT_WIDTH, INPUT_HEIGHT)


def noise(width: int, height: int, seed: int = 0) -> Planes:
    rng = np.random.default_rng(seed)
    half = (height // 2, width // 2)
    # The whole range of bytes, because files contain values outside the limited range.
    y, u, v = (rng.integers(0, 256, size, dtype=np.uint8) for size in ((height, width), half, half))
    return Planes(y, u, v)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("size", [(2, 2), (6, 4), (130, 98), (320, 240)])
def test_pictures_are_converted_as_on_the_cpu(matrix: Matrix, size: tuple[int, int]) -> None:
    pictures = [noise(*size, seed) for seed in range(3)]
    made = to_bgr(upload_planes(pictures, CPU), matrix).numpy()
    for one, planes in zip(made, pictures, strict=True):
        assert np.array_equal(one, planes_to_bgr(planes, matrix))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("size", [(64, 36), (250, 444), (640, 360), (1920, 1080), (90, 90)])
def test_the_pose_network_sees_what_opencv_shows_it(matrix: Matrix, size: tuple[int, int]) -> None:
    pictures = [noise(*size, seed) for seed in range(2)]
    made = warped_bgr(upload_planes(pictures, CPU), matrix, POSE, faces.pose_factor(*size)).numpy()
    for one, planes in zip(made, pictures, strict=True):
        wanted = faces.warp_for_pose(planes_to_bgr(planes, matrix))
        difference = np.abs(one.astype(int) - wanted)
        # OpenCV 4 rounds positions to 32nds of a pixel, which noise shows most; 5 differs by single roundings.
        assert difference.mean() < 1.5
        assert one.shape == wanted.shape
        assert not one[0].any()


def test_a_reduced_picture_is_the_mean_of_its_parts() -> None:
    planes = noise(64, 48)
    (made,) = reduced_bgr(upload_planes([planes], CPU), "bt709", (16, 12)).numpy()
    means = [planes.y.reshape(12, 4, 16, 4), planes.u.reshape(12, 2, 16, 2), planes.v.reshape(12, 2, 16, 2)]
    yuv = np.stack([part.mean((1, 3)) for part in means] + [np.ones((12, 16))], -1)
    wanted = (yuv @ from_yuv("bt709").T).clip(0, 255)
    assert np.abs(made - wanted).max() < 0.51


@given(
    st.lists(st.tuples(st.integers(-60, 150), st.integers(-60, 110), st.integers(1, 220)), min_size=1, max_size=3),
    st.sampled_from(MATRICES),
)
@settings(max_examples=40, deadline=None)
def test_the_parser_sees_what_pillow_shows_it(places: list[tuple[int, int, int]], matrix: Matrix) -> None:
    frames = [noise(160, 120, seed) for seed in range(len(places))]
    squares = [Box(x, y, x + side, y + side) for x, y, side in places]
    made = square_pictures(frames, squares, 512, matrix, CPU).numpy()
    for one, planes, square in zip(made, frames, squares, strict=True):
        assert np.array_equal(one, parse_picture(crop_for_parsing(planes_to_bgr(planes, matrix), square)))


@pytest.mark.parametrize("side", [512, 700, 1500])
def test_large_squares_are_reduced_as_pillow_reduces(side: int) -> None:
    planes = noise(1280, 720, side)
    square = Box(-100, -90, side - 100, side - 90)
    (made,) = square_pictures([planes], [square], 512, "bt709", CPU).numpy()
    assert np.array_equal(made, parse_picture(crop_for_parsing(planes_to_bgr(planes, "bt709"), square)))


def test_an_empty_square_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        square_pictures([noise(8, 8)], [Box(4, 4, 4, 4)], 512, "bt709", CPU)


def test_inputs_are_normalised_on_the_device_to_the_last_bit() -> None:
    crops = [np.random.default_rng(seed).integers(0, 256, (90, 90, 3), dtype=np.uint8) for seed in range(2)]
    parser = FaceParser(torch.nn.Identity(), device=CPU, dtype=torch.float32)
    made = parser.normalised(torch.from_numpy(np.stack([parse_picture(crop) for crop in crops]))).numpy()
    assert np.array_equal(made, np.stack([parse_input(crop) for crop in crops]))


class Recording(torch.nn.Module):
    """Remembers what it was given; finds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.given.append(x.clone())
        conf = torch.tensor([9.0, -9.0])[None, :, None, None].repeat(len(x), 1, 2, 2)
        return [conf, torch.zeros(len(x), 4, 2, 2)] * 6


def test_the_detector_is_given_the_same_pixels_from_planes_as_from_opencv() -> None:
    pictures = [Picture(noise(64, 36, seed), "bt601") for seed in range(3)]
    given = []
    for device_input in (False, True):
        detector = Recording()
        finder = faces.PoseFaceFinder(
            torch.nn.Identity(), detector, device=CPU, dtype=torch.float32, device_input=device_input
        )
        assert finder.detect(pictures) == [None] * 3
        given.append(torch.cat(detector.given))
    assert torch.equal(*given)


class SmallMemory(Recording):
    """Runs out of memory with more than so many pixels at once."""

    def __init__(self, most_px: int) -> None:
        super().__init__()
        self.most_px = most_px

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if x.shape[0] * x.shape[2] * x.shape[3] > self.most_px:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_a_detector_that_runs_out_of_memory_is_given_fewer_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    detector = SmallMemory(3 * 64 * 36)
    finder = faces.PoseFaceFinder(torch.nn.Identity(), detector, device=CPU, dtype=torch.float32)
    pictures = [Picture(noise(64, 36, seed), "bt601") for seed in range(8)]
    assert finder.detect(pictures) == [None] * 8
    assert [len(batch) for batch in detector.given] == [2] * 4
    assert finder.detect(pictures[:3]) == [None] * 3
    assert [len(batch) for batch in detector.given[4:]] == [2, 1]
    detector.most_px = 100
    with pytest.raises(OutOfMemoryError):
        finder.detect(pictures[:1])
