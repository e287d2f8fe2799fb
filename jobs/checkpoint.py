"""Checkpoints of a run: folders `step-00000100` that hold all a job needs to go on as if it had never stopped.

A checkpoint is also a model folder: config.json, tokenizer.json and model.safetensors are what serving loads. Beside
them lie the moments (optimizer.safetensors) and every rank's random state (random.safetensors); the manifest records
step, samples seen, world size and the job. Weights and moments are whole tensors by parameter name, so any engine, ZeRO
stage and number of workers can go on from them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cluster import folder, storage
from jobs.config import Job, to_json
from jobs.engine import Engine, State, world
from models.config import to_json as model_to_json

PREFIX = "step-"


@dataclass(frozen=True)
class Place:
    """Where a run stands: `step` updates made, `samples` rows of the corpus seen."""

    step: int = 0
    samples: int = 0


def parent(run: Path) -> str:
    return storage.join(str(run), "checkpoints")


def latest(run: Path) -> str | None:
    """The newest complete checkpoint of a run, None when there is none."""
    return folder.latest(parent(run), PREFIX)


def step_of(uri: str) -> int:
    return int(storage.split(uri)[1].removeprefix(PREFIX))


def save(run: Path, job: Job, engine: Engine, place: Place, tokenizer: str) -> None:
    """Writes a checkpoint and drops old ones. Every rank calls it; rank 0 writes.

    tokenizer: the text of tokenizer.json, empty when there is none. Returns on all ranks once it is complete.
    """
    state, random = engine.state(), _random(engine.device)
    rank, ranks = world()
    if rank == 0:
        uri = storage.join(parent(run), f"{PREFIX}{place.step:08d}")
        files = {
            "config.json": json.dumps(model_to_json(job.model), indent=1),
            **({"tokenizer.json": tokenizer} if tokenizer else {}),
            "model.safetensors": state.weights,
            "optimizer.safetensors": state.moments,
            "random.safetensors": random,
        }
        meta = {"step": place.step, "samples": place.samples, "updates": state.updates, "world": ranks}
        meta["job"] = to_json(job)
        folder.write(uri, files, meta)
        folder.prune(parent(run), job.keep, PREFIX)
    if ranks > 1:
        dist.barrier()


def load(run: Path, engine: Engine) -> Place:
    """Puts the newest complete checkpoint into the engine and this rank's random state; Place() when there is none.

    Rank 0 decides which; the others follow. Damaged, naming the file, when a byte is not what was written.
    """
    rank, ranks = world()
    found = latest(run) if rank == 0 else None
    step = torch.tensor(-1 if found is None else step_of(found), device=engine.device)
    if ranks > 1:
        dist.broadcast(step, 0)
    if step < 0:
        return Place()
    checkpoint = folder.load(storage.join(parent(run), f"{PREFIX}{int(step):08d}"))
    meta = checkpoint.meta
    moments = checkpoint.tensors("optimizer.safetensors")
    engine.load(State(checkpoint.tensors("model.safetensors"), moments, meta["updates"]))
    if meta["world"] == ranks:  # at another size the streams would not correspond: they begin anew
        _set_random(checkpoint.tensors("random.safetensors"), rank, engine.device)
    return Place(meta["step"], meta["samples"])


def _random(device: torch.device) -> dict[str, Tensor]:
    """Generator states of all ranks: name -> (ranks, bytes) uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    gathered = {}
    for name, state in states.items():
        mine = state.to(device)
        parts = [torch.empty_like(mine) for _ in range(world()[1])]
        if len(parts) > 1:
            dist.all_gather(parts, mine)
        else:
            parts = [mine]
        gathered[name] = torch.stack(parts).cpu()
    return gathered


def _set_random(states: dict[str, Tensor], rank: int, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"][rank].clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][rank].clone(), device)
