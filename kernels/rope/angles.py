"""Angles of rotary embeddings: one axis of positions or several, as images and video have them."""

import torch
from torch import Tensor

from kernels import check


def rope_angles(
    positions: Tensor, frequency_R: Tensor, *, sections: tuple[int, ...] | None = None, interleaved: bool = False
) -> Tensor:
    """Angles (B, T, R) fp32 (fp64 for fp64 frequencies) of R pairs: position times radians per token.

    positions (B, T), or (B, T, A) with A axes and `sections`: how many of the R pairs each axis turns (M-RoPE, arXiv
    2409.12191). Pairs go to the axes in runs; interleaved: in turn (pair i to axis i mod A), until an axis has its
    number, and the first axis takes what is left. frequency (R), or (B, T, R) where it depends on the position.
    Plain torch, differentiable by autograd. Raises ValueError or TypeError naming the argument.
    """
    name = "rope_angles"
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        raise TypeError(f"{name}: positions must be a tensor (B, T) or (B, T, A)")
    check.floating(name, "frequency_R", frequency_R)
    check.device(name, "frequency_R", frequency_R, positions)
    pairs = frequency_R.shape[-1]
    frequency_R = frequency_R.to(torch.promote_types(frequency_R.dtype, torch.float32))
    if positions.dim() == 2:
        if sections is not None:
            raise ValueError(f"{name}: sections={sections} need positions (B, T, A), got {tuple(positions.shape)}")
        return positions[..., None].to(frequency_R.dtype) * frequency_R
    axes = positions.shape[-1]
    if sections is None or len(sections) != axes or sum(sections) != pairs or min(sections) < 0:
        raise ValueError(f"{name}: sections={sections} must be {axes} counts, one of each axis, of sum R={pairs}")
    if interleaved:
        if any((n - 1) * axes + axis >= pairs for axis, n in enumerate(sections) if axis and n):
            raise ValueError(f"{name}: sections={sections} do not interleave: an axis runs past the R={pairs} pairs")
        axis_R = [i % axes if i // axes < sections[i % axes] else 0 for i in range(pairs)]
    else:
        axis_R = [axis for axis, n in enumerate(sections) for _ in range(n)]
    return positions[..., torch.tensor(axis_R, device=positions.device)].to(frequency_R.dtype) * frequency_R
