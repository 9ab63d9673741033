"""Parts of all training stages: folders, checkpoints that resume at the same step, the learning rate.

The random numbers of step k depend only on the stage's seed and k, so a stopped run resumes without a difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musetalk.files import replacing

BUILD = Path(__file__).resolve().parent / "build"
MODELS = Path(__file__).resolve().parent / "models"


def random_of(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one step."""
    return np.random.default_rng((seed, step))


def learning_rate(step: int, n_steps: int, peak: float, *, warm_up: int = 100) -> float:
    """Linear rise over `warm_up` steps, then half a cosine down to a fiftieth."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    share = (step - warm_up) / max(1, n_steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def train(
    name: str,
    network: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    n_steps: int,
    peak_rate: float,
    on_check: Callable[[int], dict[str, float]] | None = None,
    check_every: int = 250,
    average: float = 0.0,
) -> None:
    """Run a stage from its checkpoint to step `n_steps`; print one line every 50 steps.

    `average` > 0 keeps a running mean of the weights, which the network has at the end.
    """
    torch.manual_seed(0)
    BUILD.mkdir(exist_ok=True)
    path = BUILD / f"{name}.pt"
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    mean: dict[str, Tensor] = {}
    step = 0
    if path.is_file():
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        mean, step = saved["mean"], saved["step"]
        print(f"{name}: resumed at step {step}", flush=True)
    seen: dict[str, float] = {}
    started, first = time.monotonic(), step
    while step < n_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak_rate)
        loss, facts = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if average > 0:
            kept = min(average, step / (step + 10))
            for key, value in network.state_dict().items():
                old = mean.get(key)
                mean[key] = value.detach().clone() if old is None else old.lerp(value, 1 - kept)
        for key, number in facts.items():
            seen[key] = number if key not in seen else 0.95 * seen[key] + 0.05 * number
        if step % 50 == 0:
            pace = (time.monotonic() - started) / (step - first)
            figures = " ".join(f"{key} {number:.4f}" for key, number in seen.items())
            print(f"{name} {step}/{n_steps} {pace:.3f} s/step {figures}", flush=True)
        if step % check_every == 0 or step == n_steps:
            state = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "mean": mean,
                "step": step,
            }
            with replacing(path) as part:
                torch.save(state, part)
            if on_check is not None:
                kept_state = {key: value.clone() for key, value in network.state_dict().items()}
                if mean:
                    network.load_state_dict(mean)
                print(f"{name} {step} check {on_check(step)}", flush=True)
                network.load_state_dict(kept_state)
    if mean:
        network.load_state_dict(mean)
