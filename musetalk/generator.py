"""The UNet between the two halves of the VAE: crops -> latents; latents and audio windows -> patches.

Specified in docs/model.md#generator. All sizes come from the configurations beside the weights. Knows no files of
pictures or sound.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn

from musetalk import weights
from musetalk.acceleration import Step
from musetalk.batches import Batches
from musetalk.devices import first_line, is_lost, is_out_of_memory, release_memory, sent
from musetalk.errors import OutOfMemoryError, ProcessingError, WeightsError
from musetalk.frames import UInt8Array
from musetalk.geometry import Box

logger = logging.getLogger(__name__)

# A batch is padded to at most this many times its size.
_MOST_PADDED = 4


def crop_patch(frame: UInt8Array, box: Box, size_px: int) -> UInt8Array:
    """The part of a BGR picture inside `box`, stretched to (size_px, size_px, 3) with Lanczos; aspect is not kept.

    Raises ValueError for a box that leaves the picture or is empty.
    """
    if box.is_empty or box != box.clipped(frame.shape[1], frame.shape[0]):
        raise ValueError(f"crop box {tuple(box)} is empty or outside {frame.shape[1]}x{frame.shape[0]}")
    crop = frame[box.y0 : box.y1, box.x0 : box.x1]
    return np.asarray(cv2.resize(crop, (size_px, size_px), interpolation=cv2.INTER_LANCZOS4), dtype=np.uint8)


@cache
def positional_encoding(n_tokens: int, d_model: int) -> Tensor:
    """The sine/cosine table that distinguishes audio tokens, float32 (n_tokens, d_model); shared, so not to be written.

    sin on even, cos on odd channels, base 10000 (docs/model.md#positional-encoding; Vaswani et al. 2017, "Attention
    Is All You Need", section 3.5).
    """
    position = np.arange(n_tokens, dtype=np.float64)[:, None]
    scale = np.exp(np.arange(0, d_model, 2, dtype=np.float64) * (-math.log(10000.0) / d_model))
    table = np.zeros((n_tokens, d_model))
    table[:, 0::2] = np.sin(position * scale)
    table[:, 1::2] = np.cos(position * scale)[:, : d_model // 2]
    return torch.from_numpy(table.astype(np.float32))


class Generator:
    """UNet and VAE on one device, for one thread at a time; shapes below are those of the official weights."""

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raises WeightsError when the two do not belong together."""
        n_latent = int(vae.config.latent_channels)
        if unet.config.in_channels != 2 * n_latent or unet.config.out_channels != n_latent:
            raise WeightsError(
                f"UNet ({unet.config.in_channels} -> {unet.config.out_channels} channels) and VAE ({n_latent} latent "
                "channels) do not belong together"
            )
        self._scaling = float(vae.config.scaling_factor)
        self.crop_px = _whole(vae.config.sample_size)
        reduction = 2 ** (len(vae.config.block_out_channels) - 1)
        if self.crop_px % reduction:
            raise WeightsError(f"the VAE's sample_size {self.crop_px} is no multiple of its reduction, {reduction}")
        self.latent_px = self.crop_px // reduction
        self.latent_shape = (2 * n_latent, self.latent_px, self.latent_px)
        self._unet, self._vae, self._device = unet, vae, device
        self._tables: dict[tuple[int, int], Tensor] = {}
        # On a GPU one thread prepares the source and one generates; while weights change precision, neither may.
        self._lock = threading.RLock()
        # Chosen by `musetalk.warming` on a GPU; None and 0 mean any batch as it comes. A batch is padded to the fixed
        # one only where a faster step is made for it.
        self.fixed_batch: int | None = None
        self.decode_batch = 0
        self._whole_step: Step = self._step
        self._faster: Callable[[Step], Step] | None = None
        self._usual_dtype = dtype
        self._place(dtype)

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self._device

    def _place(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._tables.clear()
        # Convolutions want channels last. Only in float32 on a CPU, the exact reference, they do without: torch takes
        # the sums of group norms differently in that layout, and the encoder then misses the golden vectors' tolerance.
        is_reference = dtype == torch.float32 and self._device.type == "cpu"
        self._layout = torch.contiguous_format if is_reference else torch.channels_last
        for network in (self._unet, self._vae):
            # torch's own method: diffusers' warns about precisions that these networks do not have.
            nn.Module.to(network, device=self._device, dtype=dtype, memory_format=self._layout)  # type: ignore[call-overload]
            network.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        unet_config: Mapping[str, Any],
        unet_state: Mapping[str, Tensor],
        vae_dir: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        unet_name: str = "the UNet",
    ) -> Generator:
        """Build both networks from their configurations and load them strictly; raises WeightsError.

        `unet_name` names the UNet's file in errors.
        """
        with weights.loading("musetalk.json"):
            unet = build_empty(lambda: UNet2DConditionModel(**dict(unet_config)))
        weights.load_strictly(unet, unet_state, unet_name)
        return cls(unet, load_vae(vae_dir), device=device, dtype=dtype)

    def encoding_modules(self) -> tuple[nn.Module, ...]:
        """The networks behind `encode`."""
        return tuple(part for part in (self._vae.encoder, self._vae.quant_conv) if part is not None)

    def check_audio_width(self, d_model: int) -> None:
        """Raises WeightsError when the UNet listens to features of another width than `d_model`."""
        wanted = self._unet.config.cross_attention_dim
        # One width for all blocks, or one for each.
        if any(width != d_model for width in (wanted if isinstance(wanted, (list, tuple)) else [wanted])):
            raise WeightsError(f"the UNet listens to features of width {wanted}, Whisper gives {d_model}")

    @torch.inference_mode()
    def views(self, crops: UInt8Array | Tensor) -> Tensor:
        """The VAE's input for BGR crops (n, 256, 256, 3): RGB in -1..1, float (2, n, 3, 256, 256).

        [0] with the lower half black (rows 128 and on at -1, blackened before normalising), [1] whole.
        """
        pixels = crops if isinstance(crops, Tensor) else torch.from_numpy(np.ascontiguousarray(crops))
        pixels = pixels.to(self._device)
        rgb = pixels.flip(-1).permute(0, 3, 1, 2).to(torch.float32) / 255.0
        masked = rgb.clone()
        masked[:, :, rgb.shape[2] // 2 :] = 0.0
        return (torch.stack([masked, rgb]) - 0.5) / 0.5

    @torch.inference_mode()
    def moments(self, crops: UInt8Array | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the VAE's posterior for both views of BGR crops, each (2, n, 4, 32, 32), unscaled.

        Both views of all crops go through the encoder in one batch.
        """
        views = self.views(crops)
        batch = views.flatten(0, 1).to(self._dtype).contiguous(memory_format=self._layout)
        posterior = self._vae.encode(batch).latent_dist
        shape = (*views.shape[:2], *posterior.mean.shape[1:])
        return posterior.mean.reshape(shape), posterior.logvar.reshape(shape)

    @torch.inference_mode()
    def encode(self, crops: UInt8Array | Tensor) -> Tensor:
        """BGR crops uint8 (n, 256, 256, 3) -> source latents (n, 8, 32, 32): masked, then reference, scaled.

        The posterior's mode, as in training; sampling would make the mouth flicker (docs/model.md#source-latents).
        Overflow and errors as in `generate`.
        """
        dtype = self._dtype

        def latents(part: slice) -> Tensor:
            mean, _ = self.moments(crops[part])
            return torch.cat([mean[0], mean[1]], dim=1) * self._scaling

        return self._finite(latents, len(crops)).to(dtype)

    @torch.inference_mode()
    def predict(self, latents: Tensor, windows: Tensor) -> Tensor:
        """Source latents (n, 8, 32, 32), audio windows (n, 50, 384) -> predicted latents (n, 4, 32, 32).

        One pass at timestep 0; the tokens' positions are added here.
        """
        windows = windows.to(self._device, self._dtype)
        latents = latents.to(self._device, self._dtype).contiguous(memory_format=self._layout)
        table = self._table(windows.shape[1], windows.shape[2])
        predicted = self._unet(latents, self._timestep, encoder_hidden_states=windows + table, return_dict=False)[0]
        return torch.as_tensor(predicted)

    @property
    def _timestep(self) -> Tensor:
        return self._constant((0, 0), lambda: torch.zeros((), dtype=torch.long))

    def _table(self, n_tokens: int, d_model: int) -> Tensor:
        return self._constant((n_tokens, d_model), lambda: positional_encoding(n_tokens, d_model).to(self._dtype))

    def _constant(self, key: tuple[int, int], make: Callable[[], Tensor]) -> Tensor:
        """A tensor that stays on the device after its first use, because each copy would wait for the GPU."""
        if key not in self._tables:
            self._tables[key] = sent(make(), self._device)
        return self._tables[key]

    @torch.inference_mode()
    def decode(self, predicted: Tensor) -> Tensor:
        """Predicted latents (n, 4, 32, 32) -> pictures float32 (n, 3, 256, 256), RGB, 0..1 before clamping."""
        scaled = predicted.to(self._device, self._dtype).contiguous(memory_format=self._layout) / self._scaling
        # The decoder's pictures are the largest thing in memory; `decode_batch` of them fit.
        parts = torch.split(scaled, self.decode_batch or len(scaled))
        pictures = [self._vae.decode(part, return_dict=False)[0].float() / 2 + 0.5 for part in parts]
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def _step(self, latents: Tensor, windows: Tensor) -> Tensor:
        return self.decode(self.predict(latents, windows))

    def accelerate(self, faster: Callable[[Step], Step] | None) -> None:
        """Take `faster(step)` for whole batches, `step` being predict and decode; None: the plain step.

        The plain step stays, and a warning is logged, when the faster one cannot be made. Raises what `faster` raises
        on purpose, and torch's error of a lost GPU.
        """
        # An earlier graph's memory is free before another is captured.
        self._faster, self._whole_step = None, self._step
        if faster is None:
            return
        try:
            self._whole_step = faster(self._step)
        except RuntimeError as error:
            if is_lost(error):
                raise
            reason = first_line(error)
        else:
            self._faster = faster
            return
        # Outside the except block, because the traceback keeps tensors.
        release_memory(self._device)
        logger.warning("faster step failed; taking the plain one", extra={"reason": reason})

    def _pictures(self, latents: Tensor, windows: Tensor) -> Tensor:
        """`_step`, or the faster one, with a batch that is smaller than the fixed one padded to it."""
        latents = self._sent(latents).contiguous(memory_format=self._layout)
        windows = self._sent(windows)
        n_frames, wanted = len(latents), self.fixed_batch
        if wanted is None or not self._is_worth_padding(n_frames, wanted):
            return self._step(latents, windows)
        if n_frames < wanted:
            # The last frame again: real numbers, so that nothing overflows that would not have.
            latents, windows = (
                torch.cat([part, part[-1:].expand(wanted - n_frames, *part.shape[1:])]) for part in (latents, windows)
            )
            latents = latents.contiguous(memory_format=self._layout)
        return self._whole_step(latents, windows)[:n_frames]

    def _is_worth_padding(self, n_frames: int, wanted: int) -> bool:
        """Whether the faster step is there and pays; for under a quarter of its batch the plain one takes less time."""
        is_there = self._faster is not None and self._dtype == self._usual_dtype
        return is_there and n_frames <= wanted <= _MOST_PADDED * n_frames

    def _sent(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device in the networks' precision, without waiting for it to arrive."""
        return sent(tensor, self._device).to(self._dtype)

    @torch.inference_mode()
    def generate(self, latents: Tensor, windows: Tensor) -> NDArray[np.uint8]:
        """Source latents (n, 8, 32, 32) and audio windows (n, 50, 384) -> patches uint8 (n, 256, 256, 3), BGR.

        A chunk that overflows in half precision is computed again in float32; raises ProcessingError when that result
        is not finite either.
        """
        return self.start(latents, windows).result()

    @torch.inference_mode()
    def start(
        self, latents: Tensor, windows: Tensor, finish: Callable[[Tensor], Tensor] | None = None
    ) -> PendingPatches:
        """Start `generate` without waiting for the GPU; on a CPU the result is ready when this returns.

        `finish` converts the patches on the device; its result (uint8) is copied back instead of them.
        """
        finish = finish or (lambda levels: levels)

        def compute(part: slice) -> tuple[Tensor, Tensor]:
            pictures = self._pictures(latents[part], windows[part])
            return bgr_levels(pictures), torch.isfinite(pictures).all()

        with self._lock, self._plain_after_shortage():
            levels, is_finite = compute(slice(None))
            finished = finish(levels)

        def again() -> Tensor:
            with torch.inference_mode():
                return finish(self._again_in_float32(compute, len(latents)))

        return PendingPatches(finished, is_finite, again)

    @contextmanager
    def _plain_after_shortage(self) -> Iterator[None]:
        """When memory runs out, drop the faster step: it has one size, and a graph's own memory is what is missing."""
        try:
            yield
        except RuntimeError as error:
            if self._faster is not None and is_out_of_memory(error):
                logger.warning("the GPU's memory ran out; taking the plain step until the worker restarts")
                self.accelerate(None)
            raise

    def _finite(self, compute: Callable[[slice], Tensor], n_items: int) -> Tensor:
        """Return `compute` of all items, repeated in float32 if half precision gives NaN or infinity."""
        with self._lock, self._plain_after_shortage():
            result = compute(slice(None))
        if bool(torch.isfinite(result).all()):
            return result

        def checked(part: slice) -> tuple[Tensor, Tensor]:
            again = compute(part)
            return again, torch.isfinite(again).all()

        return self._again_in_float32(checked, n_items)

    def _again_in_float32(self, compute: Callable[[slice], tuple[Tensor, Tensor]], n_items: int) -> Tensor:
        """The first of what `compute` gives in float32; raises ProcessingError when its second says it is not finite.

        Looking at the end is enough: a value that is not finite makes NaN of its whole group in the next group norm.
        Items are computed in smaller batches when memory runs out; raises torch's error when one does not fit.
        """
        if self._usual_dtype != torch.float32:
            logger.warning("values overflow in half precision: computing again in float32")
            with self._lock, self._in_float32(), torch.inference_mode():
                try:
                    parts = Batches(n_items).run(compute, n_items)
                except OutOfMemoryError as error:
                    # The caller's batches decide what follows, as for every other step.
                    raise torch.OutOfMemoryError(error.message) from None
                if all(bool(is_finite) for _, is_finite in parts):
                    return parts[0][0] if len(parts) == 1 else torch.cat([result for result, _ in parts])
        raise ProcessingError("the networks gave values that are not finite", retryable=False)

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Both networks in float32 for a while; the way there and back changes no weight."""
        self._wait()
        # A captured graph knows where the weights were; they will be elsewhere, and need the room it takes.
        faster, decode_batch = self._faster, self.decode_batch
        self.accelerate(None)
        # Chosen for pictures of half the size.
        self.decode_batch = -(-decode_batch // 2)
        try:
            self._place(torch.float32)
            yield
        finally:
            self._wait()
            self._place(self._usual_dtype)
            # The weights move on this thread's stream; the other's must not read them before they have arrived.
            self._wait()
            self.decode_batch = decode_batch
            self.accelerate(faster)

    def _wait(self) -> None:
        """Let everything that was launched end: what is under way must not have its weights moved."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _whole(size: object) -> int:
    if not isinstance(size, int):
        raise WeightsError(f"the VAE's sample_size is {size}; it must be the side of a square")
    return size


def build_empty(build: Callable[[], nn.Module]) -> Any:
    """A network on the CPU with uninitialised tensors, for a strict load.

    Drawing the real UNet's 850 million random numbers, which the file then replaces, takes 11 s.
    """
    with torch.device("meta"):
        network = build()
    stored = network.state_dict().keys()
    if any(name not in stored for name, _ in network.named_buffers()):
        # A buffer that no checkpoint contains is computed when the network is built.
        return build()
    return network.to_empty(device="cpu")


class PendingPatches:
    """A chunk that the device may still be computing; the copy to the CPU is under way behind it."""

    def __init__(self, patches: Tensor, is_finite: Tensor, again: Callable[[], Tensor]) -> None:
        """`again` computes the chunk in float32, for when it turns out not finite."""
        self._again = again
        self._arrived: Any = None
        if patches.device.type == "cuda":
            patches, is_finite = (_pinned_copy(tensor) for tensor in (patches, is_finite))
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        self._patches, self._is_finite = patches, is_finite

    @property
    def is_here(self) -> bool:
        """Whether `result` need not wait."""
        return self._arrived is None or bool(self._arrived.query())

    def result(self) -> NDArray[np.uint8]:
        """The patches; waits for them. Raises ProcessingError when they are not finite in float32 either."""
        if self._arrived is not None:
            self._arrived.synchronize()
        patches = self._patches if bool(self._is_finite) else self._again().cpu()
        here: NDArray[np.uint8] = patches.numpy()
        return here


def _pinned_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def bgr_levels(pictures: Tensor) -> Tensor:
    """RGB float (n, 3, h, w) in 0..1 -> BGR uint8 (n, h, w, 3) on the same device: clamped, rounded half to even."""
    levels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.flip(1).permute(0, 2, 3, 1).contiguous()


def to_bgr(pictures: Tensor) -> NDArray[np.uint8]:
    """`bgr_levels` as a NumPy array, uint8 (n, h, w, 3)."""
    bgr: NDArray[np.uint8] = bgr_levels(pictures).cpu().numpy()
    return bgr


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE in `folder`: `config.json` beside `diffusion_pytorch_model.safetensors` or `.bin`.

    Raises WeightsError for a missing, cut or foreign file.
    """
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    path = weights.find_weights(folder, names)
    # Read once by our own loader, so that a broken file gets our error text; diffusers then gets the same tensors.
    state = weights.read_state(path)
    config = weights.read_config(folder / "config.json")
    name = f"{folder.name}/{path.name}"
    with weights.loading(f"{folder.name}/config.json"):
        vae = build_empty(lambda: AutoencoderKL(**config))
    weights.load_strictly(vae, modern_vae_keys(state), name)
    return vae


# The attention of the VAE's middle block before and after diffusers 0.15; the old layers may be 1x1 convolutions.
_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_vae_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VAE tensors under today's names; those of a checkpoint of the diffusers 0.4 era are renamed.

    Specified in docs/model.md#vae-key-names.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        head, _, last = key.rpartition(".")
        base, _, layer = head.rpartition(".")
        if ".attentions." in key and layer in _ATTENTION_NAMES:
            key = f"{base}.{_ATTENTION_NAMES[layer]}.{last}"  # noqa: PLW2901 - the same tensor under its new name
            if last == "weight" and value.ndim == 4:
                value = value[:, :, 0, 0]  # noqa: PLW2901 - a 1x1 convolution is this linear layer
        renamed[key] = value
    return renamed
