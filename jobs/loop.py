"""The training loop: data, engine, evaluation, records and checkpoints, the same with and without Ray.

Every rank runs it; rank 0 writes. Where the run stands is the newest complete checkpoint of its folder and nothing
else, so starting, going on after a kill and making a finished run longer are one code path.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster import storage
from jobs import checkpoint
from jobs.config import Job, build
from jobs.data import Prepared
from jobs.data import tokenizer as tokenizers
from jobs.data.index import Index
from jobs.data.loader import Loader
from jobs.engine import Engine, TorchEngine, sum_over_ranks, world
from jobs.record import Recorder, read

EVAL_ROWS = 8  # of one forward; fixed, so that the sum is the same, bit for bit, on any number of ranks

# Dense bf16 FLOP/s of one device, by a part of its name: NVIDIA's data sheets.
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class Summary:
    """How a run stands: steps made, of how many, and validation bits per byte before the first and after the last."""

    step: int
    steps: int
    first: float
    last: float

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def summary(run: Path, job: Job) -> Summary:
    """Read from a run's folder."""
    found = checkpoint.latest(run)
    values = [record["val_bits_per_byte"] for record in read(run) if "val_loss" in record] or [math.nan]
    return Summary(checkpoint.step_of(found) if found else 0, job.steps, values[0], values[-1])


def make_engine(job: Job, model: nn.Module, device: torch.device) -> Engine:
    """The job's engine around a model."""
    if job.engine == "torch":
        return TorchEngine(model, job.optim, job.precision, device)
    from jobs.zero import DeepSpeedEngine

    rows = job.batch // world()[1] // job.accumulate
    return DeepSpeedEngine(model, job.optim, job.precision, device, job.zero, job.accumulate, rows)


def train(
    job: Job,
    prepared: Prepared,
    run: Path,
    device: torch.device | str = "cpu",
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> None:
    """Trains from where the run stands to its last step, or until `stop()` on some rank, and saves.

    ValueError, one line, when the loss is no number or a file is damaged.
    """
    device, (rank, ranks) = torch.device(device), world()
    torch.manual_seed(job.seed * 100_003 + rank)  # dropout and the like; a checkpoint brings its own state
    model = build(job)
    parameters, flops = sum(p.numel() for p in model.parameters()), 6 * _matmul_parameters(model)  # ZeRO-3 hides sizes
    engine = make_engine(job, model, device)
    place = checkpoint.load(run, engine)
    tokenizer = storage.read(prepared.tokenizer).decode()
    bytes_C = tokenizers.token_bytes(tokenizers.parse(tokenizer))
    index = Index(prepared.folder, "train", job.length, job.seed)
    held_out = Index(prepared.folder, "val", job.length)
    say = say if rank == 0 else lambda line: None
    say(
        f"{parameters / 1e6:.2f} M parameters on {ranks} x {device.type}, {job.engine}"
        + (f" ZeRO-{job.zero}" if job.engine == "deepspeed" else "")
        + f", {job.precision}; {index.tokens / 1e6:.2f} M tokens, {job.batch * job.length:,} a step"
        + (f"; going on at step {place.step}" if place.step else "")
    )
    recorder = Recorder(run, place.step, job.steps, say) if rank == 0 else None
    peak = _peak(device) if job.precision == "bf16" else 0.0
    loader = Loader(index, job.batch, rank, ranks, job.accumulate, place.samples)
    try:
        if place.step == 0:
            _evaluate(job, engine, held_out, bytes_C, 0, recorder)
        for step in range(place.step + 1, job.steps + 1):
            began = time.perf_counter()
            batches, lr = next(loader), job.optim.rate(step - 1, job.steps)
            record = engine.step(batches, lr)
            stopping, bytes_ = _agree(stop(), batches, bytes_C, device)
            seconds = time.perf_counter() - began
            if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
                raise ValueError(
                    f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']} is no number; lower "
                    "--optim.lr or raise --optim.warmup; going on starts at the last checkpoint"
                )
            if recorder:
                items = record.pop("items")
                speed = job.batch * job.length / seconds
                line = {"step": step, **record, "bits_per_byte": record["loss"] * items / math.log(2) / max(bytes_, 1)}
                line |= {"lr": lr, "tokens": step * job.batch * job.length, "tokens_per_s": speed, "seconds": seconds}
                if peak:
                    line["mfu"] = speed * flops / (peak * ranks)
                recorder.write(line)
                recorder.progress(line)
            last = step == job.steps
            if last or (job.eval_every and step % job.eval_every == 0):
                _evaluate(job, engine, held_out, bytes_C, step, recorder)
            if last or stopping or (job.save_every and step % job.save_every == 0):
                checkpoint.save(run, job, engine, checkpoint.Place(step, loader.cursor), tokenizer)
            if stopping:
                say(f"step {step}/{job.steps}  stopped as asked; saved, the same command goes on")
                break
    finally:
        loader.close()
        if recorder:
            recorder.close()


def _agree(stop: bool, batches: list[dict[str, Tensor]], bytes_C: Tensor, device: torch.device) -> tuple[bool, int]:
    """(whether any rank was asked to stop, bytes of text the step's targets stand for), the same on every rank."""
    count = sum(int(bytes_C[batch["targets_BT"].clamp(min=0)][batch["targets_BT"] >= 0].sum()) for batch in batches)
    asked, bytes_ = sum_over_ranks(torch.tensor([int(stop), count], device=device)).tolist()
    return bool(asked), bytes_


def _evaluate(job: Job, engine: Engine, held_out: Index, bytes_C: Tensor, step: int, recorder: Recorder | None) -> None:
    """Validation loss and bits per byte on the first rows of the held-out text, shared out over the ranks."""
    rows = min(job.eval_rows, held_out.samples_per_epoch)
    starts = list(range(0, rows, EVAL_ROWS))
    rank, ranks = world()
    sums = torch.zeros(len(starts), 3, dtype=torch.float64)
    for turn in range(math.ceil(len(starts) / ranks)):
        mine = turn * ranks + rank
        start = starts[min(mine, len(starts) - 1)]  # a rank without a share left still runs a forward, for ZeRO-3
        batch = held_out.rows(start, min(EVAL_ROWS, rows - start))
        loss, items = engine.evaluate(batch)
        if mine < len(starts):
            targets_BT = batch["targets_BT"]
            sums[mine] = torch.tensor([loss, items, int(bytes_C[targets_BT[targets_BT >= 0]].sum())])
    loss, items, bytes_ = sum_over_ranks(sums.to(engine.device)).cpu().sum(0).tolist()
    if recorder:
        values = {"val_loss": loss / max(items, 1), "val_bits_per_byte": loss / math.log(2) / max(bytes_, 1)}
        recorder.evaluation({"step": step, **values})


def _peak(device: torch.device) -> float:
    """bf16 FLOP/s of a device, 0 where unknown."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), 0.0)


def _matmul_parameters(model: nn.Module) -> int:
    """Parameters that take part in matrix products: a token costs 6 FLOPs of training for each (attention not counted).

    An embedding is a lookup, unless its weight is tied to that of another module.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return sum(p.numel() for p in model.parameters() if id(p) not in tables or names[id(p)] > 1)
