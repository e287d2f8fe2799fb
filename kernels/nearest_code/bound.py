"""How far a distance that a product gave can be from the exact one: codes within it are compared again."""

import torch
from torch import Tensor


def bound(x_ND: Tensor, half_C: Tensor) -> Tensor:
    """(N): twice the error of |c|^2 / 2 - x . c in the dtype of x, given |c|^2 / 2.

    A sum of D products of numbers is off by at most D eps / 2 of the norms' product; far less where D is large.
    """
    dim = x_ND.shape[1]
    largest = (2 * half_C.amax()).sqrt()
    share = min(dim + 4, 16 * dim**0.5) * torch.finfo(x_ND.dtype).eps
    return share * largest * (torch.linalg.vector_norm(x_ND, dim=1) + largest)
