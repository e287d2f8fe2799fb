"""A job, complete: every field decides something, and a recipe gives all of them a value.

The resolved job is stored with its run. Going on with a run under a job that would train something else is refused.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args, get_type_hints

import torch
from torch import nn

from jobs.data import Arrays, Chats, Data
from jobs.optim import Optim
from models import registry
from models.config import from_json as model_from_json
from models.config import to_json as model_to_json
from models.decoder import Decoder

ModelConfig = TypeVar("ModelConfig")
DataConfig = TypeVar("DataConfig")

# Fields in which a run may differ when it goes on: they change how it is computed or watched, not what is learnt.
# `steps` is one of them so that a finished run can be made longer.
FREE = (
    "steps", "accumulate", "engine", "zero", "workers", "threads", "device",
    "eval_every", "eval_rows", "save_every", "keep", "max_failures", "checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class Job(Generic[ModelConfig, DataConfig]):
    """Pretraining of one model on one corpus, of text (Data), conversations (Chats) or rows of tensors (Arrays)."""

    name: str
    """Name of the run, its folder under EDIFICE_HOME/runs. The same name again goes on where it ended."""
    model: ModelConfig
    """Config of the architecture."""
    data: DataConfig = field(default_factory=Data)
    """The corpus, for text with its tokenizer."""
    start: str = ""
    """Run or model folder whose weights training starts from; empty: fresh ones."""
    frozen: bool = False
    """Only what the head has beyond the next token (medusa, mtp) is learnt; the weights of `start` stay as they are."""
    optim: Optim = field(default_factory=Optim)
    """AdamW and its schedule."""
    steps: int = 1000
    """Optimizer updates."""
    batch: int = 16
    """Rows of a step, over all workers and micro-batches."""
    length: int = 512
    """Tokens of a row of text; 1 for rows of tensors."""
    accumulate: int = 1
    """Micro-batches a worker splits its rows of a step into."""
    checkpointing: Literal["none", "block"] = "none"
    """Activations kept for the backward pass: all, or of each block its input, the rest being computed again."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What is computed in; weights and moments are always kept in fp32."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """Who updates the weights."""
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage."""
    workers: int = 1
    """Ray Train workers; 0 trains in this process, without Ray."""
    threads: int = 0
    """CPU threads of a worker; 0 shares this machine's cores among the workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each worker when the cluster has that many."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    eval_every: int = 100
    """Steps between evaluations; the first step and the last are always evaluated. 0: only those."""
    eval_rows: int = 64
    """Rows of held-out text an evaluation reads."""
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved. 0: only that."""
    keep: int = 2
    """Newest checkpoints that stay."""
    max_failures: int = 3
    """Worker failures after which the job gives up."""


def check(job: Job) -> None:
    """ValueError, one line, for the first field that cannot be. Takes a second; needs no cluster and no data."""
    for name in ("steps", "batch", "length", "accumulate", "eval_rows", "keep"):
        if getattr(job, name) < 1:
            raise ValueError(f"{name}={getattr(job, name)}: must be at least 1")
    for name in ("workers", "threads", "eval_every", "save_every", "max_failures"):
        if getattr(job, name) < 0:
            raise ValueError(f"{name}={getattr(job, name)}: must be at least 0")
    if not job.name or not all(c.isalnum() or c in "._-" for c in job.name) or job.name[0] in ".-":
        raise ValueError(f"name={job.name!r}: use letters, digits and . _ - (it names a folder)")
    parts = max(job.workers, 1) * job.accumulate
    if job.batch % parts:
        raise ValueError(
            f"batch={job.batch}: must be a multiple of workers * accumulate = "
            f"{max(job.workers, 1)} * {job.accumulate} = {parts}"
        )
    if job.zero not in (0, 1, 2, 3):
        raise ValueError(f"zero={job.zero}: must be 0, 1, 2 or 3")
    if job.zero and job.engine != "deepspeed":
        raise ValueError(f"zero={job.zero}: ZeRO is DeepSpeed's; add --engine deepspeed, or set --zero 0")
    if job.engine == "deepspeed" and job.workers == 0:
        raise ValueError("engine=deepspeed: runs in Ray Train workers; set --workers 1 or more, or --engine torch")
    if isinstance(job.data, Arrays):
        if job.length != 1:
            raise ValueError(f"length={job.length}: a row of {job.data.source} is one item; set --length 1")
    elif "vocab" not in {f.name for f in dataclasses.fields(job.model)}:
        name = registry.name_of(registry.owner(job.model))
        raise ValueError(f"model {name} does not read text; give the recipe data=Arrays(...)")
    elif isinstance(job.model, Decoder.Config) and registry.owner(job.model).needs_memory:
        name = registry.name_of(registry.owner(job.model))
        raise ValueError(f"model {name} learns from pairs of a source and a target, which {job.data.source} has not")
    elif not job.data.tokenizer and job.model.vocab < job.data.vocab:
        raise ValueError(
            f"model.vocab={job.model.vocab}: smaller than data.vocab={job.data.vocab}; "
            f"set --model.vocab {job.data.vocab}"
        )
    if job.checkpointing == "block" and not issubclass(registry.owner(job.model), Decoder):
        raise ValueError("checkpointing=block: only decoders have blocks to compute again; set --checkpointing none")
    try:
        job.data.check()
    except ValueError as error:
        raise ValueError(f"data.{error}") from None
    if job.frozen and not (job.start and isinstance(job.model, Decoder.Config)):
        raise ValueError("frozen: it is a trained decoder's weights that stay; set --start, or leave --frozen out")
    if job.frozen and job.zero == 3:
        raise ValueError("zero=3: ZeRO-3 trains no head on frozen weights; set --zero 2 or less")
    model = build(job)  # for the errors of the architecture's own config; on the CPU: not every one initialises on meta
    phases = len(set(model.phases()))
    if job.zero == 3 and phases > 1:
        raise ValueError(f"zero=3: ZeRO-3 trains one phase, this model has {phases}; set --zero 2 or less")


def build(job: Job) -> nn.Module:
    """The job's model with fresh weights, which depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = registry.owner(job.model)(job.model)
    if job.frozen:
        if not model.head.added:
            raise ValueError(
                f"model.head={job.model.head!r}: has nothing to learn on frozen weights; medusa has, and mtp"
            )
        model.freeze()
    return model


def to_json(job: Job) -> dict[str, Any]:
    """The job as plain JSON; its model as {"model": name, "config": {...}}."""
    plain = {f.name: getattr(job, f.name) for f in dataclasses.fields(job)}
    return plain | {
        "model": model_to_json(job.model),
        "data": dataclasses.asdict(job.data),
        "optim": dataclasses.asdict(job.optim),
    }


def from_json(record: dict[str, Any]) -> Job:
    """The inverse of `to_json`; unknown fields are errors."""
    kinds = {source: kind for kind in (Arrays, Chats, Data) for source in get_args(get_type_hints(kind)["source"])}
    kind = kinds[record["data"]["source"]]
    model, data, optim = model_from_json(record["model"]), kind(**record["data"]), Optim(**record["optim"])
    return Job(**{**record, "model": model, "data": data, "optim": optim})


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields in which two stored jobs differ and a run may not, each as `name: old -> new`."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after or (not prefix and name in FREE):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}: {before} -> {after}".replace("model.config.", "model."))
    return found
