"""BiSeNet, S3FD and RTMPose-l against the original networks, and what is read from their answers."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import faces
from musetalk.networks.bisenet import BiseNet
from musetalk.networks.rtmpose import RtmPose
from musetalk.networks.s3fd import S3fd
from tests.golden.compare import equal_share, every, relative
from tests.support.seeded import fill

CPU = torch.device("cpu")


@lru_cache(maxsize=4)
def filled(kind: type[torch.nn.Module], seed: int, gain: float) -> torch.nn.Module:
    """A full-size network with the weights of the recipe."""
    return fill(kind(), seed, gain)


def check_keys(network: torch.nn.Module, path: Path) -> None:
    """Keys and shapes of the state are those stored beside the vectors, where they are."""
    if path.is_file():
        wanted = {key: list(shape) for key, shape in json.loads(path.read_text(encoding="utf-8")).items()}
        assert {key: list(value.shape) for key, value in network.state_dict().items()} == wanted


@torch.inference_mode()
def check_bisenet(path: Path) -> None:
    """Feature maps, scores and classes of the parser."""
    data = np.load(path)
    network = filled(BiseNet, int(data["seed"]), float(data["gain"]))
    assert isinstance(network, BiseNet)
    check_keys(network, path.with_name("bisenet.keys.json"))
    x = torch.from_numpy(data["x"])
    feat8, _, feat32 = network.cp.resnet(x)
    assert relative(every(feat8.numpy(), data["feat8"]), data["feat8"]) < 1e-4
    assert relative(every(feat32.numpy(), data["feat32"]), data["feat32"]) < 1e-4
    assert relative(every(network.cp(x)[1].numpy(), data["cp8"]), data["cp8"]) < 1e-4
    logits = network(x)
    assert relative(every(logits.numpy(), data["logits"]), data["logits"]) < 1e-4
    for scores, name in zip(network.auxiliary(x), ("logits16", "logits32"), strict=True):
        assert relative(every(scores.numpy(), data[name]), data[name]) < 1e-4
    assert equal_share(logits.argmax(1)[0].numpy(), data["argmax"]) >= 0.999


@torch.inference_mode()
def check_s3fd(path: Path) -> None:
    """The 12 maps of the detector, its boxes, what suppression keeps, and the frame's face."""
    data = np.load(path)
    network = filled(S3fd, int(data["seed"]), float(data["gain"]))
    check_keys(network, path.with_name("s3fd.keys.json"))
    heads = network(faces.detector_input(torch.from_numpy(data["images_bgr"])))
    for index, head in enumerate(heads):
        assert relative(head.numpy(), data[f"head{index:02d}"]) < 1e-4
    candidates = faces.decode_detections(heads)[0]
    wanted = data["boxes"][:, 0]
    assert relative(candidates, wanted) < 1e-3
    # Suppression is compared on the stored boxes: a difference in the last digit could turn an order.
    check_suppression(wanted, data["nms_keep"])
    final = wanted[data["nms_keep"]]
    assert equal_share(final[final[:, 4] > 0.5], data["final"]) == 1.0
    check_result(wanted, data["result"])


def check_suppression(candidates: NDArray[Any], stored: NDArray[Any]) -> None:
    """What upstream kept is a greedy choice under our overlap rule, and ours where no two scores are equal.

    Upstream sorts with an unstable sort, so the order of equal scores (softmax saturates at 1) was that of one machine.
    """
    left = np.arange(len(candidates))
    for index in stored.tolist():
        assert index in left
        assert candidates[index, 4] == candidates[left, 4].max()
        left = left[left != index]
        left = left[faces.overlaps(candidates[index], candidates[left]) <= 0.3]
    assert len(left) == 0
    if len(np.unique(candidates[:, 4])) == len(candidates):
        assert faces.nms(candidates).tolist() == stored.tolist()


def check_result(candidates: NDArray[Any], stored: NDArray[Any]) -> None:
    """The stored box is that of a best score, and ours is it where the best score is one candidate's alone."""
    best = faces.best_detection(candidates)
    if best is None:
        assert stored.tolist() == []
        return
    tied = candidates[candidates[:, 4] == candidates[:, 4].max()]
    boxes = [[int(max(0.0, float(edge))) for edge in row[:4]] for row in tied]
    assert stored.tolist() in boxes
    assert list(best[0]) in boxes
    if len(tied) == 1:
        assert list(best[0]) == stored.tolist()


@torch.inference_mode()
def check_rtmpose(path: Path) -> None:
    """The pose network's input, features, bins with and without flip, keypoints and the 68 points in the picture."""
    data = np.load(path)
    network = filled(RtmPose, int(data["seed"]), float(data["gain"]))
    assert isinstance(network, RtmPose)
    check_keys(network, path.with_name("rtmpose_l.keys.json"))
    height, width = data["image_bgr"].shape[:2]
    assert np.allclose(faces.pose_scale(width, height), data["bbox_scale"][0], rtol=1e-6)
    warped = faces.warp_for_pose(data["image_bgr"])
    assert np.abs(warped.astype(int) - data["warped_bgr"]).max() <= 3
    x = faces.pose_input(data["warped_bgr"])
    assert relative(every(x, data["net_input_sub"]), data["net_input_sub"]) < 1e-5
    batch = torch.from_numpy(x)[None]
    features = network.backbone(batch)[0].numpy()
    assert relative(every(features, data["feat_sub"]), data["feat_sub"]) < 1e-3
    plain_x, plain_y = network(batch)
    assert relative(every(plain_x[0].numpy(), data["simcc_x0"]), data["simcc_x0"]) < 1e-3
    assert relative(every(plain_y[0].numpy(), data["simcc_y0"]), data["simcc_y0"]) < 1e-3
    mirrored = network.backbone(batch.flip(3))[0].numpy()
    assert relative(every(mirrored, data["feat_flip_sub"]), data["feat_flip_sub"]) < 1e-3
    mirrored_x, mirrored_y = network(batch.flip(3))
    assert relative(every(mirrored_x[0].numpy(), data["simcc_x1"]), data["simcc_x1"]) < 1e-3
    assert relative(every(mirrored_y[0].numpy(), data["simcc_y1"]), data["simcc_y1"]) < 1e-3
    finder = faces.PoseFaceFinder(network, torch.nn.Identity(), device=CPU, dtype=torch.float32)
    simcc_x, simcc_y = (bins[0].numpy() for bins in finder.simcc(batch))
    assert relative(simcc_x, data["simcc_x"]) < 1e-3
    assert relative(simcc_y, data["simcc_y"]) < 1e-3
    keypoints, scores = faces.decode_simcc(simcc_x, simcc_y)
    assert relative(scores, data["scores"]) < 1e-3
    clear = clear_winner(data["simcc_x"]) & clear_winner(data["simcc_y"])
    in_frame = faces.keypoints_in_frame(keypoints, width, height)
    assert np.allclose(in_frame[clear], data["keypoints"][clear], atol=1e-4)
    # The last step on the stored bins, where every keypoint is decided.
    stored, _ = faces.decode_simcc(data["simcc_x"], data["simcc_y"])
    stored = faces.keypoints_in_frame(stored, width, height)
    assert np.allclose(stored, data["keypoints"], atol=1e-4)
    # Truncation to whole pixels is compared where the stored keypoint is not on the edge of one.
    points = data["keypoints"][faces.FACE_KEYPOINTS]
    decided = np.abs(points - np.rint(points)) > 1e-3
    assert (stored[faces.FACE_KEYPOINTS].astype(np.int32) == data["face68_int32"])[decided].all()


def clear_winner(bins: NDArray[Any]) -> NDArray[Any]:
    """Whether the best bin of each row is ahead of the second by more than a thousandth of it."""
    top = np.sort(bins, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2] > 1e-3 * np.abs(top[..., -1]))
