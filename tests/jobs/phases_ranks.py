"""One rank of a real gloo group: trains a GAN's two phases on every engine and writes what each case gave.

Run by test_phases.py as `python phases_ranks.py OUT` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Noise is
made a function of the batch, so that two ranks can be held against one process.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_ranks import restore, store

from jobs.engine import TorchEngine, world
from jobs.optim import Optim
from jobs.phases import Phases
from models.generative.gan import GAN

ROWS, STEPS, HALF = 8, 4, 2
OPTIM = Optim(lr=1e-2, warmup=2, beta1=0.5, clip=0.5)


class Sure(GAN):
    """Its noise and the places of its penalty follow from the rows alone."""

    def noise(self, rows):
        return (self.batch[:, 0, 0, : self.config.latent] * 2 - 1).to(self.generator[0].weight.dtype)

    def places(self, rows):
        return self.batch[:, 0, 1, 0]

    def forward(self, batch, phase="discriminator"):
        self.batch = batch["pixels_BCHW"]
        return super().forward(batch, phase)


def make(kind: str, loss: str, precision: str, accumulate: int) -> Phases:
    torch.manual_seed(0)
    model = Sure(GAN.Config(size=8, channels=1, width=4, latent=6, loss=loss, critic=2, average=0.5))
    rows = ROWS // world()[1] // accumulate
    if kind == "torch":
        return Phases(model, lambda phase: TorchEngine(model, OPTIM, precision, "cpu", phase))
    from jobs.zero import DeepSpeedEngine

    return Phases(
        model, lambda phase: DeepSpeedEngine(model, OPTIM, precision, "cpu", int(kind), accumulate, rows, phase)
    )


def rows(step: int) -> torch.Tensor:
    return torch.rand(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(step))


def go(engine: Phases, accumulate: int, start: int, stop: int) -> list[dict[str, float]]:
    rank, ranks = world()
    curve = []
    for step in range(start, stop):
        torch.manual_seed(step)
        parts = rows(step).chunk(ranks)[rank].chunk(accumulate)
        curve.append(engine.step([{"pixels_BCHW": part} for part in parts], OPTIM.rate(step, 20)))
    return curve


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ranks, results, states = int(os.environ["WORLD_SIZE"]), {}, {}
    if ranks > 1:
        dist.init_process_group("gloo")
    kinds = ("torch",) if ranks == 1 else ("torch", "0", "1", "2")
    for kind in kinds:
        for loss, precision, accumulate in (
            ("non_saturating", "fp32", 2),
            ("non_saturating", "bf16", 1),
            ("wgan_gp", "fp32", 1),
        ):
            name = f"{kind}-{loss}-{precision}-{accumulate}"
            curve = go(make(kind, loss, precision, accumulate), accumulate, 0, STEPS)
            first = make(kind, loss, precision, accumulate)
            broken = go(first, accumulate, 0, HALF)
            store(first.state(), out / name)
            state = restore(out / name)
            states[name] = {n: [list(v.shape), str(v.dtype)] for n, v in state.weights.items()}
            second = make(kind, loss, precision, accumulate)
            second.load(state)
            broken += go(second, accumulate, HALF, STEPS)
            results[name] = {"curve": curve, "broken": broken, "updates": state.updates}
    if world()[0] == 0:
        (out / "results.json").write_text(json.dumps({"cases": results, "states": states}))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
