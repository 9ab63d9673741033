"""S3FD face detector: six levels of scores and box offsets. Keys as in `s3fd-619a316812.pth`.

Specified in docs/model.md#face-detection-s3fd.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from musetalk.networks.matching import load_matching


class L2Norm(nn.Module):
    """Each pixel's channels scaled to unit length, then by a learned weight per channel."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        # In float32: the sum of 256 squares leaves half precision's range.
        length = x.float().pow(2).sum(dim=1, keepdim=True).sqrt().add(1e-10)
        return (x.float() / length).to(x.dtype) * self.weight.view(1, -1, 1, 1)


class S3fd(nn.Module):
    """The detector; `width` 64 is the official network (VGG-16), smaller ones serve tests."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.conv1_1, self.conv1_2 = _conv3(3, w), _conv3(w, w)
        self.conv2_1, self.conv2_2 = _conv3(w, 2 * w), _conv3(2 * w, 2 * w)
        self.conv3_1, self.conv3_2, self.conv3_3 = _conv3(2 * w, 4 * w), _conv3(4 * w, 4 * w), _conv3(4 * w, 4 * w)
        self.conv4_1, self.conv4_2, self.conv4_3 = _conv3(4 * w, 8 * w), _conv3(8 * w, 8 * w), _conv3(8 * w, 8 * w)
        self.conv5_1, self.conv5_2, self.conv5_3 = _conv3(8 * w, 8 * w), _conv3(8 * w, 8 * w), _conv3(8 * w, 8 * w)
        # Padding 3 on a 3x3 kernel: the published weights were trained with it.
        self.fc6 = nn.Conv2d(8 * w, 16 * w, 3, padding=3)
        self.fc7 = nn.Conv2d(16 * w, 16 * w, 1)
        self.conv6_1, self.conv6_2 = nn.Conv2d(16 * w, 4 * w, 1), nn.Conv2d(4 * w, 8 * w, 3, stride=2, padding=1)
        self.conv7_1, self.conv7_2 = nn.Conv2d(8 * w, 2 * w, 1), nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1)
        self.conv3_3_norm, self.conv4_3_norm, self.conv5_3_norm = L2Norm(4 * w), L2Norm(8 * w), L2Norm(8 * w)
        # The finest level has three background classes, of which the strongest counts.
        self.conv3_3_norm_mbox_conf, self.conv3_3_norm_mbox_loc = _conv3(4 * w, 4), _conv3(4 * w, 4)
        self.conv4_3_norm_mbox_conf, self.conv4_3_norm_mbox_loc = _conv3(8 * w, 2), _conv3(8 * w, 4)
        self.conv5_3_norm_mbox_conf, self.conv5_3_norm_mbox_loc = _conv3(8 * w, 2), _conv3(8 * w, 4)
        self.fc7_mbox_conf, self.fc7_mbox_loc = _conv3(16 * w, 2), _conv3(16 * w, 4)
        self.conv6_2_mbox_conf, self.conv6_2_mbox_loc = _conv3(8 * w, 2), _conv3(8 * w, 4)
        self.conv7_2_mbox_conf, self.conv7_2_mbox_loc = _conv3(4 * w, 2), _conv3(4 * w, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        """RGB minus means (n, 3, H, W) -> 12 maps: class scores (n, 2, h, w) and offsets (n, 4, h, w) per level."""
        x = _relu(self.conv1_2(_relu(self.conv1_1(x))))
        x = F.max_pool2d(x, 2)
        x = F.max_pool2d(_relu(self.conv2_2(_relu(self.conv2_1(x)))), 2)
        tap3 = _relu(self.conv3_3(_relu(self.conv3_2(_relu(self.conv3_1(x))))))
        x = F.max_pool2d(tap3, 2)
        tap4 = _relu(self.conv4_3(_relu(self.conv4_2(_relu(self.conv4_1(x))))))
        x = F.max_pool2d(tap4, 2)
        tap5 = _relu(self.conv5_3(_relu(self.conv5_2(_relu(self.conv5_1(x))))))
        x = F.max_pool2d(tap5, 2)
        tap_fc7 = _relu(self.fc7(_relu(self.fc6(x))))
        tap6 = _relu(self.conv6_2(_relu(self.conv6_1(tap_fc7))))
        tap7 = _relu(self.conv7_2(_relu(self.conv7_1(tap6))))
        tap3, tap4, tap5 = self.conv3_3_norm(tap3), self.conv4_3_norm(tap4), self.conv5_3_norm(tap5)
        finest = self.conv3_3_norm_mbox_conf(tap3)
        finest = torch.cat([finest[:, :3].amax(dim=1, keepdim=True), finest[:, 3:]], dim=1)
        return [
            finest,
            self.conv3_3_norm_mbox_loc(tap3),
            self.conv4_3_norm_mbox_conf(tap4),
            self.conv4_3_norm_mbox_loc(tap4),
            self.conv5_3_norm_mbox_conf(tap5),
            self.conv5_3_norm_mbox_loc(tap5),
            self.fc7_mbox_conf(tap_fc7),
            self.fc7_mbox_loc(tap_fc7),
            self.conv6_2_mbox_conf(tap6),
            self.conv6_2_mbox_loc(tap6),
            self.conv7_2_mbox_conf(tap7),
            self.conv7_2_mbox_loc(tap7),
        ]


def _conv3(n_in: int, n_out: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1)


def _relu(x: Tensor) -> Tensor:
    """In place: two maps of the full size are gigabytes of a 4K frame, and the convolution's own is not needed."""
    return F.relu(x, inplace=True)


def s3fd_from_state(state: Mapping[str, Tensor]) -> S3fd:
    """The network that `state` belongs to, loaded and set to inference; its width is read from the tensors.

    Raises ValueError when keys or shapes are not those of an S3FD.
    """
    first = state.get("conv1_1.weight")
    if first is None or first.ndim != 4 or len(first) == 0:
        raise ValueError("not an S3FD face detector: 'conv1_1.weight' is missing or no convolution")
    network = S3fd(len(first))
    load_matching(network, state, "an S3FD face detector")
    return network.eval()
