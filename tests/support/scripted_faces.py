"""Sources whose faces are known: pictures that carry a number, and a finder in two parts that answers by a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from musetalk.face_search import FaceSearch
from musetalk.faces import Detection, Face, Pose
from musetalk.frames import Picture, Planes, black_planes
from musetalk.geometry import Box

SIZE = (320, 240)
GRID = np.stack(np.meshgrid(np.linspace(0, 1, 4), np.linspace(0, 1, 17)), -1).reshape(-1, 2)


def face_points(x: float, y: float, side: float) -> NDArray[np.float64]:
    """68 points in a square of `side` px about (x, y), the nose in its middle."""
    points: NDArray[np.float64] = (GRID - 0.5) * side + [x, y]
    points[29] = x, y
    return points


def noise_points(number: int) -> NDArray[np.float64]:
    """What the pose network says of a picture without a face: points anywhere, others in each picture."""
    return np.random.default_rng(number).uniform(0, 200, (68, 2))


@dataclass(frozen=True)
class Shown:
    """What both networks say of one picture."""

    is_detected: bool
    points: NDArray[np.float64]
    score: float = 0.8


def present(x: float = 160, y: float = 120, side: float = 100, score: float = 0.8) -> Shown:
    """A face that both networks see."""
    return Shown(True, face_points(x, y, side), score)


def absent(number: int) -> Shown:
    """No face."""
    return Shown(False, noise_points(number), 0.1)


def planes_of(number: int) -> Planes:
    """A picture that carries a number below 65536."""
    planes = black_planes(*SIZE)
    planes.y[0, :2] = divmod(number, 256)
    return planes


class ScriptedFinder:
    """Answers by what each picture shows; counts the pictures that the detector looked at."""

    def __init__(self, script: Sequence[Shown]) -> None:
        self.script = script
        self.looked: list[int] = []
        self.checked: list[int] = []

    def _number(self, picture: Picture) -> int:
        assert picture.planes is not None
        high, low = picture.planes.y[0, :2].tolist()
        return int(high * 256 + low)

    def detect(self, pictures: Sequence[Picture]) -> list[Detection | None]:
        numbers = [self._number(picture) for picture in pictures]
        self.looked += numbers
        return [(Box(10, 20, 60, 80), 0.99) if self.script[number].is_detected else None for number in numbers]

    def poses(self, pictures: Sequence[Picture]) -> list[Pose]:
        shown = [self.script[self._number(picture)] for picture in pictures]
        return [Pose(one.points, one.score) for one in shown]

    def confirms(self, picture: Picture, pose: Pose) -> float:
        number = self._number(picture)
        self.checked.append(number)
        return 0.95 if self.script[number].is_detected else 0.0

    def find(self, frames: Sequence[object], *, bbox_shift: int = 0) -> list[Face | None]:
        raise AssertionError("a finder in two parts is asked for its parts")


def searched(search: FaceSearch, n_pictures: int) -> list[Face | None]:
    """The faces of pictures 0 .. n-1."""
    faces: list[Face | None] = []
    for number in range(n_pictures):
        faces += search.add(planes_of(number))
    return [*faces, *search.finish()]


# -- sources ----------------------------------------------------------------------------------------------------------


def _scene(n_pictures: int, shown: Callable[[int], Shown]) -> list[Shown]:
    return [shown(number) for number in range(n_pictures)]


def _turning(number: int) -> Shown:
    # Away from the camera between 40 and 60: the scores fall before the detector loses the face.
    away = max(0.0, 1 - abs(number - 50) / 14)
    return Shown(away < 0.6, face_points(160 + 20 * away, 120, 100 - 30 * away), 0.8 - 0.7 * away)


def _two_people(number: int) -> Shown:
    # The landmarks change from one person to the other; the detector sees both all the time.
    return present(x=90, side=70) if number // 23 % 2 == 0 else present(x=230, side=60)


def _covered(number: int) -> Shown:
    # A hand before the face for a fifth of a second: the points tremble, the detector sees no face.
    if 37 <= number < 42:
        return Shown(False, face_points(160, 120, 100) + 40 * (-1) ** number, 0.3)
    return present()


def _flickering(number: int) -> Shown:
    # The detector misses a picture now and then in which the landmarks see nothing unusual.
    return replace(present(x=160 + number * 0.2), is_detected=number % 11 != 7)


SOURCES: dict[str, list[Shown]] = {
    "a face at rest": _scene(70, lambda _: present()),
    "a face that moves": _scene(90, lambda n: present(x=100 + 1.3 * n, y=120 + 30 * np.sin(n / 9))),
    "entering": _scene(80, lambda n: absent(n) if n < 27 else present(x=280 - n)),
    "leaving": _scene(80, lambda n: present(x=160 + n) if n < 51 else absent(n)),
    "entering and leaving": _scene(120, lambda n: absent(n) if n // 20 % 2 else present()),
    "turning away and back": _scene(100, _turning),
    "several people": _scene(100, _two_people),
    "a cut to a room and back": _scene(90, lambda n: absent(n) if 33 <= n < 40 else present()),
    "covered for a moment": _scene(80, _covered),
    "at the left edge": _scene(60, lambda n: present(x=50 - n)),
    "nobody": _scene(40, absent),
}
FLICKERING = _scene(90, _flickering)
