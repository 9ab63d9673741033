"""Suppression, SimCC decoding, the box from landmarks, and the parser's way from picture to mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from musetalk import face_parsing, faces
from musetalk.blending import face_mask
from musetalk.geometry import Box
from musetalk.networks.bisenet import BiseNet
from tests.golden.check_networks import check_result, check_suppression, filled
from tests.golden.compare import absolute, equal_share, every, relative


def check_s3fd_nms(path: Path) -> None:
    """What greedy suppression keeps, in which order, and the box that is left."""
    data = np.load(path)
    names = [name for name in data.files if name.startswith("boxes")]
    assert names
    for name in names:
        case = name.removeprefix("boxes")
        check_suppression(data[name], data[f"keep{case}"])
        check_result(data[name], data[f"result{case}"])


def check_simcc_decode(path: Path) -> None:
    """Keypoints and scores from bins."""
    data = np.load(path)
    keypoints, scores = faces.decode_simcc(data["simcc_x"], data["simcc_y"])
    assert equal_share(keypoints, data["keypoints"]) == 1.0
    assert equal_share(scores, data["scores"]) == 1.0


def check_landmark_bbox(path: Path) -> None:
    """The box of each frame for several shifts; (0, 0, 0, 0) stands for no face."""
    data = np.load(path)
    for shift in data["shifts"].tolist():
        for index, (keypoints, detected) in enumerate(zip(data["keypoints"], data["det"], strict=True)):
            wanted = data[f"coords_{shift}"][index].tolist()
            if (detected == -1).all():
                assert wanted == [0, 0, 0, 0]
                continue
            points = keypoints[faces.FACE_KEYPOINTS].astype(np.int32)
            box = faces.box_from_landmarks(points, Box(*(int(edge) for edge in detected)), int(shift))
            assert list(box) == wanted, f"frame {index}, shift {shift}"


@torch.inference_mode()
def check_faceparse(path: Path) -> None:
    """Picture -> network input -> scores -> classes -> the three masks."""
    data = np.load(path)
    bgr = np.ascontiguousarray(data["image_rgb"][..., ::-1])
    x = face_parsing.parse_input(bgr)
    assert absolute(every(x, data["net_input"]), data["net_input"]) < 1e-5
    network = filled(BiseNet, int(data["seed"]), float(data["gain"]))
    logits = network(torch.from_numpy(x)[None])[0].numpy()
    assert relative(every(logits, data["logits_sub"]), data["logits_sub"]) < 1e-4
    parser = face_parsing.FaceParser(network, device=torch.device("cpu"), dtype=torch.float32)
    labels = parser.labels([bgr])[0]
    assert equal_share(labels, data["argmax"]) >= 0.999
    for mode in ("raw", "neck", "jaw"):
        assert equal_share(face_mask(labels, mode), data[f"mask_{mode}"]) >= 0.999
