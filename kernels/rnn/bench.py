"""Recurrent networks with the products of their inputs, against torch's own: cuDNN's on a GPU."""

from collections.abc import Callable, Iterator

import torch

from kernels import elman, gru, indrnn, lstm, slstm
from kernels.bench import Bench, Case

OURS: dict[str, tuple[int, Callable]] = {"elman": (1, elman), "gru": (3, gru), "lstm": (4, lstm), "slstm": (4, slstm)}


def cases(bench: Bench) -> Iterator[Case]:
    """Products forward count once for the inputs and once for the hidden units; backward takes twice as many."""
    sizes = ((32, 64, 1024), (256, 16, 512), (1024, 64, 1024), (1024, 1, 256)) if bench.gpu else ((256, 8, 128),)
    for name, (gates, run) in OURS.items():
        for tokens, rows, units in sizes:
            yield _dense(bench, name, gates, run, tokens, rows, units)
    tokens, rows, units = (1024, 64, 1024) if bench.gpu else (256, 8, 128)

    def inputs():
        return {"x_BTU": bench.randn(rows, tokens, units), "weight_U": bench.randn(units).tanh()}

    moved = 2 * rows * tokens * units * bench.dtype.itemsize
    yield Case(f"indrnn B{rows} T{tokens} U{units}", inputs, indrnn, 0, moved, backward=2.0)


def _dense(bench: Bench, name: str, gates: int, run: Callable, tokens: int, rows: int, units: int) -> Case:
    def inputs():
        scale = units**-0.5
        return {
            "x": bench.randn(rows, tokens, units),
            "wi": scale * bench.randn(gates * units, units),
            "wh": scale * bench.randn(gates * units, units),
        }

    def ours(x, wi, wh):
        return run(x @ wi.T, wh)

    def torchs(x, wi, wh):
        h = x.new_zeros(1, rows, units)
        call = {"elman": torch._VF.rnn_tanh, "gru": torch._VF.gru, "lstm": torch._VF.lstm}[name]
        return call(x, (h, h) if name == "lstm" else h, [wi, wh], False, 1, 0.0, True, False, True)

    flops = 2 * 2 * rows * tokens * gates * units * units
    moved = (2 * rows * tokens * units * (1 + gates) + 2 * gates * units * units) * bench.dtype.itemsize
    peers = {} if name == "slstm" else {"cuDNN" if bench.gpu else "torch": torchs}
    return Case(f"{name} B{rows} T{tokens} U{units}", inputs, ours, flops, moved, backward=2.0, peers=peers)
