"""Attention: training passes against torch's, decode against the speed of the copy, since it reads each key once."""

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels import View, attention, op
from kernels.bench import Bench, Case

PEERS = ("cudnn", "flash", "efficient")


def cases(bench: Bench) -> Iterator[Case]:
    """Forward takes 4 T^2 H K operations, half of them if causal; backward 2.5 times as many."""
    yield from _training(bench)
    yield from _decode(bench)


def _training(bench: Bench) -> Iterator[Case]:
    shapes = (
        # rows, tokens, heads, groups, size, options
        ((1, 16384, 16, 16, 128, {}), (4, 4096, 32, 8, 128, {}), (8, 2048, 16, 16, 64, {}))
        + (
            (1, 16384, 16, 16, 128, {"mask": "full"}),
            (1, 16384, 16, 4, 128, {"window": 1024}),
            (2, 4096, 8, 8, 256, {}),
        )
        + ((2, 4096, 16, 8, 128, {"softcap": 50.0}),)
        if bench.gpu
        else ((2, 512, 4, 2, 64, {}), (1, 2048, 4, 2, 64, {"window": 256}), (1, 1024, 4, 2, 64, {"softcap": 50.0}))
    )
    for rows, tokens, heads, groups, size, options in shapes:
        window, causal = options.get("window", 0), options.get("mask") != "full"
        pairs = tokens * tokens / (2 if causal else 1)
        if window:
            pairs = window * (tokens - window / 2)
        peers = {}
        if not window and "softcap" not in options:
            names = PEERS if bench.gpu else ("sdpa",)
            peers = {name: _sdpa(name, causal) for name in names}
        label = " ".join(f"{n} {v}" for n, v in options.items())
        yield Case(
            f"B{rows} T{tokens} H{heads} G{groups} K{size} {label}".strip(),
            _drawn(bench, rows, tokens, heads, groups, size),
            _call(**options),
            4 * rows * heads * size * pairs,
            2 * rows * tokens * (heads + groups) * size * bench.dtype.itemsize,
            peers=peers,
            truth=tokens <= 4096,
        )
    if not bench.gpu:
        draw = _drawn(bench, 1, 2048, 2, 1, 32)
        yield Case("B1 T2048 H2 G1 K32", draw, _call(), 4 * 2 * 32 * 2048**2 / 2, 0, peers={"loop": _loop})
        for tokens in (4096, 32768):  # a window makes it linear
            draw = _drawn(bench, 1, tokens, 2, 1, 32)
            flops = 4 * 2 * 32 * 256 * tokens
            yield Case(
                f"T{tokens} window 256", draw, _call(window=256), flops, 0,
                series="window", tokens=tokens, truth=tokens < 8192,
            )  # fmt: skip


def _decode(bench: Bench) -> Iterator[Case]:
    shapes = (
        # rows, new tokens, past, heads, groups, key, value, page
        ((8, 1, 16384, 32, 8, 128, 128, 0), (64, 1, 4096, 32, 8, 128, 128, 16), (1, 1, 131072, 32, 8, 128, 128, 0))
        + ((32, 1, 8192, 128, 1, 576, 512, 64), (8, 8, 16384, 32, 8, 128, 128, 16))
        if bench.gpu
        else ((2, 1, 2048, 8, 2, 64, 64, 0), (2, 4, 2048, 8, 2, 64, 64, 16))
    )
    for rows, tokens, slots, heads, groups, size, size_v, page in shapes:
        latent = size != size_v

        def draw(rows=rows, tokens=tokens, slots=slots, heads=heads, groups=groups, size=size, page=page):
            pool = (rows * slots // page + 1, page) if page else (rows, slots)
            table = None
            if page:
                table = torch.randperm(pool[0] - 1, device=bench.device).view(rows, -1) + 1
            made = {
                "q": bench.randn(rows, tokens, heads, size),
                "k": bench.randn(rows, tokens, groups, size),
                "v": bench.randn(rows, tokens, groups, size),
                "past_k": bench.randn(*pool, groups, size),
                "past_v": bench.randn(*pool, groups, size),
            }
            if size > 256:
                made["v"] = made["past_v"] = None
            return made | {"table": table, "length": torch.full((rows,), slots, device=bench.device)}

        def run(q, k, v, past_k, past_v, table, length, size_v=size_v):
            v, past_v = (k[..., :size_v], past_k[..., :size_v]) if v is None else (v, past_v)
            return attention(q, View({"k": k, "v": v}, {"k": past_k, "v": past_v}, length, table_BN=table))

        read = rows * slots * groups * (size if latent else size + size_v) * bench.dtype.itemsize
        yield Case(
            f"B{rows} T{tokens} past {slots} H{heads} G{groups} K{size} V{size_v}" + (f" pages {page}" if page else ""),
            draw,
            run,
            2 * rows * tokens * heads * slots * (size + size_v),
            read,
            backward=0,
            peers={} if page or latent or tokens > 1 else {"sdpa": _sdpa_past},
        )


def _drawn(bench, rows, tokens, heads, groups, size):
    def draw():
        return {
            "q": bench.randn(rows, tokens, heads, size),
            "k": bench.randn(rows, tokens, groups, size),
            "v": bench.randn(rows, tokens, groups, size),
        }

    return draw


def _call(**options):
    return lambda q, k, v: attention(q, View({"k": k, "v": v}, {}), **options)


def _sdpa(name, causal):
    def run(q, k, v):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = {
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        ratio = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if name == "sdpa":
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=ratio > 1)
        if name == "efficient" and ratio > 1:
            k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
            ratio = 1
        with sdpa_kernel(backends[name]):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=ratio > 1)

    return run


def _sdpa_past(q, k, v, past_k, past_v, table, length):
    keys, values = torch.cat([past_k, k], 1).transpose(1, 2), torch.cat([past_v, v], 1).transpose(1, 2)
    return scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True)


def _loop(q, k, v):
    before, op.FORM = op.FORM, "reference"
    try:
        return _call()(q, k, v)
    finally:
        op.FORM = before
