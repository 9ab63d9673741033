"""The whole way from frames and sound to frames, against runs of the original scripts with preset boxes and labels."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray

from musetalk import audio
from musetalk.blending import blend_mask, face_mask, paste_reference
from musetalk.generator import Generator, crop_patch
from musetalk.geometry import Box, blend_box, ping_pong_index
from musetalk.options import RenderOptions, version_defaults
from tests.golden.check_audio import waveform_of, whisper
from tests.golden.compare import absolute, equal_share, every
from tests.support.seeded import fill

CPU = torch.device("cpu")
REALTIME_BLUR = 0.1


class Case:
    """One stored run: its networks, and per source frame the box with margin, the latents and the mask."""

    def __init__(self, data: Any, options: RenderOptions, blur: float) -> None:
        seed, gain = int(data["seed"]), float(data["gain"])
        unet = fill(UNet2DConditionModel(**json.loads(str(data["unet_config"]))), seed, gain)
        vae = fill(AutoencoderKL(**json.loads(str(data["vae_config"]))), seed + 1, gain)
        with torch.no_grad():
            # Upstream samples its latents; here the spread is next to nothing, so a sample is the mode.
            spread: Any = vae.get_submodule("quant_conv")
            spread.weight[4:] = 0
            spread.bias[4:] = -30
        self.generator = Generator(unet, vae, device=CPU, dtype=torch.float32)
        config = {k: v for k, v in json.loads(str(data["whisper_config"])).items() if not k.startswith("decoder")}
        encoder = whisper(seed + 2, json.dumps(config))
        waveform = waveform_of(data["pcm"])
        self.frames = data["frames_bgr"]
        height = self.frames.shape[1]
        self.boxes = [
            Box(*(int(edge) for edge in row)).with_bottom_margin(options.extra_margin, height) for row in data["boxes"]
        ]
        crops = [
            crop_patch(frame, box.clipped(frame.shape[1], height), self.generator.crop_px)
            for frame, box in zip(self.frames, self.boxes, strict=True)
        ]
        self.latents = self.generator.encode(np.stack(crops))
        mask = face_mask(data["parsing"], options.mask_mode, options.left_cheek_width, options.right_cheek_width)
        self.masks = [blend_mask(mask, box, blend_box(box), blur=blur) for box in self.boxes]
        self.rate = Fraction(str(data["fps"]))
        self.n_output = audio.n_output_frames(len(waveform), self.rate)
        self.windows = audio.audio_windows(encoder.features(waveform), 0, self.n_output, self.rate)

    def source(self, index: int) -> int:
        """Which source frame output frame `index` shows."""
        return ping_pong_index(index, len(self.frames))

    def predict(self, picks: list[int]) -> torch.Tensor:
        """The UNet's answer for some output frames, in one batch."""
        return self.generator.predict(self.latents[[self.source(pick) for pick in picks]], self.windows[picks])

    def paste(self, index: int, patch: NDArray[Any]) -> NDArray[Any]:
        """The output frame with `patch` in it."""
        source = self.source(index)
        box = self.boxes[source]
        return paste_reference(self.frames[source], patch, box, self.masks[source], blend_box(box))


def check_frames(case: Case, picks: list[int], wanted: NDArray[Any]) -> NDArray[Any]:
    """Pasted frames are those of the run, two levels at most apart and 99 of 100 values equal."""
    patches = case.generator.generate(case.latents[[case.source(pick) for pick in picks]], case.windows[picks])
    frames = np.stack([case.paste(pick, patch) for pick, patch in zip(picks, patches, strict=True)])
    assert absolute(frames, wanted) <= 2
    assert equal_share(frames, wanted) >= 0.99
    return patches


def check_e2e(path: Path) -> None:
    """The offline script: latents, the UNet's answer, generated faces and finished frames."""
    data = np.load(path)
    options = version_defaults(str(data["version"]))
    if str(data["version"]) == "v15" and "mode" in data:
        # The mode is an argument of the script that only v1.5 heeds.
        options = replace(options, mask_mode=str(data["mode"]))  # type: ignore[arg-type]
    case = Case(data, options, options.mask_blur)
    assert absolute(case.latents.numpy(), data["latents"]) < 1e-5
    picks = data["pick"].tolist()
    assert case.n_output in (int(data["n_out"]), int(data["n_out"]) + 1)
    predicted = case.predict(picks).numpy()
    wanted = data["pred_latents_sub"]
    assert absolute(every(predicted, wanted), wanted) <= 1e-4 * np.abs(wanted).max()
    patches = check_frames(case, picks, data["out_frames"])
    assert absolute(patches, data["generated"]) <= 2
    assert equal_share(patches, data["generated"]) >= 0.99


def check_realtime(path: Path) -> None:
    """The real-time script's prepared avatar and its frames (it loses the last one)."""
    data = np.load(path)
    case = Case(data, RenderOptions(), REALTIME_BLUR)
    cycle = [case.source(index) for index in range(len(data["coord_cycle"]))]
    for index, source in enumerate(cycle):
        assert list(case.boxes[source]) == data["coord_cycle"][index].tolist()
        assert list(blend_box(case.boxes[source])) == data["mask_coords"][index].tolist()
        assert absolute(case.masks[source], data[f"mask{index}"]) <= 1
        assert absolute(case.latents[source].numpy(), data["latents"][index]) < 1e-5
    assert case.n_output == int(data["n_out"]) + 1
    check_frames(case, data["pick"].tolist(), data["out_frames"])
