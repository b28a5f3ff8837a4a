"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from torch import Tensor, addcmul


class Rotation:
    """The rotation of the tokens of one forward pass, the same in all layers.

    As Megatron's `apply_rotary_pos_emb`, which computes cosines and sines anew in each layer, for
    queries and for keys, and reads the lengths of packed sequences on the host.

    Shapes: N tokens, g key/value heads, h vectors for each of them, d head size.

    Args:
        positions_N: of each token in its sequence.
    """

    def __init__(self, positions_N: Tensor) -> None:
        self._positions_N = positions_N
        self._factors: tuple[Tensor, Tensor] | None = None

    def __call__(self, heads_N1ghd: Tensor, angles: Tensor) -> Tensor:
        """Rotate by each token's position; `angles` is [max_tokens, 1, 1, d]."""
        half = heads_N1ghd.shape[-1] // 2
        if self._factors is None:
            angles_N111d = angles.index_select(0, self._positions_N)[:, None]
            sin_N111d = angles_N111d.sin()
            sin_N111d[..., :half].neg_()
            dtype = heads_N1ghd.dtype
            self._factors = angles_N111d.cos().to(dtype), sin_N111d.to(dtype)
        cos_N111d, signed_sin_N111d = self._factors
        swapped_N1ghd = heads_N1ghd.roll(half, dims=-1)
        return addcmul(heads_N1ghd * cos_N111d, swapped_N1ghd, signed_sin_N111d)
