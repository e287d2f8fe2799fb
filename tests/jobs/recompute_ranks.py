"""One rank of a real gloo group: steps of a small hybrid on every engine, with its activations kept and recomputed.

Run by test_resize.py as `python recompute_ranks.py OUT` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.config import Job, build
from jobs.engine import Engine, world
from jobs.loop import make_engine
from jobs.optim import Optim
from models.decoder import Decoder

# rwkv7 hands its first value up the stack, the others keep their own shapes of state; engram reads token ids.
MODEL = Decoder.Config(vocab=64, dim=32, layers=6, pattern="rwkv7 gqa gated_deltanet", ffn="swiglu engram")


def job(kind: str, checkpointing: str) -> Job:
    engine = {"engine": "torch"} if kind == "torch" else {"engine": "deepspeed", "zero": int(kind)}
    optim = Optim(lr=1e-2, warmup=1)
    return Job("x", MODEL, optim=optim, batch=4, accumulate=2, workers=2, checkpointing=checkpointing, **engine)


def saved_bytes(engine: Engine, batch: dict) -> int:
    """Bytes of what autograd keeps between forward and backward, weights apart, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    weights |= {p.ds_tensor.untyped_storage().data_ptr() for p in engine.model.parameters() if "ds_tensor" in vars(p)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    engine.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = engine.forward(batch)
    size = sum(kept.values())
    engine._backward(loss, last=False)
    return size


def case(kind: str, checkpointing: str) -> dict:
    this = job(kind, checkpointing)
    engine = make_engine(this, build(this), torch.device("cpu"))
    rank, curve = world()[0], []
    for step in range(4):
        batch = engine.model.example(4, seed=step)
        mine = [{name: value[2 * rank + i : 2 * rank + i + 1] for name, value in batch.items()} for i in range(2)]
        record = engine.step(mine, 1e-2)
        curve.append([record["loss"], record["grad_norm"]])
    loss, _ = engine.evaluate(engine.model.example(4, seed=9))
    return {"curve": curve, "loss": loss, "bytes": saved_bytes(engine, engine.model.example(4, seed=9))}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        f"{kind} {checkpointing}": case(kind, checkpointing)
        for kind in ("torch", "0", "1", "2", "3")
        for checkpointing in ("none", "block")
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
