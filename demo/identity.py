"""Identity of the drawn person: the demo's avatar, or a random one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo.drawing import Colour, mixed, rgb


@dataclass(frozen=True)
class Identity:
    """Identity of a drawn person; the default is the demo's avatar. Lengths in px of the portrait."""

    skin: Colour = rgb(236, 196, 170)
    shade: Colour = rgb(188, 128, 104)
    blush: Colour = rgb(224, 132, 118)
    lips: Colour = rgb(190, 92, 90)
    hair: Colour = rgb(74, 46, 34)
    hair_light: Colour = rgb(138, 92, 62)
    iris: Colour = rgb(86, 122, 110)
    clothes: Colour = rgb(58, 98, 116)
    back_top: Colour = rgb(214, 222, 224)
    back_bottom: Colour = rgb(150, 170, 178)
    cheek: float = 91.0
    jaw: float = 73.0
    chin: float = 134.0
    mouth_half: float = 30.0
    mouth_y: float = 87.0
    lip_height: float = 1.0
    eye_half: float = 20.0
    brow: float = 1.0
    long_hair: bool = True
    fringe: float = 0.0


def random_identity(random: np.random.Generator) -> Identity:
    """Somebody else: skin, hair, eyes, clothes, proportions."""

    def near(colour: Colour, spread: float) -> Colour:
        a, b, c = (float(np.clip(value + random.normal(0, spread), 0.02, 0.98)) for value in colour)
        return a, b, c

    tone = float(random.uniform(0, 1))
    skin = near(mixed(rgb(246, 212, 190), rgb(112, 72, 50), tone), 0.02)
    shade = mixed(skin, mixed(rgb(150, 80, 60), (0, 0, 0), tone * 0.6), 0.5)
    hair = near(
        (rgb(40, 30, 28), rgb(74, 46, 34), rgb(120, 78, 44), rgb(196, 156, 100), rgb(150, 66, 36), rgb(150, 148, 146))[
            int(random.integers(6))
        ],
        0.02,
    )
    back = near(mixed(rgb(220, 220, 224), rgb(90, 110, 130), float(random.uniform(0, 1))), 0.08)
    return Identity(
        skin=skin,
        shade=shade,
        blush=mixed(skin, rgb(210, 90, 86), 0.5),
        lips=near(mixed(rgb(196, 96, 94), mixed(skin, rgb(120, 40, 40), 0.4), float(random.uniform(0, 1))), 0.03),
        hair=hair,
        hair_light=mixed(hair, (0.7, 0.85, 1.0), 0.3),
        iris=near(
            (rgb(86, 122, 110), rgb(84, 56, 36), rgb(86, 120, 160), rgb(110, 104, 60))[int(random.integers(4))], 0.03
        ),
        clothes=near(rgb(*(int(value) for value in random.integers(30, 220, 3))), 0.01),
        back_top=mixed(back, (1, 1, 1), 0.2),
        back_bottom=mixed(back, (0, 0, 0), 0.2),
        cheek=float(random.uniform(82, 97)),
        jaw=float(random.uniform(64, 84)),
        chin=float(random.uniform(126, 142)),
        mouth_half=float(random.uniform(25, 35)),
        mouth_y=float(random.uniform(83, 91)),
        lip_height=float(random.uniform(0.7, 1.35)),
        eye_half=float(random.uniform(17, 22)),
        brow=float(random.uniform(0.6, 1.8)),
        long_hair=bool(random.random() < 0.5),
        fringe=float(random.uniform(-8, 22)),
    )
