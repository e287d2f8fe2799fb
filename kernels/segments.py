"""What ops that carry a state need to know about local segment numbers (0 carried, n begun here, -1 padding)."""

import torch
from torch import Tensor


def filled(segments_BT: Tensor) -> Tensor:
    """The same numbers with padding given that of the last real token before it, 0 (the carried one) at the front."""
    if segments_BT.shape[1] == 0:
        return segments_BT
    return segments_BT.clamp(min=0).cummax(1).values


def begins(filled_BT: Tensor) -> Tensor:
    """True where a document begins, given `filled` numbers; (B, T) bool."""
    before_BT = torch.cat([torch.zeros_like(filled_BT[:, :1]), filled_BT[:, :-1]], 1)
    return filled_BT != before_BT
