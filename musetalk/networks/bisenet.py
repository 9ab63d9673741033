"""BiSeNet for face parsing: 19 classes per pixel (docs/model.md#face-parsing-bisenet). Keys as in `79999_iter.pth`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from musetalk.networks.matching import load_matching

N_CLASSES = 19


class ConvBnRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, h, w) -> (n, n_out, h, w)."""
        return F.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """ResNet's two-convolution block."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample: nn.Module | None = None
        if n_in != n_out or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, h, w) -> (n, n_out, h / stride, w / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(shortcut + self.bn2(self.conv2(y)))


class ResNet18(nn.Module):
    """The backbone; `width` 64 is ResNet-18."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _layer(width, width, 1)
        self.layer2 = _layer(width, 2 * width, 2)
        self.layer3 = _layer(2 * width, 4 * width, 2)
        self.layer4 = _layer(4 * width, 8 * width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 3, h, w) -> features at 1/8, 1/16 and 1/32 of the size."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        feat8 = self.layer2(self.layer1(x))
        feat16 = self.layer3(feat8)
        return feat8, feat16, self.layer4(feat16)


def _layer(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(n_in, n_out, stride), BasicBlock(n_out, n_out, 1))


class AttentionRefinement(nn.Module):
    """Features weighted by a gate computed from their global average."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = ConvBnRelu(n_in, n_out, 3)
        self.conv_atten = nn.Conv2d(n_out, n_out, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, h, w) -> (n, n_out, h, w)."""
        x = self.conv(x)
        gate = torch.sigmoid(self.bn_atten(self.conv_atten(F.adaptive_avg_pool2d(x, 1))))
        return x * gate


class ContextPath(nn.Module):
    """Backbone and the way back up to 1/8 of the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnet = ResNet18(width)
        self.arm16 = AttentionRefinement(4 * width, 2 * width)
        self.arm32 = AttentionRefinement(8 * width, 2 * width)
        self.conv_head32 = ConvBnRelu(2 * width, 2 * width, 3)
        self.conv_head16 = ConvBnRelu(2 * width, 2 * width, 3)
        self.conv_avg = ConvBnRelu(8 * width, 2 * width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 3, h, w) -> backbone features at 1/8, refined features at 1/8, refined features at 1/16."""
        feat8, feat16, feat32 = self.resnet(x)
        average = self.conv_avg(F.adaptive_avg_pool2d(feat32, 1))
        # One value per channel: adding it broadcast is the nearest-neighbour enlargement.
        up32 = F.interpolate(self.arm32(feat32) + average, size=feat16.shape[2:], mode="nearest")
        up32 = self.conv_head32(up32)
        up16 = F.interpolate(self.arm16(feat16) + up32, size=feat8.shape[2:], mode="nearest")
        return feat8, self.conv_head16(up16), up32


class FeatureFusion(nn.Module):
    """Joins two feature maps of one size, with a gate from their global average."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.convblk = ConvBnRelu(n_in, n_out, 1)
        self.conv1 = nn.Conv2d(n_out, n_out // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(n_out // 4, n_out, 1, bias=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (n, ., h, w) maps -> (n, n_out, h, w)."""
        x = self.convblk(torch.cat([first, second], dim=1))
        gate = torch.sigmoid(self.conv2(F.relu(self.conv1(F.adaptive_avg_pool2d(x, 1)))))
        y: Tensor = x * gate + x
        return y


class BiseNetOutput(nn.Module):
    """Features to class scores."""

    def __init__(self, n_in: int, n_mid: int, n_classes: int) -> None:
        super().__init__()
        self.conv = ConvBnRelu(n_in, n_mid, 3)
        self.conv_out = nn.Conv2d(n_mid, n_classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, h, w) -> (n, n_classes, h, w)."""
        return cast(Tensor, self.conv_out(self.conv(x)))


class BiseNet(nn.Module):
    """The parser; `width` 64 is the official network, smaller ones serve tests.

    The two auxiliary outputs of training are kept for the sake of the checkpoint's keys; `forward` leaves them out.
    """

    def __init__(self, width: int = 64, n_classes: int = N_CLASSES) -> None:
        super().__init__()
        self.cp = ContextPath(width)
        self.ffm = FeatureFusion(4 * width, 4 * width)
        self.conv_out = BiseNetOutput(4 * width, 4 * width, n_classes)
        self.conv_out16 = BiseNetOutput(2 * width, width, n_classes)
        self.conv_out32 = BiseNetOutput(2 * width, width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB (n, 3, h, w) -> class scores (n, n_classes, h, w)."""
        feat8, context8, _ = self.cp(x)
        return _enlarge(self.conv_out(self.ffm(feat8, context8)), x)

    def auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scores that training reads from 1/8 and 1/16 of the size; each (n, n_classes, h, w)."""
        _, context8, context16 = self.cp(x)
        return _enlarge(self.conv_out16(context8), x), _enlarge(self.conv_out32(context16), x)


def _enlarge(scores: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(scores, size=like.shape[2:], mode="bilinear", align_corners=True)


def bisenet_from_state(state: Mapping[str, Tensor]) -> BiseNet:
    """The network that `state` belongs to, loaded and set to inference; its width is read from the tensors.

    Raises ValueError when keys or shapes are not those of a BiSeNet.
    """
    sizes: list[int] = []
    for key in ("cp.resnet.conv1.weight", "conv_out.conv_out.weight"):
        kernel = state.get(key)
        if kernel is None or kernel.ndim != 4 or len(kernel) == 0:
            raise ValueError(f"not a BiSeNet face parser: '{key}' is missing or no convolution")
        sizes.append(len(kernel))
    network = BiseNet(*sizes)
    load_matching(network, state, "a BiSeNet face parser")
    return network.eval()
