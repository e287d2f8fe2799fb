"""The gated delta rule: three products with the memory per token, and a triangular system inside chunks."""

from collections.abc import Iterator

import torch

from kernels import gated_delta
from kernels.bench import Bench, Case
from kernels.gated_delta.reference import reference
from kernels.memory import chunk


def cases(bench: Bench) -> Iterator[Case]:
    """With one decay per head (Gated DeltaNet), per channel (KDA), and without (DeltaNet)."""
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
        made["beta_BTH"] = torch.rand(rows, tokens, heads, device=bench.device)
        return made

    count, c = rows * tokens * heads, chunk(tokens, size)
    flops = count * (6 * size * size + 4 * c * size + c * c // 3)  # the lower half of each square inside a chunk
    moved = count * (4 * size * bench.dtype.itemsize + 4 + 4 * {"head": 1, "channel": size, "none": 0}[decay])
    shape = f"{decay} B{rows} T{tokens} H{heads} K{size}"
    return Case(
        shape, inputs, gated_delta, flops, moved, backward=2.5,
        peers=peers or {}, series=series, tokens=tokens, truth=truth,
    )  # fmt: skip


def _loop(q_BTHK, k_BTHK, v_BTHV, decay, beta_BTH):
    return reference(q_BTHK, k_BTHK, v_BTHV, decay, beta_BTH, None, None, q_BTHK.shape[3] ** -0.5, 0)


def _peers(bench: Bench, decay: str) -> dict:
    if bench.fla is None:
        return {}
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    def peer(q_BTHK, k_BTHK, v_BTHV, decay, beta_BTH):
        if decay is None:
            return chunk_delta_rule(q_BTHK, k_BTHK, v_BTHV, beta_BTH.to(q_BTHK.dtype))
        run = chunk_gated_delta_rule if decay.dim() == 3 else chunk_kda
        return run(q_BTHK, k_BTHK, v_BTHV, decay, beta_BTH.to(q_BTHK.dtype))

    return {"fla": peer}
