"""Linear attention: two products with the memory per token, and masked attention inside chunks."""

from collections.abc import Iterator

import torch

from kernels import linear_attention
from kernels.bench import Bench, Case
from kernels.linear_attention.reference import reference
from kernels.memory import chunk


def cases(bench: Bench) -> Iterator[Case]:
    """Without decay, with one per head (retention, SSD), and with one per channel (GLA)."""
    shapes = ((8, 4096, 16, 128), (1, 32768, 16, 128), (8, 4096, 32, 64)) if bench.gpu else ((8, 512, 4, 64),)
    for decay in ("head", "channel", "none"):
        for shape in shapes:
            yield _case(bench, decay, *shape, peers=_peers(bench, decay))
        if not bench.gpu:
            yield _case(bench, decay, 1, 2048, 2, 64, peers={"loop": _loop})
            for tokens in (4096, 32768):
                yield _case(bench, decay, 1, tokens, 2, 64, series=decay, truth=tokens < 32768)


def _case(bench, decay, rows, tokens, heads, size, series="", truth=True, peers=None) -> Case:
    def inputs():
        made = {n: bench.randn(rows, tokens, heads, size) for n in ("q_BTHK", "k_BTHK", "v_BTHV")}
        made["k_BTHK"] = torch.nn.functional.normalize(made["k_BTHK"], dim=-1)
        wide = {"head": (rows, tokens, heads), "channel": (rows, tokens, heads, size)}
        made["decay"] = -0.3 * torch.rand(wide[decay], device=bench.device) if decay != "none" else None
        return made

    count, c = rows * tokens * heads, chunk(tokens, size)
    flops = count * (4 * size * size + 2 * c * size)  # the lower half of each square inside a chunk
    moved = count * (4 * size * bench.dtype.itemsize + 4 * {"head": 1, "channel": size, "none": 0}[decay])
    shape = f"{decay} B{rows} T{tokens} H{heads} K{size}"
    return Case(
        shape, inputs, linear_attention, flops, moved, backward=2.5,
        peers=peers or {}, series=series, tokens=tokens, truth=truth,
    )  # fmt: skip


def _loop(q_BTHK, k_BTHK, v_BTHV, decay):
    return reference(q_BTHK, k_BTHK, v_BTHV, decay, None, None, 1.0, 0)


def _peers(bench: Bench, decay: str) -> dict:
    if bench.fla is None:
        return {}
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    def peer(q_BTHK, k_BTHK, v_BTHV, decay):
        if decay is None:
            return chunk_linear_attn(q_BTHK, k_BTHK, v_BTHV, scale=1.0, normalize=False)
        run = chunk_simple_gla if decay.dim() == 3 else chunk_gla
        return run(q_BTHK, k_BTHK, v_BTHV, decay, scale=1.0)

    return {"fla": peer}
