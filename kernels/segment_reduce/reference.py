"""Sums, means and maxima of the rows of each segment, the definition: every segment looks at all rows."""

import torch
from torch import Tensor


def reference(x_ED: Tensor, segments_E: Tensor, count: int, reduce: str) -> Tensor:
    """(count, D) in x.dtype, computed in fp32 at least; 0 where a segment has no rows."""
    check_segments(segments_E, count)
    wide_ED = x_ED.to(torch.promote_types(x_ED.dtype, torch.float32))
    own_NE = segments_E == torch.arange(count, device=x_ED.device)[:, None]
    rows_N1 = own_NE.sum(1, keepdim=True)
    if reduce == "max":
        if not len(x_ED):
            return x_ED.new_zeros(count, x_ED.shape[1]) + 0 * x_ED.sum()
        most_ND = torch.where(own_NE[:, :, None], wide_ED, -torch.inf).amax(1)
        return torch.where(rows_N1 > 0, most_ND, 0).to(x_ED.dtype)
    total_ND = own_NE.to(wide_ED.dtype) @ wide_ED
    return (total_ND if reduce == "sum" else total_ND / rows_N1.clamp(min=1)).to(x_ED.dtype)


def check_segments(segments_E: Tensor, count: int) -> None:
    """Raise unless each number is one of a segment; not on a GPU, which would have to be waited for."""
    if segments_E.is_cpu and len(segments_E):
        least, most = (int(n) for n in segments_E.aminmax())
        if least < 0 or most >= count:
            raise ValueError(f"segment_reduce: segments_E must be 0..{count - 1}, got {least}..{most}")
