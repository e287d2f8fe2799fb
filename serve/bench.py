"""How fast serving is: ours, vLLM, transformers and llama.cpp on one checkpoint, in one run, one process at a time.

`python -m serve.bench` makes a Llama-shaped checkpoint of about 79 M random weights, checks that ours and transformers
say the same in fp32, and then decodes with each engine that is installed, in bf16, int8 and int4. Reading speed and
matmul speed of the machine are measured in the same run; a figure is told with its share of what they allow.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from serve.peers import PEERS

SHAPE = {"vocab": 32000, "dim": 640, "layers": 12, "heads": 10, "kv_heads": 5, "hidden": 1920}
SMALL = {"vocab": 512, "dim": 128, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 384}
FORMS = ("bf16", "int8", "int4")
ROWS = (1, 8, 32)
TAKES = {"edifice": FORMS, "vllm": ("bf16",), "transformers": ("bf16",), "llama_cpp": FORMS}
BITS = {"fp32": 32, "bf16": 16, "int8": 8.25, "int4": 4.25}  # of a weight, with the scales of its group


@dataclass
class Bench:
    """threads, tokens, rounds: of each engine's run. parameters: of the checkpoint. failed: why one did not run."""

    folder: Path
    threads: int
    tokens: int
    rounds: int
    parameters: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, form: str, rows: tuple[int, ...] = ROWS, tokens: int = 0) -> dict[int, dict] | None:
        """What `serve.peers` measured, by the number of requests; None when the engine does not run here."""
        command = [sys.executable, "-m", "serve.peers", name, str(self.folder), form, "--threads", str(self.threads)]
        command += ["--tokens", str(tokens or self.tokens), "--rounds", str(self.rounds), "--rows", *map(str, rows)]
        environment = _environment(self.threads)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
        if done.returncode:
            lines = (done.stderr.strip() or "no message").splitlines()
            self.failed[f"{name} {form}"] = lines[-1][:120]
            return None
        return {int(rows): found for rows, found in json.loads(done.stdout.strip().splitlines()[-1]).items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.bench", description=__doc__.split("\n")[0])
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"default: all of {' '.join(PEERS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny checkpoint, to see that everything runs")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the table there, as Markdown")
    args = parser.parse_args(argv)
    if unknown := set(args.engines) - set(PEERS):
        parser.error(f"no such engine: {' '.join(sorted(unknown))}; there are {' '.join(PEERS)}")
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), args.threads, args.tokens, args.rounds)
        bench.parameters = checkpoint(bench.folder, SMALL if args.small else SHAPE)
        if not gate(bench):
            print("ours and transformers do not say the same: nothing is measured", file=sys.stderr)
            return 1
        read, product = limits(args.threads)
        tell(f"{bench.parameters / 1e6:.1f} M parameters, {args.threads} threads, {args.tokens} tokens a request;")
        tell(f"reads {read / 1e9:.0f} GB/s, bf16 products {product / 1e9:.0f} GFLOP/s;")
        tell("greedy tokens in fp32 are those of transformers.")
        tell("")
        tell("| engine | weights | requests | tokens/s | share of the limit | first token, ms |")
        tell("| --- | --- | ---: | ---: | ---: | ---: |")
        for name in args.engines or PEERS:
            for form in TAKES[name]:
                for rows, found in (bench.run(name, form) or {}).items():
                    share = found["rate"] / limit(bench.parameters, form, rows, read, product)
                    first = f"{1e3 * found['first']:.1f}"
                    tell(f"| {name} | {form} | {rows} | {found['rate']:.0f} | {share:.0%} | {first} |")
        tell("")
        for name, why in bench.failed.items():
            tell(f"{name} did not run: {why}")
    if args.record:
        args.record.write_text("\n".join(["# Serving on a CPU", "", *lines, ""]))
    return 0


def limit(parameters: int, form: str, rows: int, read: float, product: float) -> float:
    """Tokens per second that no engine on this machine can pass: a step reads all weights and multiplies with them."""
    return rows / max(parameters * BITS[form] / 8 / read, 2 * parameters * rows / product)


def checkpoint(folder: Path, shape: dict[str, int]) -> int:
    """Random weights from a seed as a folder of ours and one of Hugging Face; the number of parameters."""
    from models import build, hub

    torch.manual_seed(0)
    heads = f"gqa(heads={shape['heads']},kv_heads={shape['kv_heads']},head_dim={shape['dim'] // shape['heads']})"
    model = build(
        "decoder", vocab=shape["vocab"], dim=shape["dim"], layers=shape["layers"], pattern=heads,
        ffn=f"swiglu(hidden={shape['hidden']})", tied=True,
    )  # fmt: skip
    hub.save(model, str(folder / "edifice"))
    hub.save_hf(model, str(folder / "hf"), "llama")
    return sum(parameter.numel() for parameter in model.parameters())


def gate(bench: Bench) -> bool:
    """Whether ours says in fp32 what transformers does, through everything that is measured."""
    ours, theirs = (bench.run(name, "fp32", (1, 3), 16) for name in ("edifice", "transformers"))
    if ours is None or theirs is None:
        print(bench.failed, file=sys.stderr)
        return False
    return all(ours[rows]["tokens"] == theirs[rows]["tokens"] for rows in ours)


def limits(threads: int) -> tuple[float, float]:
    """Bytes per second of reading what no second cache holds, and operations per second of a bf16 product."""
    torch.set_num_threads(threads)
    data, square = torch.ones(40 * 2**20), torch.randn(2048, 2048).bfloat16()
    return data.nbytes / _least(lambda: data.sum()), 2 * 2048**3 / _least(lambda: square @ square)


def _least(run) -> float:
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def _environment(threads: int) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {**os.environ, **own, **binding}


if __name__ == "__main__":
    sys.exit(main())
