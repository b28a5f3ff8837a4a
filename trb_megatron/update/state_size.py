"""Bytes of what the update keeps for each parameter besides its weight."""

import torch

GRADIENT_DTYPE = torch.float32
"""Of gradient buffers, in which gradients are summed and reduced."""
_MOMENT_DTYPE = torch.float32
_MASTER_DTYPE = torch.float32


def keeps_master_weights(dtype: torch.dtype) -> bool:
    """Whether the optimizer updates a copy of weights of this type in higher precision."""
    return dtype != _MASTER_DTYPE


def optimizer_bytes(dtype: torch.dtype) -> int:
    """Both moments of AdamW, and the master weight where there is one, of one parameter."""
    moments = 2 * _MOMENT_DTYPE.itemsize
    return moments + (_MASTER_DTYPE.itemsize if keeps_master_weights(dtype) else 0)
