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
from jobs import checkpoint, given
from jobs.config import Job, build
from jobs.data import Prepared, index_of
from jobs.data import tokenizer as tokenizers
from jobs.data.index import Index
from jobs.data.loader import Loader
from jobs.engine import Engine, TorchEngine, sum_over_ranks, world
from jobs.phases import Phases
from jobs.record import HEADLINES, Recorder, read
from models.decoder import Decoder
from models.stack import Stack

EVAL_ROWS = 8  # of one forward; fixed, so that the sum is the same, bit for bit, on any number of ranks

# Dense bf16 FLOP/s of one device, by a part of its name: NVIDIA's data sheets.
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class Summary:
    """How a run stands: steps made, of how many, and a validation measure before the first and after the last."""

    step: int
    steps: int
    first: float
    last: float
    measure: str

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def summary(run: Path, job: Job) -> Summary:
    """Read from a run's folder."""
    found = checkpoint.latest(run)
    records = [record for record in read(run) if "val_loss" in record]
    name = next((name for name in HEADLINES if records and name in records[0]), "val_loss")
    values = [record[name] for record in records] or [math.nan]
    return Summary(checkpoint.step_of(found) if found else 0, job.steps, values[0], values[-1], HEADLINES[name])


def make_engine(job: Job, model: nn.Module, device: torch.device) -> Engine:
    """The job's engine around a model."""
    if job.checkpointing == "block":
        for module in model.modules():
            if isinstance(module, Stack):
                module.recompute = True
    if tuple(model.phases()) != ("main",):
        return Phases(model, lambda phase: _engine_of(job, model, device, phase), device)
    return _engine_of(job, model, device, "main")


def _engine_of(job: Job, model: nn.Module, device: torch.device, phase: str) -> Engine:
    if job.engine == "torch":
        return TorchEngine(model, job.optim, job.precision, device, phase)
    from jobs.zero import DeepSpeedEngine

    rows = job.batch // world()[1] // job.accumulate
    return DeepSpeedEngine(model, job.optim, job.precision, device, job.zero, job.accumulate, rows, phase)


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
    if job.start and checkpoint.latest(run) is None:
        given.fill(model, job.start, job.frozen)
    engine = make_engine(job, model, device)
    place = checkpoint.load(run, engine)
    tokenizer = storage.read(prepared.tokenizer).decode() if prepared.tokenizer else ""
    codes = tokenizer and isinstance(model, Decoder)  # an encoder's loss is no length of a code of the text
    bytes_C = tokenizers.token_bytes(tokenizers.parse(tokenizer)) if codes else None
    index, held_out = index_of(prepared, "train", job.length, job.seed), index_of(prepared, "val", job.length)
    size = f"{index.tokens / 1e6:.2f} M tokens" if tokenizer else f"{index.samples_per_epoch:,} rows"
    say = say if rank == 0 else lambda line: None
    say(
        f"{parameters / 1e6:.2f} M parameters on {ranks} x {device.type}, {job.engine}"
        + (f" ZeRO-{job.zero}" if job.engine == "deepspeed" else "")
        + f", {job.precision}; {size}, {job.batch * job.length:,} a step"
        + (f"; going on at step {place.step}" if place.step else "")
    )
    recorder = Recorder(run, place.step, job.steps, say) if rank == 0 else None
    peak = _peak(device) if tokenizer and job.precision == "bf16" else 0.0
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
            for phase in (name.removesuffix("grad_norm") for name in record if name.endswith("grad_norm")):
                loss, norm = record[phase + "loss"], record[phase + "grad_norm"]
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise ValueError(
                        f"step {step}: {phase}loss {loss}, gradient norm {norm} is no number; lower "
                        "--optim.lr or raise --optim.warmup; going on starts at the last checkpoint"
                    )
            if recorder:
                items = record.pop("items")
                speed = job.batch * job.length / seconds
                line = {"step": step, **record}
                if bytes_C is not None:
                    line["bits_per_byte"] = record["loss"] * items / math.log(2) / max(bytes_, 1)
                unit = "tokens" if tokenizer else "rows"
                line |= {"lr": lr, unit: step * job.batch * job.length, f"{unit}_per_s": speed, "seconds": seconds}
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


def _agree(
    stop: bool, batches: list[dict[str, Tensor]], bytes_C: Tensor | None, device: torch.device
) -> tuple[bool, int]:
    """(whether any rank was asked to stop, bytes of text the step's targets stand for), the same on every rank."""
    count = sum(_bytes(batch, bytes_C) for batch in batches)
    asked, bytes_ = sum_over_ranks(torch.tensor([int(stop), count], device=device)).tolist()
    return bool(asked), bytes_


def _bytes(batch: dict[str, Tensor], bytes_C: Tensor | None) -> int:
    """Bytes of text that the targets of a batch stand for; 0 where it is no text."""
    return 0 if bytes_C is None else int(bytes_C[batch["targets_BT"][batch["targets_BT"] >= 0]].sum())


def _evaluate(
    job: Job, engine: Engine, held_out: Index, bytes_C: Tensor | None, step: int, recorder: Recorder | None
) -> None:
    """Validation loss, bits per byte of text, and the model's own metrics on the first held-out rows, shared out over
    the ranks. What a model draws at random is the same every time, and takes nothing from the training's stream.
    """
    rows = min(job.eval_rows, held_out.samples_per_epoch)
    starts = list(range(0, rows, EVAL_ROWS))
    rank, ranks = world()
    sums: list[list[float]] = []
    devices = [engine.device] if engine.device.type == "cuda" else []
    for turn in range(math.ceil(len(starts) / ranks)):
        mine = turn * ranks + rank
        start = starts[min(mine, len(starts) - 1)]  # a rank without a share left still runs a forward, for ZeRO-3
        batch = held_out.rows(start, min(EVAL_ROWS, rows - start))
        with torch.random.fork_rng(devices):
            torch.manual_seed(start)
            measured, items = engine.measure(batch)
        names = list(measured)
        for other in range(turn * ranks, min(turn * ranks + ranks, len(starts))):
            values = [*measured.values(), items, _bytes(batch, bytes_C)]
            sums.append(values if other == mine else [0.0] * len(values))
    whole = sum_over_ranks(torch.tensor(sums, dtype=torch.float64).to(engine.device)).cpu().sum(0).tolist()
    *totals, items, bytes_ = whole
    if recorder:
        record = {f"val_{name}": total / max(items, 1) for name, total in zip(names, totals, strict=True)}
        if bytes_C is not None:
            record["val_bits_per_byte"] = record["val_loss"] * items / math.log(2) / max(bytes_, 1)
        recorder.evaluation({"step": step, **record})


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
