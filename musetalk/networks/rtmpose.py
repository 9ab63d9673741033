"""RTMPose-l, whole body: CSPNeXt backbone and a SimCC head. Keys as in `dw-ll_ucoco_384.pth`.

Specified in docs/model.md#pose-network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from musetalk.networks.matching import load_matching

N_KEYPOINTS = 133
INPUT_WIDTH, INPUT_HEIGHT = 288, 384
# SimCC gives two bins per input pixel.
SPLIT_RATIO = 2
_STRIDE = 32
_BLOCKS = (3, 6, 6, 3)


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, SiLU."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, h, w) -> (n, n_out, h / stride, w / stride)."""
        return F.silu(self.bn(self.conv(x)))


class DepthwiseSeparable(nn.Module):
    """A 5x5 convolution per channel, then one across channels."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(n_channels, n_channels, 5, groups=n_channels)
        self.pointwise_conv = ConvModule(n_channels, n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        y: Tensor = self.pointwise_conv(self.depthwise_conv(x))
        return y


class CspNextBlock(nn.Module):
    """3x3, then depthwise-separable 5x5; with or without a shortcut."""

    def __init__(self, n_channels: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = ConvModule(n_channels, n_channels, 3)
        self.conv2 = DepthwiseSeparable(n_channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        y: Tensor = self.conv2(self.conv1(x))
        return y + x if self.residual else y


class ChannelAttention(nn.Module):
    """Channels weighted by a gate computed from their global average."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(n_channels, n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        gate: Tensor = F.hardsigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)))
        return x * gate


class CspLayer(nn.Module):
    """Half of the channels through blocks, half past them."""

    def __init__(self, n_channels: int, n_blocks: int, residual: bool) -> None:
        super().__init__()
        half = n_channels // 2
        self.main_conv = ConvModule(n_channels, half, 1)
        self.short_conv = ConvModule(n_channels, half, 1)
        self.final_conv = ConvModule(2 * half, n_channels, 1)
        self.blocks = nn.Sequential(*(CspNextBlock(half, residual) for _ in range(n_blocks)))
        self.attention = ChannelAttention(2 * half)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        joined = torch.cat([self.blocks(self.main_conv(x)), self.short_conv(x)], dim=1)
        y: Tensor = self.final_conv(self.attention(joined))
        return y


class SpatialPyramidPooling(nn.Module):
    """Maxima over three window sizes beside the features themselves."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(n_channels, n_channels // 2, 1)
        self.conv2 = ConvModule(2 * n_channels, n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        x = self.conv1(x)
        pooled = [F.max_pool2d(x, kernel, 1, kernel // 2) for kernel in (5, 9, 13)]
        y: Tensor = self.conv2(torch.cat([x, *pooled], dim=1))
        return y


class CspNext(nn.Module):
    """The backbone; `base` 64 is RTMPose-l."""

    def __init__(self, base: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvModule(3, base // 2, 3, 2), ConvModule(base // 2, base // 2, 3), ConvModule(base // 2, base, 3)
        )
        widths = [base * 2**level for level in range(5)]
        self.stage1 = _stage(widths[0], widths[1], _BLOCKS[0])
        self.stage2 = _stage(widths[1], widths[2], _BLOCKS[1])
        self.stage3 = _stage(widths[2], widths[3], _BLOCKS[2])
        self.stage4 = nn.Sequential(
            ConvModule(widths[3], widths[4], 3, 2),
            SpatialPyramidPooling(widths[4]),
            CspLayer(widths[4], _BLOCKS[3], residual=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 16 * base, h / 32, w / 32)."""
        y: Tensor = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return y


def _stage(n_in: int, n_out: int, n_blocks: int) -> nn.Sequential:
    return nn.Sequential(ConvModule(n_in, n_out, 3, 2), CspLayer(n_out, n_blocks, residual=True))


class ScaleNorm(nn.Module):
    """Vectors scaled to the length sqrt(n), then by one learned number."""

    def __init__(self, n_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale = n_features**-0.5
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_features) -> the same shape."""
        # In float32: the sum of squares leaves half precision's range.
        length = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True) * self.scale
        y: Tensor = (x.float() / length.clamp(min=self.eps)).to(x.dtype) * self.g
        return y


class Scale(nn.Module):
    """A learned factor per feature."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_features) -> the same shape."""
        return x * self.scale


class GatedAttentionUnit(nn.Module):
    """Self-attention over keypoints with squared-ReLU weights and a gate."""

    def __init__(self, n_features: int, n_hidden: int, n_key: int) -> None:
        super().__init__()
        self.n_hidden, self.n_key = n_hidden, n_key
        self.gamma = nn.Parameter(torch.rand(2, n_key))
        self.beta = nn.Parameter(torch.rand(2, n_key))
        self.o = nn.Linear(n_hidden, n_features, bias=False)
        self.uv = nn.Linear(n_features, 2 * n_hidden + n_key, bias=False)
        self.ln = ScaleNorm(n_features)
        self.res_scale = Scale(n_features)

    def forward(self, x: Tensor) -> Tensor:
        """(n, k, n_features) -> the same shape."""
        gate, value, base = torch.split(F.silu(self.uv(self.ln(x))), [self.n_hidden, self.n_hidden, self.n_key], dim=-1)
        query = base * self.gamma[0] + self.beta[0]
        key = base * self.gamma[1] + self.beta[1]
        weights = F.relu(query @ key.transpose(1, 2) / self.n_key**0.5).square()
        y: Tensor = self.o(gate * (weights @ value))
        kept: Tensor = self.res_scale(x)
        return kept + y


class RtmccHead(nn.Module):
    """Features to one vector of x bins and one of y bins per keypoint."""

    def __init__(self, n_in: int, n_features: int = 256, n_hidden: int = 512, n_key: int = 128) -> None:
        super().__init__()
        n_cells = (INPUT_WIDTH // _STRIDE) * (INPUT_HEIGHT // _STRIDE)
        self.final_layer = nn.Conv2d(n_in, N_KEYPOINTS, 7, padding=3)
        self.mlp = nn.Sequential(ScaleNorm(n_cells), nn.Linear(n_cells, n_features, bias=False))
        self.gau = GatedAttentionUnit(n_features, n_hidden, n_key)
        self.cls_x = nn.Linear(n_features, INPUT_WIDTH * SPLIT_RATIO, bias=False)
        self.cls_y = nn.Linear(n_features, INPUT_HEIGHT * SPLIT_RATIO, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, n_in, 12, 9) -> x bins (n, 133, 576) and y bins (n, 133, 768)."""
        features = self.gau(self.mlp(self.final_layer(x).flatten(2)))
        return self.cls_x(features), self.cls_y(features)


class RtmPose(nn.Module):
    """The pose network; `widen` 1.0 is RTMPose-l, smaller values serve tests."""

    def __init__(self, widen: float = 1.0) -> None:
        super().__init__()
        base = round(64 * widen)
        self.backbone = CspNext(base)
        self.head = RtmccHead(16 * base)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised RGB (n, 3, 384, 288) -> x bins (n, 133, 576) and y bins (n, 133, 768); one pass, no flip."""
        bins: tuple[Tensor, Tensor] = self.head(self.backbone(x))
        return bins


def rtmpose_from_state(state: Mapping[str, Tensor]) -> RtmPose:
    """The network that `state` belongs to, loaded and set to inference; its width is read from the tensors.

    Tensors it does not have are left out. Raises ValueError when one is missing or of another shape.
    """
    stem = state.get("backbone.stem.2.conv.weight")
    if stem is None or stem.ndim != 4 or len(stem) == 0:
        raise ValueError("not an RTMPose network: 'backbone.stem.2.conv.weight' is missing or no convolution")
    network = RtmPose(len(stem) / 64)
    # Upstream loads this checkpoint non-strictly, and what distillation left in it beside the network is not known.
    load_matching(network, state, "an RTMPose network", ignore_unexpected=True)
    return network.eval()
