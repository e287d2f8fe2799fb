"""The products of a mixture of experts: rows sorted by expert, each run times its own matrix."""

from torch import Tensor

from kernels import check, op
from kernels.grouped_matmul.chunked import chunked, grad
from kernels.grouped_matmul.reference import reference


def _fake(x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    return x_MD.new_empty(x_MD.shape[0], weight_EDF.shape[2])


_op = op.Op("grouped_matmul", reference, chunked, _fake, grad=grad, twice=reference)


def grouped_matmul(x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """y (M, F): the first counts[0] rows of x times weight[0], the next counts[1] times weight[1], and so on.

    x (M, D) and weight (E, D, F), E >= 1, of one floating dtype, which y has; sums in fp32 (fp64 for fp64). counts (E)
    int64, 0 allowed, as `dispatch` gives them. No row is padded. Gradients for x and weight. Raises ValueError or
    TypeError naming the argument; that the counts add up to M is checked on a CPU only.
    """
    name = "grouped_matmul"
    check.shape(name, "x_MD", x_MD, (None, None), "(M, D)")
    check.floating(name, "x_MD", x_MD)
    check.shape(name, "weight_EDF", weight_EDF, (None, x_MD.shape[1], None), f"(E, D={x_MD.shape[1]}, F), D from x_MD")
    check.dtype(name, "weight_EDF", weight_EDF, x_MD.dtype)
    check.device(name, "weight_EDF", weight_EDF, x_MD)
    count = len(weight_EDF)
    if not count:
        raise ValueError(f"{name}: weight_EDF must have at least one matrix")
    check.shape(name, "counts_E", counts_E, (count,), f"(E={count},), E from weight_EDF")
    check.whole(name, "counts_E", counts_E)
    check.device(name, "counts_E", counts_E, x_MD)
    return _op(x_MD, weight_EDF, counts_E)
