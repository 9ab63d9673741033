"""Which check belongs to which golden file. Longer prefixes win (`s3fd_nms` before `s3fd_`)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """Golden files whose name starts with `prefix`, checked by `module.function(path)`."""

    prefix: str
    module: str
    function: str
    slow_names: tuple[str, ...] = ()

    def is_slow(self, name: str) -> bool:
        """Whether this file's memory or time is large (full-size networks)."""
        return any(name.startswith(slow) for slow in self.slow_names)

    def check(self, path: Path) -> None:
        """Run the file's vectors through our code; raises AssertionError on the first difference."""
        module = importlib.import_module(f"tests.golden.{self.module}")
        getattr(module, self.function)(path)


FAMILIES = (
    Family("bisenet_", "check_networks", "check_bisenet"),
    Family("s3fd_", "check_networks", "check_s3fd"),
    Family("rtmpose_l_", "check_networks", "check_rtmpose"),
    Family("s3fd_nms", "check_faces", "check_s3fd_nms"),
    Family("simcc_decode", "check_faces", "check_simcc_decode"),
    Family("landmark_bbox", "check_faces", "check_landmark_bbox"),
    Family("faceparse_", "check_faces", "check_faceparse"),
    Family("posenc", "check_generator", "check_posenc"),
    Family("unet_", "check_generator", "check_unet", slow_names=("unet_full",)),
    Family("vae_", "check_generator", "check_vae", slow_names=("vae_full",)),
    Family("resize", "check_generator", "check_resize"),
    Family("whisper_", "check_audio", "check_whisper"),
    Family("audio_windows", "check_audio", "check_audio_windows"),
    Family("crop_box", "check_blending", "check_crop_box"),
    Family("face_masks", "check_blending", "check_face_masks"),
    Family("blend", "check_blending", "check_blend"),
    Family("e2e_", "check_pipeline", "check_e2e"),
    Family("realtime_", "check_pipeline", "check_realtime"),
)


def family_of(name: str) -> Family | None:
    """The family of a file name, or None when no prefix fits."""
    fitting = [family for family in FAMILIES if name.startswith(family.prefix)]
    return max(fitting, key=lambda family: len(family.prefix), default=None)


def prefixes() -> list[str]:
    """All known prefixes, for the message about an unknown file."""
    return [family.prefix for family in FAMILIES]
