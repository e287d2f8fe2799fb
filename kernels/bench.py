"""How fast the kernels are, against what this machine can do and against their peers, all in one run.

`python -m kernels.bench [OP ...]` runs the cases of `kernels/<op>/bench.py`. Copy bandwidth and matmul peak are
measured first; each case is checked against float64 before it is timed, and rows that fail the check carry no time. A
time is the median over interleaved rounds of ours and each peer; `2.00x peer` means ours takes half the peer's time,
`(8% memory)`, on a GPU, that its peak of memory is 8 % of the peer's.
"""

import argparse
import importlib
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kernels import op

PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """One line of the registry.

    shape:    what a reader sees, such as "B4 T2048 H16 K64".
    inputs:   draws the arguments on the bench's device and in its dtype.
    run:      the public op, called as run(**inputs).
    flops:    floating-point operations of the forward pass; 0 where bytes are all that counts.
    bytes:    read and written by the forward pass at least: each input once, each output once.
    backward: times the forward's flops and bytes that the backward pass takes; 0 for an op without gradients.
    peers:    name -> the same computation by somebody else, called as peer(**inputs).
    series:   cases of one name and growing `tokens` show how the time grows: 1.00 is linear.
    truth:    whether the float64 check is affordable at this size.
    """

    shape: str
    inputs: Callable[[], dict[str, Tensor | None]]
    run: Callable
    flops: float
    bytes: float
    backward: float = 2.5
    peers: dict[str, Callable] = field(default_factory=dict)
    series: str = ""
    tokens: int = 0
    truth: bool = True


@dataclass(frozen=True)
class Bench:
    """What a case may ask about the run. fla: the flash-linear-attention package, or None."""

    device: torch.device
    dtype: torch.dtype
    fla: object = None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers in the bench's dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {' '.join(registered())}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--fla", default="", metavar="FOLDER", help="holds the flash-linear-attention package")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the table there, as Markdown")
    args = parser.parse_args(argv)
    if unknown := set(args.ops) - set(registered()):
        parser.error(f"no such op: {' '.join(sorted(unknown))}; there are {' '.join(registered())}")
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    bench = Bench(device, dtype, _fla(args.fla))
    table = Table(bench)
    for line in table.head():
        print(line, flush=True)
    for name in args.ops or registered():
        for case in importlib.import_module(f"kernels.{name}.bench").cases(bench):
            for line in table.rows(name, case):
                print(line, flush=True)
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text("\n".join(table.lines) + "\n")
    return 1 if table.wrong else 0


def registered() -> list[str]:
    """Names of the ops that have a bench."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/bench.py"))


class Table:
    """Rows of Markdown, each complete when it is printed."""

    columns = ("op", "shape", "pass", "ms", "copy %", "matmul %", "error", "peak MiB", "growth", "against peers")

    def __init__(self, bench: Bench) -> None:
        self.bench, self.lines, self.wrong = bench, [], 0
        self.bandwidth, self.peak = copy_bandwidth(bench), matmul_peak(bench)
        self.first: dict[tuple[str, str, str], tuple[int, float]] = {}

    def head(self) -> list[str]:
        device = torch.cuda.get_device_name() if self.bench.gpu else f"{platform.machine()}, {_threads()}"
        return self._add(
            f"{device}; torch {torch.__version__}; {str(self.bench.dtype).removeprefix('torch.')}; measured: copy "
            f"{self.bandwidth / 1e9:,.0f} GB/s, matmul {self.peak / 1e12:,.2f} TFLOP/s.",
            "",
            "| " + " | ".join(self.columns) + " |",
            "|" + " --- |" * len(self.columns),
        )

    def rows(self, name: str, case: Case) -> Iterator[str]:
        inputs = case.inputs()
        error, allowed = accuracy(case, inputs) if case.truth else (math.nan, math.inf)
        if not error <= allowed and case.truth:
            self.wrong += 1
            yield from self._add(f"| {name} | {case.shape} | WRONG: error {error:.2g}, allowed {allowed:.2g} |")
            return
        for part in PASSES if case.backward else PASSES[:1]:
            times, peaks = timed(self.bench, case, inputs, part)
            ms, peak = times.pop(""), peaks.pop("")
            cost = {"forward": 1.0, "backward": case.backward, "both": 1 + case.backward}[part]
            against = ", ".join(
                f"{t} {peer}"
                if isinstance(t, str)
                else f"{t / ms:.2f}x {peer}" + (f" ({100 * peak / peaks[peer]:.0f}% memory)" if peaks[peer] else "")
                for peer, t in times.items()
            )
            cells = (
                name,
                case.shape,
                part,
                f"{ms:.3f}",
                f"{100 * cost * case.bytes / (ms * 1e-3) / self.bandwidth:.1f}",
                f"{100 * cost * case.flops / (ms * 1e-3) / self.peak:.1f}" if case.flops else "",
                f"{error:.1e}" if case.truth else "",
                f"{peak / 2**20:,.0f}" if self.bench.gpu else "",
                self._growth(name, case, part, ms),
                against,
            )
            yield from self._add("| " + " | ".join(cells) + " |")

    def _growth(self, name: str, case: Case, part: str, ms: float) -> str:
        if not case.series:
            return ""
        tokens, first = self.first.setdefault((name, case.series, part), (case.tokens, ms))
        return "" if tokens == case.tokens else f"{(ms / first) / (case.tokens / tokens):.2f}"

    def _add(self, *lines: str) -> list[str]:
        self.lines += lines
        return list(lines)


def accuracy(case: Case, inputs: dict) -> tuple[float, float]:
    """Largest error of the forward pass, and what is allowed, relative to the exact result's largest value.

    Exact is the chunked form in float64, which the tests hold to the definition. Allowed is the rounding of the output
    and of sums over thousands of terms; whether a kernel is as exact as plain torch, the tests say.
    """
    with torch.no_grad():
        ours = _tuple(case.run(**inputs))
        wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
        before, op.FORM = op.FORM, "chunked"
        try:
            exact = _tuple(case.run(**wide))
        finally:
            op.FORM = before
    worst, allowed = 0.0, 0.0
    for y, want in zip(ours, exact, strict=True):
        if not y.numel():
            continue
        if not y.is_floating_point() and not y.is_complex():
            worst = max(worst, math.inf if not torch.equal(y, want) else 0.0)
            continue
        scale = want.abs().max().item() or 1.0
        found = (y.to(want.dtype) - want).abs().max().item() / scale
        worst = max(worst, found if found == found else math.inf)
        coarse = max(torch.finfo(x.dtype).eps for x in (y, *inputs.values()) if isinstance(x, Tensor) and _floats(x))
        allowed = max(allowed, 16 * coarse, 1e-4)
    return worst, allowed


def timed(bench: Bench, case: Case, inputs: dict, part: str) -> tuple[dict[str, float | str], dict[str, float]]:
    """Median milliseconds of ours ("") and of each peer (or why it did not run), and the most memory each took."""
    ready: dict[str, Callable] = {"": prepared(case.run, inputs, part)}
    times: dict[str, float | str] = {}
    for name, peer in case.peers.items():
        try:
            ready[name] = prepared(peer, inputs, part)
            ready[name]()
        except Exception as error:  # a peer that cannot run here is a fact for the table, not a failure of ours
            ready.pop(name, None)
            times[name] = f"({type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''})"
    peaks = {name: _peak(bench, run) for name, run in ready.items()}
    if bench.gpu:
        from triton.testing import do_bench

        rounds = {name: [do_bench(run, return_mode="median") for _ in range(3)] for name, run in ready.items()}
    else:
        rounds = {name: [] for name in ready}
        ready[""]()
        started = time.perf_counter()
        while len(rounds[""]) < 5 or (time.perf_counter() - started < 0.5 and len(rounds[""]) < 100):
            for name, run in ready.items():
                before = time.perf_counter()
                run()
                rounds[name].append(1e3 * (time.perf_counter() - before))
            if time.perf_counter() - started > 20 and len(rounds[""]) >= 2:
                break
    return {**{name: statistics.median(all_) for name, all_ in rounds.items()}, **times}, peaks


def prepared(run: Callable, inputs: dict, part: str) -> Callable[[], object]:
    """What is timed: the forward pass without recording, the backward pass over one recording, or both."""
    if part == "forward":

        def forward():
            with torch.no_grad():
                return run(**inputs)

        return forward
    leaves = {n: x.detach().clone().requires_grad_() if _floats(x) else x for n, x in inputs.items()}
    wanted = [x for x in leaves.values() if _floats(x)]

    def record():
        return [y for y in _tuple(run(**leaves)) if isinstance(y, Tensor) and y.requires_grad]

    outputs = record()
    grads = [torch.randn_like(y) for y in outputs]

    def backward():
        return torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)

    def both():
        return torch.autograd.grad(record(), wanted, grads, allow_unused=True)

    return backward if part == "backward" else both


def copy_bandwidth(bench: Bench) -> float:
    """Bytes per second, read plus written, of a large copy."""
    source = torch.ones(2**28 if bench.gpu else 2**26, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(bench, lambda: target.copy_(source))


def matmul_peak(bench: Bench) -> float:
    """Floating-point operations per second of a large matrix product in the bench's dtype."""
    n = 8192 if bench.gpu else 2048
    a, b = bench.randn(n, n), bench.randn(n, n)
    return 2 * n**3 / _seconds(bench, lambda: a @ b)


def _seconds(bench: Bench, run: Callable) -> float:
    if bench.gpu:
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") * 1e-3
    run()
    times = []
    for _ in range(7):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _peak(bench: Bench, run: Callable) -> float:
    if not bench.gpu:
        run()
        return 0.0
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _fla(folder: str) -> object:
    if not folder:
        return None
    sys.path.insert(0, folder)
    return importlib.import_module("fla")


def _floats(x: object) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _threads() -> str:
    return f"{torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
