"""Tensors into a network, key by key, with an answer in one line when they belong to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

# Batch norm counts its training steps; inference never reads the number, and older checkpoints lack it.
_COUNTER = ".num_batches_tracked"
_N_NAMED = 3


def load_matching(
    network: nn.Module, state: Mapping[str, Tensor], kind: str, *, ignore_unexpected: bool = False
) -> None:
    """Load `state` into `network` (a `kind`, for the message); every tensor must be there in its shape.

    With `ignore_unexpected` further tensors are left out. Raises ValueError with counts and the first keys, before
    anything is loaded.
    """
    own = network.state_dict()
    missing = [key for key in own if key not in state and not key.endswith(_COUNTER)]
    unexpected = [] if ignore_unexpected else [key for key in state if key not in own]
    misshapen = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    parts = [f"{len(keys)} {what} ({_first(keys)})" for what, keys in problems.items() if keys]
    if parts:
        raise ValueError(f"not {kind}: of {len(own)} tensors {', '.join(parts)}")
    network.load_state_dict({key: state.get(key, value) for key, value in own.items()}, strict=True)


def _first(keys: Iterable[str]) -> str:
    named = sorted(keys)
    return ", ".join(named[:_N_NAMED]) + (", …" if len(named) > _N_NAMED else "")
