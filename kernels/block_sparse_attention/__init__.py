"""Softmax attention of each query over blocks of keys chosen for it, a `View` showing this call's tokens and a past."""

from torch import Tensor

from kernels import check, op
from kernels.attention import View, checked
from kernels.block_sparse_attention.chunked import chunked, grad
from kernels.block_sparse_attention.places import positions
from kernels.block_sparse_attention.reference import reference


def _fake(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    length_B: Tensor | None,
    positions_BT: Tensor | None,
    segments_BT: Tensor | None,
    table_BN: Tensor | None,
    blocks_BTGN: Tensor,
    scale: float,
    block: int,
    linear: bool,
) -> Tensor:
    return q_BTHK.new_empty(*q_BTHK.shape[:3], v_BTGV.shape[3])


_op = op.Op("block_sparse_attention", reference, chunked, _fake, grad=grad)


def block_sparse_attention(
    q_BTHK: Tensor, view: View, blocks_BTGN: Tensor, *, block: int, scale: float | None = None, linear: bool = False
) -> Tensor:
    """Exact softmax attention over the tokens of selected blocks, as NSA (arXiv 2502.11089) and InfLLM-V2 (2509.24663).

    q (B, T, H, K) and view as of `attention`. blocks (B, T, G, N) int64: block j is the tokens at positions
    [j * block, (j + 1) * block) of the query's own document, past included; -1 is none, one named twice counts once,
    and their order does not matter. A query reads only tokens up to itself; all heads of a group read the same.
    linear: the weight of a token is scale * q.k itself, with no softmax, as in linear attention (SPLA, 2601.22379).
    scale: K**-0.5 when None. positions_BT of the view count from the start of the document.
    Returns y (B, T, H, V) in q's dtype, 0 at padding and where nothing is selected.
    Raises ValueError or TypeError naming the argument.
    """
    name = "block_sparse_attention"
    past_k, past_v, length_B, positions_BT, segments_BT, table_BN = checked(name, q_BTHK, view)
    rows, tokens, _, size = q_BTHK.shape
    groups = view.new["k"].shape[2]
    check.shape(
        name, "blocks_BTGN", blocks_BTGN, (rows, tokens, groups, None), f"(B={rows}, T={tokens}, G={groups}, N)"
    )
    check.whole(name, "blocks_BTGN", blocks_BTGN)
    check.device(name, "blocks_BTGN", blocks_BTGN, q_BTHK)
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"{name}: block={block!r} must be a number of tokens, at least 1")
    if segments_BT is None:
        positions_BT = None  # consecutive: columns say as much
    elif positions_BT is None:
        positions_BT = positions(segments_BT, length_B)
    scale = size**-0.5 if scale is None else float(scale)
    past = (past_k, past_v, length_B, positions_BT, segments_BT, table_BN)
    return _op(q_BTHK, view.new["k"], view.new["v"], *past, blocks_BTGN, scale, block, bool(linear))
