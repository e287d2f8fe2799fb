"""Token shift: each token sees the one before it in its document, the cheapest memory there is.

The previous token is a convolution of two taps, so documents, padding and kept states are the kernel's business.
"""

import torch
from torch import Tensor

import kernels
from models.span import Span


def previous(x_BTD: Tensor, at: Span, state_BD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each one, zeros before a document's first; and the last one, or with keep (B, keep+1, D)."""
    taps_D2 = torch.tensor([1.0, 0.0], dtype=x_BTD.dtype, device=x_BTD.device).expand(x_BTD.shape[-1], 2)
    shifted_BTD, tail = kernels.conv1d(
        x_BTD,
        taps_D2,
        state_BWD=None if state_BD is None else state_BD[:, None],
        segments_BT=at.segments_BT,
        keep=at.keep,
    )
    return shifted_BTD, tail.squeeze(-2)
