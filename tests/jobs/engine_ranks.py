"""One rank of a real gloo group: trains the toy on every engine and writes what each case gave.

Run by test_engine.py as `python engine_ranks.py OUT` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. The one
process (WORLD_SIZE=1) is the truth the cases of two are held against.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from toy import Toy, rows, share

from jobs.engine import Engine, State, TorchEngine, world
from jobs.optim import Optim

STEPS, HALF = 6, 3
OPTIM = Optim(lr=1e-2, clip=0.5, warmup=3)


def make(kind: str, precision: str, accumulate: int) -> Engine:
    torch.manual_seed(0)
    model = Toy()
    if kind == "torch":
        return TorchEngine(model, OPTIM, precision)
    from jobs.zero import DeepSpeedEngine

    return DeepSpeedEngine(
        model, OPTIM, precision, zero=int(kind), accumulate=accumulate, rows=8 // world()[1] // accumulate
    )


def go(engine: Engine, accumulate: int, start: int, stop: int) -> list[list[float]]:
    rank, ranks = world()
    curve = []
    for step in range(start, stop):
        record = engine.step(share(rows(step), rank, ranks, accumulate), OPTIM.rate(step, 20))
        curve.append([record["loss"], record["grad_norm"]])
    return curve


def store(state: State, folder: Path) -> None:
    if world()[0] == 0:
        folder.mkdir()
        save_file(state.weights, folder / "weights.safetensors")
        save_file(state.moments, folder / "moments.safetensors")
        (folder / "updates").write_text(str(state.updates))
    if world()[1] > 1:
        dist.barrier()


def restore(folder: Path) -> State:
    files = (load_file(folder / f"{name}.safetensors") for name in ("weights", "moments"))
    return State(*files, int((folder / "updates").read_text()))


def case(kind: str, precision: str, accumulate: int, out: Path) -> dict:
    """The unbroken curve, and the one that was stopped, stored and taken up by a fresh engine."""
    name = f"{kind}-{precision}-{accumulate}"
    engine = make(kind, precision, accumulate)
    curve = go(engine, accumulate, 0, STEPS)
    loss, items = engine.evaluate(rows(99))
    store(engine.state(), out / f"{name}-end")
    first = make(kind, precision, accumulate)
    broken = go(first, accumulate, 0, HALF)
    store(first.state(), out / f"{name}-half")
    second = make(kind, precision, accumulate)
    second.load(restore(out / f"{name}-half"))
    broken += go(second, accumulate, HALF, STEPS)
    return {"curve": curve, "broken": broken, "loss": loss, "items": items}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        kinds = ("torch",)
    else:
        dist.init_process_group("gloo")
        kinds = ("torch", "0", "1", "2", "3")
    results = {}
    for kind in kinds:
        for precision in ("fp32", "bf16"):
            for accumulate in (1, 2):
                results[f"{kind}-{precision}-{accumulate}"] = case(kind, precision, accumulate, out)
    for kind in kinds:  # what any engine stored, any engine takes up
        for source in kinds:
            engine = make(kind, "fp32", 1)
            engine.load(restore(out / f"{source}-fp32-1-half"))
            results[f"{source}-to-{kind}"] = {"broken": go(engine, 1, HALF, STEPS)}
    if world()[0] == 0:
        (out / "results.json").write_text(json.dumps(results))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
