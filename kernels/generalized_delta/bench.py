"""The generalised delta rule: four products with the memory per token, and a triangular system inside chunks."""

from collections.abc import Iterator

import torch

from kernels import generalized_delta
from kernels.bench import Bench, Case
from kernels.generalized_delta.reference import reference
from kernels.memory import chunk


def cases(bench: Bench) -> Iterator[Case]:
    """As RWKV-7 uses it: a is a unit key, negated, b the same times a rate."""
    shapes = ((8, 4096, 32, 64), (1, 32768, 32, 64)) if bench.gpu else ((8, 512, 4, 64),)
    for shape in shapes:
        yield _case(bench, *shape, peers=_peers(bench))
    if not bench.gpu:
        yield _case(bench, 1, 2048, 2, 64, peers={"loop": _loop})
        for tokens in (4096, 32768):
            yield _case(bench, 1, tokens, 2, 64, series="T", truth=tokens < 32768)


def _case(bench, rows, tokens, heads, size, series="", truth=True, peers=None) -> Case:
    def inputs():
        made = {n: bench.randn(rows, tokens, heads, size) for n in ("q_BTHK", "k_BTHK", "v_BTHV")}
        unit = torch.nn.functional.normalize(bench.randn(rows, tokens, heads, size), dim=-1)
        made["decay_BTHK"] = -0.6 * torch.rand(rows, tokens, heads, size, device=bench.device)
        return made | {"a_BTHK": -unit, "b_BTHK": unit * torch.rand_like(unit)}

    count, c = rows * tokens * heads, chunk(tokens, size)
    flops = count * (8 * size * size + 8 * c * size + c * c // 3)  # the lower half of each square inside a chunk
    moved = count * (6 * size * bench.dtype.itemsize + 4 * size)
    return Case(
        f"B{rows} T{tokens} H{heads} K{size}", inputs, generalized_delta, flops, moved, backward=2.5,
        peers=peers or {}, series=series, tokens=tokens, truth=truth,
    )  # fmt: skip


def _loop(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, a_BTHK, b_BTHK):
    return reference(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, a_BTHK, b_BTHK, None, None, 1.0, 0)


def _peers(bench: Bench) -> dict:
    if bench.fla is None:
        return {}
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

    def peer(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, a_BTHK, b_BTHK):
        return chunk_dplr_delta_rule(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, decay_BTHK, scale=1.0)

    return {"fla": peer}
