"""Options of one video. Plain values, so that callers need no network and no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskMode = Literal["jaw", "raw", "neck"]
LoopMode = Literal["ping_pong", "loop", "hold", "trim"]
SilenceMode = Literal["generate", "closed", "source"]
FaceSearchMode = Literal["interval", "every_frame"]


# Below the chin the demo's crops have this share of the box's height: room for the jaw to drop.
DEMO_MARGIN_SHARE = 0.107


@dataclass(frozen=True)
class RenderOptions:
    """Options of one video; the defaults are upstream's for v1.5 (docs/model.md#version-defaults).

    `max_gap_frames` None means half a second; `box_smoothing` is the sigma of a Gaussian over time in frames, 0 = off;
    `aspect_ratio` and `resolution` None keep the source's. `margin_share` adds that share of the box's height to
    `extra_margin`; `match_colours` gives each patch the colours its source has beside the mouth.
    `careful` redraws less of a face that is not the demo portrait, and gives back what the VAE loses of it.
    `loop_mode` chooses the frames after the end of the source: `ping_pong` the way back, `loop` the first frame again,
    `hold` the last one; with `trim` the output ends there. `silence` chooses the picture of a pause: generated from
    its sound, a mouth kept shut, or the source.
    `face_search` asks the face detector at the ends of intervals, or at every frame (docs/model.md#interval-search).
    `detail` 0..1 gives the source's fine detail back where the mouth did not move.
    `restore` 0..1 blends in what the restorer makes of each patch.
    `background` (#rrggbb) is shown where the source is transparent.
    `device_pixels` cuts and pastes faces where the networks run; `overlap` prepares the source in a thread of its own;
    `yields_cores` computes with fewer threads while other processes want the cores.
    """

    face_box: tuple[int, int, int, int] | None = None
    face_search: FaceSearchMode = "interval"
    bbox_shift: int = 0
    extra_margin: int = 10
    margin_share: float = 0.0
    mask_mode: MaskMode = "jaw"
    left_cheek_width: int = 90
    right_cheek_width: int = 90
    mask_blur: float = 0.05
    match_colours: bool = False
    careful: bool = False
    box_smoothing: float = 0.0
    max_gap_frames: int | None = None
    loop_mode: LoopMode = "ping_pong"
    silence: SilenceMode = "generate"
    detail: float = 0.0
    restore: float = 0.0
    background: str = "#ffffff"
    batch_size: int = 8
    aspect_ratio: str | None = None
    resolution: str | None = None
    frame_memory_bytes: int = 512 * 2**20
    scratch_disk_bytes: int = 16 * 2**30
    device_pixels: bool = False
    overlap: bool = False
    yields_cores: bool = False

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background as red, green and blue, 0 to 255."""
        red, green, blue = bytes.fromhex(self.background.removeprefix("#"))
        return red, green, blue


def version_defaults(version: str) -> RenderOptions:
    """The options of a model version: v1.0 has no margin and pastes the raw mask (docs/model.md#version-defaults).

    The demo was trained on crops with a margin that grows with the face, and its mask is drawn, not parsed.
    """
    if version == "demo":
        return RenderOptions(
            extra_margin=0, margin_share=DEMO_MARGIN_SHARE, mask_mode="raw", match_colours=True, careful=True
        )
    return RenderOptions() if version == "v15" else RenderOptions(extra_margin=0, mask_mode="raw")
