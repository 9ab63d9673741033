"""A drawn person who can speak: anti-aliased curves and soft shading with NumPy and OpenCV, nothing photographed.

Face coordinates: origin between the eyes, x to the right, y down, one unit is one pixel of the 512 px portrait. The head
is drawn once per identity at twice the size; a pose moves it, visemes move jaw and mouth, a blink moves the lids.
Colours are BGR, 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from demo.drawing import SCALE, Canvas, Image, curve, ellipse, mirrored, mixed, rgb
from demo.identity import Identity

SIZE = 512
# Origin of the face in the portrait, and the point about which the head turns.
CENTRE = (256.0, 226.0)
PIVOT = (0.0, 190.0)


@dataclass(frozen=True)
class Pose:
    """Pose of the head: turned in the picture by degrees, moved by px, scaled; lids 0 open .. 1 shut; gaze in px."""

    roll_deg: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    blink: float = 0.0
    gaze: tuple[float, float] = (0.0, 0.0)
    light: float = 1.0


# The head's canvas in face units: x0, y0, x1, y1.
_HEAD = (-180.0, -170.0, 180.0, 250.0)
HEAD_ORIGIN = _HEAD[:2]
# What the jaw and the mouth may change.
_MOUTH_AREA = (-110.0, 20.0, 110.0, 170.0)
_EYE_AREA = (-70.0, -30.0, 70.0, 30.0)


def _pixels_of(area: tuple[float, float, float, float]) -> tuple[slice, slice]:
    x0, y0, x1, y1 = (round((edge - _HEAD[index % 2]) * SCALE) for index, edge in enumerate(area))
    return slice(y0, y1), slice(x0, x1)


@dataclass
class Portrait:
    """One person, ready to be drawn in any pose with any mouth."""

    identity: Identity = field(default_factory=Identity)
    # Fewer strands of hair are drawn sooner; a crop of the face shows few of them.
    n_strands: int = 150

    # -- parts that never change --------------------------------------------------------------------------------------

    def face_outline(self) -> list[tuple[float, float]]:
        """Forehead, cheeks, jaw and chin at rest."""
        who = self.identity
        half = [
            (0, -116),
            (56, -102),
            (84, -58),
            (who.cheek, 0),
            (who.cheek - 2, 34),
            (who.jaw + 7, 68),
            (who.jaw - 14, 100),
            (34, who.chin - 10),
            (0, who.chin),
        ]
        return curve(mirrored(half))

    @cached_property
    def backdrop(self) -> Image:
        """Background, hair behind, neck and shoulders, float32 (512, 512, 3)."""
        who = self.identity
        canvas = Canvas(np.zeros((SIZE * SCALE, SIZE * SCALE, 3), np.float32), (-CENTRE[0], -CENTRE[1]))
        height, width = canvas.pixels.shape[:2]
        rows = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        canvas.pixels[:] = np.asarray(who.back_top) * (1 - rows) + np.asarray(who.back_bottom) * rows
        ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
        far = np.hypot(xs / width - 0.38, ys / height - 0.32)
        canvas.pixels *= (1.06 - 0.24 * np.clip(far, 0, 1.1))[..., None]
        if who.long_hair:
            behind = [(0, -146), (64, -130), (106, -76), (114, 10), (119, 90), (133, 150), (120, 196), (60, 210)]
            canvas.fill(curve(mirrored([*behind, (0, 214)])), mixed(who.hair, (0, 0, 0), 0.25), blur=1.2)
        shoulders = [(0, 176), (52, 186), (110, 206), (176, 236), (236, 300), (260, 420)]
        body = curve(mirrored(shoulders))
        dark = mixed(who.clothes, (0, 0, 0), 0.45)
        canvas.fill(body, who.clothes)
        inside = canvas.mask(body)
        canvas.shade(inside * canvas.mask([(40, 150), (270, 150), (270, 420), (120, 420)], 40), dark, 0.5)
        light = mixed(who.clothes, (1, 1, 1), 0.35)
        canvas.shade(inside * canvas.mask(ellipse(-130, 235, 90, 26), 22), light, 0.5)
        for side in (-1, 1):
            fold = curve([(side * 70, 210), (side * 92, 260), (side * 84, 330)], closed=False)
            canvas.shade(canvas.stroke(fold, 5, 5), dark, 0.5)
        # Neck with the shadow of the chin.
        neck = curve(mirrored([(0, 90), (50, 96), (50, 150), (56, 178), (74, 196), (40, 214), (0, 222)]))
        canvas.fill(neck, mixed(who.skin, who.shade, 0.22))
        skin = canvas.mask(neck)
        canvas.shade(skin * canvas.mask(ellipse(0, 112, 78, 46), 12), mixed(who.shade, (0, 0, 0), 0.18), 0.72)
        canvas.shade(skin * canvas.mask([(22, 100), (90, 100), (90, 220), (30, 220)], 14), who.shade, 0.4)
        for side in (-1, 1):
            tendon = curve([(side * 40, 150), (side * 24, 186), (side * 10, 206)], closed=False)
            canvas.shade(skin * canvas.stroke(tendon, 4, 4), who.shade, 0.22)
        collar = curve([(-78, 190), (-46, 214), (0, 226), (46, 214), (78, 190)], closed=False)
        canvas.paint(canvas.stroke(collar, 13, 0.6), mixed(who.clothes, (1, 1, 1), 0.12))
        canvas.shade(canvas.stroke([(x, y - 6) for x, y in collar], 3, 2.5), dark, 0.5)
        small: Image = np.asarray(cv2.resize(canvas.pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.float32)
        return np.clip(small, 0, 1)

    @cached_property
    def _head(self) -> tuple[Image, Image]:
        """The head without eyes and mouth: colours and coverage, at SCALE."""
        who = self.identity
        height, width = round((_HEAD[3] - _HEAD[1]) * SCALE), round((_HEAD[2] - _HEAD[0]) * SCALE)
        canvas = Canvas(np.empty((height, width, 3), np.float32), _HEAD[:2], np.zeros((height, width), np.float32))
        # What is not covered takes the hair's or the skin's colour, so that no fringe shows where it is soft.
        canvas.pixels[:] = mixed(who.skin, who.shade, 0.3)
        canvas.pixels[: round((40 - _HEAD[1]) * SCALE)] = who.hair
        if who.long_hair:
            aside = round((86 - 0) * SCALE)
            middle = round(-_HEAD[0] * SCALE)
            canvas.pixels[:, : middle - aside] = who.hair
            canvas.pixels[:, middle + aside :] = who.hair
        for side in () if who.long_hair else (-1, 1):
            ear = curve([(side * x, y) for x, y in ((86, -14), (101, -18), (106, 4), (100, 28), (88, 34))])
            canvas.fill(ear, mixed(who.skin, who.shade, 0.18))
            canvas.shade(canvas.mask(ellipse(side * 97, 8, 4, 13), 2.2), who.shade, 0.6)
        outline = self.face_outline()
        canvas.fill(outline, who.skin)
        face = canvas.mask(outline)
        self._shade_face(canvas, face)
        self._draw_nose(canvas)
        self._draw_brows(canvas)
        self._draw_hair(canvas)
        assert canvas.alpha is not None
        return self.textured(np.clip(canvas.pixels, 0, 1)), np.clip(canvas.alpha, 0, 1)

    def textured(self, colours: Image) -> Image:
        """The head's colours with the texture of the skin; a drawn person has none."""
        return colours

    def _shade_face(self, canvas: Canvas, face: Image) -> None:
        who = self.identity
        # Round: darker towards the edge, more on the right, away from the light.
        depth = cv2.distanceTransform((face > 0.5).astype(np.uint8), cv2.DIST_L2, 3).astype(np.float32) / SCALE
        edge = np.exp(-depth / 16) * face
        canvas.shade(edge, who.shade, 0.55)
        canvas.shade(face * canvas.mask([(34, -120), (130, -120), (130, 150), (52, 150)], 26), who.shade, 0.34)
        canvas.shade(face * canvas.mask(ellipse(0, who.chin + 6, 60, 16), 10), who.shade, 0.3)
        glow = mixed(who.skin, (1, 1, 1), 0.55)
        canvas.shade(face * canvas.mask(ellipse(-22, -64, 40, 22), 18), glow, 0.5)
        canvas.shade(face * canvas.mask(ellipse(-50, 40, 24, 18), 14), glow, 0.42)
        canvas.shade(face * canvas.mask(ellipse(-4, who.chin - 14, 14, 8), 7), glow, 0.35)
        for side in (-1, 1):
            canvas.shade(face * canvas.mask(ellipse(side * 55, 52, 25, 17), 14), who.blush, 0.34)
            canvas.shade(face * canvas.mask(ellipse(side * 38, -9, 27, 14), 8), who.shade, 0.3)
            canvas.shade(face * canvas.mask(ellipse(side * 36, 17, 19, 5), 4.5), who.shade, 0.2)
            crease = curve([(side * 25, 58), (side * 38, 72), (side * 44, 88)], closed=False)
            canvas.shade(face * canvas.stroke(crease, 3, 3.5), who.shade, 0.26)

    def _draw_nose(self, canvas: Canvas) -> None:
        who = self.identity
        dark = mixed(who.shade, (0, 0, 0), 0.25)
        bridge = curve([(8, -14), (7, 16), (13, 40), (15, 52)], closed=False)
        canvas.shade(canvas.stroke(bridge, 7, 5), who.shade, 0.42)
        canvas.shade(canvas.stroke(curve([(-8, -12), (-6, 10)], closed=False), 5, 4), who.shade, 0.22)
        canvas.shade(canvas.mask(ellipse(1, 63, 22, 6), 5), who.shade, 0.5)
        glow = mixed(who.skin, (1, 1, 1), 0.65)
        canvas.shade(canvas.stroke([(-3, -8), (-3, 40)], 5, 4.5), glow, 0.5)
        canvas.shade(canvas.mask(ellipse(-4, 47, 7, 6), 4), glow, 0.6)
        wing = [(13, 44), (18, 52), (15, 59), (8, 61)]
        for side in (-1, 1):
            line = curve([(side * x, y) for x, y in wing], closed=False)
            canvas.shade(canvas.stroke(line, 2, 1.6), dark, 0.42)
            canvas.shade(canvas.mask(ellipse(side * 7.5, 59.5, 4.2, 2.1), 1.1), dark, 0.78)
        canvas.shade(canvas.stroke(curve([(-5, 62), (0, 64), (5, 62)], closed=False), 1.6, 1.4), dark, 0.4)
        # The groove above the lip.
        canvas.shade(canvas.stroke([(0, 67), (0, who.mouth_y - 12)], 4, 2.4), who.shade, 0.22)

    def _draw_brows(self, canvas: Canvas) -> None:
        who = self.identity
        colour = mixed(who.hair, who.skin, 0.12)
        thick = 3.1 * who.brow
        for side in (-1, 1):
            top = [(17, -26.5), (30, -30.5), (46, -31.5), (61, -25)]
            low = [(61, -24.4), (46, -28.8 + thick * 0.5), (30, -28.2 + thick), (16.5, -25.5 + thick)]
            shape = [(side * x, y) for x, y in (*curve(top, closed=False), *curve(low, closed=False))]
            canvas.shade(canvas.mask(shape, 1.3), colour, 0.86)

    def _draw_hair(self, canvas: Canvas) -> None:
        who = self.identity
        line = who.fringe
        # From the right temple over the crown to the left one, and back along the hairline with a side parting.
        outer = [
            (97, 34),
            (110, -10),
            (111, -62),
            (91, -112),
            (48, -143),
            (0, -153),
            (-50, -146),
            (-94, -114),
            (-112, -62),
        ]
        outer += [(-111, -8), (-98, 36)]
        inner = [(-90, 6), (-87, -34), (-72, -62 + line), (-38, -86 + line), (-22, -95 + line), (6, -84 + line)]
        inner += [(44, -68 + line), (74, -46), (88, -8)]
        shape = curve([*outer, *inner])
        canvas.fill(shape, who.hair, blur=0.7)
        hair = canvas.mask(shape, 0.7)
        canvas.shade(np.roll(canvas.mask(shape, 6), 10 * SCALE, axis=0) * (1 - hair), who.shade, 0.34)
        random = np.random.default_rng(5)
        dark = mixed(who.hair, (0, 0, 0), 0.45)
        for index in range(self.n_strands):
            start = -30 + random.normal(0, 7)
            share = random.uniform(0, 1)
            side = 1 if index % 2 else -1
            end_x = side * (60 + 52 * share) + random.normal(0, 3)
            end_y = -118 + 150 * share + random.normal(0, 6)
            bend = (start * 0.3 + end_x * 0.72, -136 + 40 * share + random.normal(0, 4))
            strand = curve([(start, -106 + random.normal(0, 10)), bend, (end_x, end_y)], closed=False)
            bright = np.exp(-((share - 0.32) ** 2) / 0.03) * (1.0 if side < 0 else 0.45)
            colour = mixed(dark, who.hair_light, float(np.clip(bright + random.normal(0, 0.15), 0, 1)))
            canvas.shade(hair * canvas.stroke(strand, random.uniform(0.8, 2.2), 0.7), colour, 0.34)
        if who.long_hair:
            for side in (-1, 1):
                lock = [
                    (90, -40),
                    (110, 0),
                    (114, 66),
                    (124, 130),
                    (123, 172),
                    (106, 186),
                    (95, 130),
                    (93, 66),
                    (88, 16),
                ]
                outline = curve([(side * x, y) for x, y in lock])
                canvas.fill(outline, who.hair, blur=0.7)
                area = canvas.mask(outline, 0.7)
                for _ in range(self.n_strands // 6):
                    shift = random.uniform(-9, 9)
                    line_x = ((101, -20), (107, 40), (112, 100), (112, 168))
                    strand = curve([(side * (x + shift), y) for x, y in line_x], closed=False)
                    tone = mixed(dark, who.hair_light, float(random.beta(1.2, 2.6)))
                    canvas.shade(area * canvas.stroke(strand, random.uniform(0.8, 2.0), 0.7), tone, 0.36)

    # -- parts that move ----------------------------------------------------------------------------------------------

    @cached_property
    def _jaw_field(self) -> Image:
        """Share of the jaw's movement that each pixel of the mouth area follows, 0..1."""
        who = self.identity
        x0, y0, x1, y1 = _MOUTH_AREA
        ys, xs = np.mgrid[y0 : y1 : 1 / SCALE, x0 : x1 : 1 / SCALE].astype(np.float32)
        down = np.clip((ys - who.mouth_y + 4) / 26, 0, 1)
        across = np.clip((who.jaw + 20 - np.abs(xs)) / 52, 0, 1)
        below = np.clip((y1 - ys) / 26, 0, 1)
        follows = down * down * (3 - 2 * down) * across * across * (3 - 2 * across) * below
        return np.asarray(follows, np.float32)

    def jaw_drop(self, opening: float) -> float:
        """Units the chin goes down."""
        return 8.5 * float(np.clip(opening, 0, 1.2))

    def head(self, mouth: Sequence[float], pose: Pose) -> tuple[Image, Image]:
        """The head with this mouth (five visemes) and these eyes: colours (h, w, 3) and coverage (h, w), at SCALE."""
        colours, cover = (part.copy() for part in self._head)
        rows, columns = _pixels_of(_MOUTH_AREA)
        drop = self.jaw_drop(mouth[0])
        if drop > 0.05:
            shift = self._jaw_field * drop * SCALE
            ys, xs = np.mgrid[0 : shift.shape[0], 0 : shift.shape[1]].astype(np.float32)
            for image in (colours, cover):
                image[rows, columns] = cv2.remap(
                    image[rows, columns].copy(), xs, ys - shift, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
                )
        self._draw_mouth(Canvas(colours[rows, columns], _MOUTH_AREA[:2]), mouth)
        rows, columns = _pixels_of(_EYE_AREA)
        self._draw_eyes(Canvas(colours[rows, columns], _EYE_AREA[:2]), pose)
        return colours, cover

    def _draw_eyes(self, canvas: Canvas, pose: Pose) -> None:
        who = self.identity
        dark = mixed(who.hair, (0, 0, 0), 0.55)
        shut = float(np.clip(pose.blink, 0, 1))
        half = who.eye_half
        for side in (-1, 1):
            x = side * 38.0
            top = (1 - shut) * -8.6 + shut * 4.0
            upper = [
                (x - half, 1.4),
                (x - half * 0.45, top * 0.86 + 0.4),
                (x + half * 0.1, top),
                (x + half * 0.62, top * 0.72),
            ]
            upper += [(x + half, 0.2 if side > 0 else 1.0)]
            lower = [(x + half * 0.6, 5.0), (x, 6.6), (x - half * 0.6, 5.0)]
            if side < 0:
                upper = [(2 * x - px, py) for px, py in reversed(upper)]
                lower = [(2 * x - px, py) for px, py in reversed(lower)]
            lid = curve(upper, closed=False)
            shape = [*lid, *curve([upper[-1], *lower, upper[0]], closed=False)]
            opening = canvas.mask(shape, 0.35)
            canvas.paint(opening, (0.93, 0.945, 0.955))
            canvas.shade(opening * canvas.mask(ellipse(x, -9, half * 1.1, 8), 3), (0.5, 0.52, 0.6), 0.55)
            gx, gy = x + pose.gaze[0], -0.6 + pose.gaze[1]
            canvas.paint(opening * canvas.mask(ellipse(gx, gy, 8.9, 8.9), 0.5), mixed(who.iris, (0, 0, 0), 0.55))
            canvas.paint(opening * canvas.mask(ellipse(gx, gy, 7.6, 7.6), 0.9), who.iris)
            canvas.shade(
                opening * canvas.mask(ellipse(gx, gy + 3.4, 5.4, 3.6), 1.6), mixed(who.iris, (1, 1, 1), 0.5), 0.7
            )
            canvas.paint(opening * canvas.mask(ellipse(gx, gy, 3.7, 3.7), 0.5), (0.05, 0.05, 0.06))
            canvas.paint(opening * canvas.mask(ellipse(gx - 2.8, gy - 3.2, 2.1, 1.9), 0.4), (1.0, 1.0, 1.0), 0.95)
            canvas.shade(opening * canvas.mask(ellipse(gx + 2.6, gy + 2.8, 1.2, 1.0), 0.5), (1.0, 1.0, 1.0), 0.5)
            crease = [(px, py - 4.4 - 1.4 * shut) for px, py in lid[6:-4]]
            canvas.shade(canvas.stroke(crease, 1.3, 1.0), who.shade, 0.62)
            canvas.shade(canvas.stroke(lid, 2.5, 0.5), dark, 0.92)
            lashes = upper[-1] if side > 0 else upper[0]
            canvas.shade(canvas.stroke([lashes, (lashes[0] + side * 4.4, lashes[1] - 2.6)], 1.7, 0.5), dark, 0.8)
            below = [(px, py + 0.4) for px, py in curve([upper[-1], *lower, upper[0]], closed=False)]
            canvas.shade(canvas.stroke(below, 0.9, 0.6), mixed(who.shade, (0, 0, 0), 0.35), 0.5)
            corner = upper[0] if side > 0 else upper[-1]
            canvas.shade(
                canvas.mask(ellipse(corner[0] + side * 1.8, corner[1], 1.8, 1.4), 0.7), who.blush, 0.7 * (1 - shut)
            )

    def _draw_mouth(self, canvas: Canvas, mouth: Sequence[float]) -> None:
        who = self.identity
        opening, wide, lip, teeth, tongue = (float(value) for value in mouth)
        opening = float(np.clip(opening, 0, 1.2))
        round_ = max(0.0, -wide)
        spread = max(0.0, wide)
        half = who.mouth_half * (1 + 0.13 * spread - 0.36 * round_ - 0.07 * opening * (1 - round_))
        y = who.mouth_y
        gap = (24.0 - 5.0 * round_) * opening
        rise, fall = 0.2 * gap, 0.8 * gap
        corner_y = y - 1.9 + 0.34 * fall - 1.2 * spread + 1.2 * round_
        full = who.lip_height * (1 + 0.22 * round_ - 0.16 * spread)
        above, under = 7.6 * full - 0.08 * gap, 10.2 * full - 0.1 * gap
        tuck = float(np.clip(lip, 0, 1))
        under *= 1 - 0.55 * tuck
        fall *= 1 - 0.35 * tuck

        inner_top = [
            (-half, corner_y),
            (-half * 0.55, y - rise - 0.1),
            (0, y - rise + 0.9),
            (half * 0.55, y - rise - 0.1),
        ]
        inner_top += [(half, corner_y)]
        inner_low = [(-half, corner_y), (-half * 0.55, y + fall * 0.92 + 0.3), (0, y + fall + 1.1)]
        inner_low += [(half * 0.55, y + fall * 0.92 + 0.3), (half, corner_y)]
        outer_top = [(-half - 1.6, corner_y), (-half * 0.55, y - rise - above * 0.78), (-half * 0.2, y - rise - above)]
        outer_top += [(0, y - rise - above * 0.74), (half * 0.2, y - rise - above)]
        outer_top += [(half * 0.55, y - rise - above * 0.78), (half + 1.6, corner_y)]
        outer_low = [(-half - 1.6, corner_y), (-half * 0.6, y + fall + under * 0.72), (0, y + fall + under)]
        outer_low += [(half * 0.6, y + fall + under * 0.72), (half + 1.6, corner_y)]
        tops, lows = curve(inner_top, closed=False), curve(inner_low, closed=False)
        over, beneath = curve(outer_top, closed=False), curve(outer_low, closed=False)

        # Shadow under the lower lip and light on the chin's edge move with it.
        canvas.shade(canvas.mask(ellipse(0, y + fall + under + 4.5, half * 0.62, 4), 3), who.shade, 0.46)
        inside = canvas.mask([*tops, *reversed(lows)], 0.3)
        self._draw_inside(canvas, inside, (y - rise, y + fall), half, (teeth, tongue, tuck))
        colour = who.lips
        upper = canvas.mask([*over, *reversed(tops)], 0.55)
        lower = canvas.mask([*lows, *reversed(beneath)], 0.55)
        canvas.paint(upper, mixed(colour, (0, 0, 0), 0.16), 0.9)
        canvas.paint(lower, colour, 0.9)
        light = mixed(colour, (1, 1, 1), 0.6)
        canvas.shade(
            lower * canvas.mask(ellipse(-half * 0.14, y + fall + under * 0.48, half * 0.4, under * 0.2), 1.8),
            light,
            0.62,
        )
        canvas.shade(
            upper * canvas.mask(ellipse(-half * 0.2, y - rise - above * 0.6, half * 0.22, above * 0.16), 1.2),
            light,
            0.3,
        )
        canvas.shade(
            lower
            * canvas.mask([(half * 0.3, y - 10), (half + 6, y - 10), (half + 6, y + 50), (half * 0.4, y + 50)], 5),
            who.shade,
            0.25,
        )
        dark = mixed(colour, (0, 0, 0), 0.62)
        closedness = float(np.exp(-gap / 3.0))
        canvas.shade(canvas.stroke(tops, 1.7, 0.55), dark, 0.55 + 0.35 * closedness)
        for side in (-1, 1):
            canvas.shade(canvas.mask(ellipse(side * (half + 1), corner_y + 0.3, 2.8, 1.9), 1.3), dark, 0.5)

    def _draw_inside(
        self, canvas: Canvas, inside: Image, edges: tuple[float, float], half: float, what: tuple[float, float, float]
    ) -> None:
        """Dark mouth, upper teeth, lower teeth when clenched, tongue; `what` is teeth, tongue, tuck."""
        top, low = edges
        teeth, tongue, tuck = what
        gap = max(0.0, low - top)
        canvas.paint(inside, rgb(70, 24, 28))
        canvas.shade(
            inside * canvas.mask(ellipse(0, low - gap * 0.3, half * 0.8, gap * 0.5 + 1), 3), rgb(110, 40, 42), 0.6
        )
        white = rgb(243, 238, 228)
        reach = min(gap, max(2.5 + 3.0 * tuck, 0.36 * gap))
        row = [
            (-half * 0.86, top - 4),
            (half * 0.86, top - 4),
            (half * 0.8, top + reach * 0.7),
            (half * 0.4, top + reach),
        ]
        row += [(-half * 0.4, top + reach), (-half * 0.8, top + reach * 0.7)]
        canvas.paint(inside * canvas.mask(row, 0.7), white, 0.94)
        if tongue > 0.02:
            centre = low - gap * (0.2 + 0.34 * tongue)
            canvas.paint(
                inside * canvas.mask(ellipse(0, centre, half * 0.56, gap * (0.24 + 0.2 * tongue) + 0.6), 1.2),
                rgb(206, 104, 104),
                min(1.0, 0.4 + tongue),
            )
        else:
            canvas.paint(
                inside * canvas.mask(ellipse(0, low - gap * 0.06, half * 0.6, gap * 0.24 + 0.4), 1.6),
                rgb(176, 84, 86),
                0.8,
            )
        if teeth > 0.02:
            band = [
                (-half * 0.8, low + 3),
                (half * 0.8, low + 3),
                (half * 0.74, top + gap * 0.46),
                (-half * 0.74, top + gap * 0.46),
            ]
            canvas.paint(inside * canvas.mask(band, 0.7), mixed(white, (0, 0, 0), 0.07), min(1.0, 1.15 * teeth))
            if gap > 3:
                line = [(-half * 0.7, top + gap * 0.48), (half * 0.7, top + gap * 0.48)]
                canvas.shade(inside * canvas.stroke(line, 0.9, 0.5), rgb(120, 90, 86), 0.7 * teeth)
        # The lips' own shadow.
        canvas.shade(
            inside
            * canvas.mask([(-half - 4, top - 8), (half + 4, top - 8), (half + 4, top + 2), (-half - 4, top + 2)], 1.6),
            (0.08, 0.05, 0.12),
            0.4,
        )
        sides = np.maximum(
            canvas.mask(ellipse(-half, top + gap / 2, half * 0.3, gap), 3),
            canvas.mask(ellipse(half, top + gap / 2, half * 0.3, gap), 3),
        )
        canvas.shade(inside * sides, (0.06, 0.04, 0.1), 0.6)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def placing(self, pose: Pose) -> NDArray[np.float64]:
        """Face coordinates -> portrait px, an affine (2, 3)."""
        angle = np.deg2rad(pose.roll_deg)
        turn = pose.scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        pivot = np.asarray(PIVOT)
        offset = pivot - turn @ pivot + np.asarray(CENTRE) + (pose.dx, pose.dy)
        return np.column_stack([turn, offset])

    def picture(
        self,
        mouth: Sequence[float],
        pose: Pose,
        view: NDArray[np.float64] | None = None,
        size: tuple[int, int] | None = None,
    ) -> NDArray[np.uint8]:
        """The portrait, BGR uint8 (512, 512, 3); or what an affine `view` (2, 3) of it shows, of `size` (w, h) px."""
        colours, cover = self.head(mouth, pose)
        placing = self.placing(pose)
        to_canvas = np.array([[1 / SCALE, 0, _HEAD[0]], [0, 1 / SCALE, _HEAD[1]], [0, 0, 1]])
        whole = view is None
        seen = np.vstack([view, [0, 0, 1]]) if view is not None else np.eye(3)
        matrix = (seen @ np.vstack([placing, [0, 0, 1]]) @ to_canvas)[:2]
        shape = size or (SIZE, SIZE)
        zoom = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
        if zoom < 0.75:
            # What is reduced is softened first, or its edges would crawl.
            sigma = 0.42 / zoom * 0.8
            colours = np.asarray(cv2.GaussianBlur(colours, (0, 0), sigma), np.float32)
            cover = np.asarray(cv2.GaussianBlur(cover, (0, 0), sigma), np.float32)
        front = cv2.warpAffine(colours, matrix, shape, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        weight = cv2.warpAffine(cover, matrix, shape, flags=cv2.INTER_LINEAR)[..., None]
        behind = self.backdrop
        if not whole:
            edge = cv2.BORDER_REPLICATE
            behind = np.asarray(
                cv2.warpAffine(behind, seen[:2], shape, flags=cv2.INTER_LINEAR, borderMode=edge), np.float32
            )
        picture = (behind + weight * (front - behind)) * pose.light
        return np.asarray(np.round(np.clip(picture, 0, 1) * 255), np.uint8)

    def contour(self, pose: Pose) -> NDArray[np.float64]:
        """Points that fix MuseTalk's box, in portrait px (4, 2): left and right edge of the face, mid nose, chin."""
        who = self.identity
        # Where MediaPipe's mesh sees these points on the avatar (mean over poses).
        points = np.array([[3 - who.cheek, 4.0], [who.cheek - 3, 4.0], [0.0, 28.0], [0.0, who.chin - 3]])
        placing = self.placing(pose)
        placed: NDArray[np.float64] = points @ placing[:, :2].T + placing[:, 2]
        return placed
