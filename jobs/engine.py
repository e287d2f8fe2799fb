"""What updates a model: one interface, plain torch here, DeepSpeed in `jobs.zero`.

    step(batches, lr) -> record     forward, backward and update on this rank's micro-batches of one global step
    evaluate(batch) -> (sum, items) loss without gradients; measure(batch): also the model's metrics
    state() / load(state)           full fp32 tensors by parameter name, the same from any engine, world size or stage

A micro-batch's loss is a mean over `model.weight(batch)` items. Each is weighted by its share of the items of the whole
step, over all ranks and micro-batches, so any split of a global batch gives the loss, gradient and gradient norm that
one process computes on it at once.

bf16 is a bf16 copy of the weights for compute, with fp32 weights, gradients and moments kept for the update. That is
DeepSpeed's scheme, so both engines follow the same curve.

An engine trains one phase of its model; `jobs.phases` makes one engine of several.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.optim import MOMENTS, Optim, adamw, empty_moments

Batch = dict[str, Tensor]


@dataclass
class State:
    """Everything an update depends on.

    weights: name -> tensor: parameters in fp32, and the persistent buffers as they are. Tied weights appear once.
    moments: name.exp_avg, name.exp_avg_sq -> fp32 tensor.
    updates: optimizer updates made, which AdamW's bias correction needs.
    On ranks other than 0 `weights` and `moments` are empty: nobody needs a second copy.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0


def world() -> tuple[int, int]:
    """(rank, number of ranks) of this process; (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if world()[1] > 1:
        dist.all_reduce(values)
    return values


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a checkpoint."""
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def parameters_of(model: nn.Module, phase: str) -> dict[str, nn.Parameter]:
    """name -> parameter that belongs to a phase: those of the submodule it is named after; to "main" all."""
    named = dict(model.named_parameters())
    return named if phase == "main" else {name: p for name, p in named.items() if name.startswith(phase + ".")}


def check_names(model: nn.Module, state: State, phase: str = "main") -> None:
    """ValueError when a checkpoint is not of this model, or lacks something of this phase."""
    expected, known = parameters_of(model, phase) | buffers(model), parameters_of(model, "main") | buffers(model)
    missing, extra = expected.keys() - state.weights.keys(), state.weights.keys() - known.keys()
    if missing or extra:
        raise ValueError(
            f"the checkpoint is of another model: it lacks {sorted(missing)[:3]} and has unknown {sorted(extra)[:3]}"
        )


class Engine:
    """The part of a step that does not depend on who updates the weights.

    phase: of the model, its own parameters are the only ones that change.
    """

    def __init__(
        self, model: nn.Module, optim: Optim, precision: str, device: torch.device, phase: str = "main"
    ) -> None:
        if phase not in model.phases():
            raise ValueError(f"{type(model).__name__} trains in phases {model.phases()}; {phase!r} is none of them")
        self.model, self.optim, self.precision, self.device = model.to(device), optim, precision, device
        self.phase, self.named = phase, parameters_of(self.model, phase)
        self.updates = 0

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(batch, self.phase)

    def step(self, batches: list[Batch], lr: float) -> dict[str, float]:
        """One step of a model with one phase: `update`, then the model's own `after_step`."""
        record = self.update(batches, lr)
        self._after_step()
        return record

    def update(self, batches: list[Batch], lr: float) -> dict[str, float]:
        """One update from this rank's micro-batches; the same record on every rank.

        record: loss and the model's metrics (means over all items of the step), grad_norm before clipping, items.
        """
        self.model.train()
        with self._others_frozen():
            return self._update_from(batches, lr)

    def _update_from(self, batches: list[Batch], lr: float) -> dict[str, float]:
        batches = [self._move(batch) for batch in batches]
        weights = [self.model.weight(batch).double() for batch in batches]
        items = sum_over_ranks(torch.stack(weights).sum())
        sums: dict[str, Tensor] = {}
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            loss, metrics = self.forward(batch)
            for name, value in {**metrics, "loss": loss}.items():
                part = value.detach().double() * weight
                sums[name] = sums[name] + part if name in sums else part
            self._backward(loss * (weight / items).to(loss.dtype), last=index == len(batches) - 1)
        norm = self._update(lr)
        self.updates += 1
        names = sorted(sums)
        means = (sum_over_ranks(torch.stack([sums[name] for name in names])) / items).tolist()
        return {**dict(zip(names, means, strict=True)), "grad_norm": float(norm), "items": int(items)}

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """(summed loss, items) of one batch on this rank."""
        sums, items = self.measure(batch)
        return sums["loss"], items

    @torch.no_grad()
    def measure(self, batch: Batch) -> tuple[dict[str, float], int]:
        """({loss and the model's metrics: their sums over the items}, items) of one batch on this rank."""
        self.model.eval()
        batch = self._move(batch)
        weight = self.model.weight(batch)
        loss, metrics = self.forward(batch)
        return {name: float(value.double() * weight) for name, value in ({"loss": loss} | metrics).items()}, int(weight)

    @contextmanager
    def _others_frozen(self) -> Iterator[None]:
        """Within: other phases' parameters take no gradients, which those phases would otherwise find."""
        others = [p for n, p in self.model.named_parameters() if p.requires_grad and n not in self.named]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _move(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _backward(self, loss: Tensor, last: bool) -> None:
        raise TypeError(f"{type(self).__name__} must define _backward")

    def _update(self, lr: float) -> float | Tensor:
        raise TypeError(f"{type(self).__name__} must define _update")

    def _after_step(self) -> None:
        self.model.after_step()


class TorchEngine(Engine):
    """Plain torch on any number of ranks: gradients are summed in one flat all-reduce, weights are whole everywhere."""

    def __init__(
        self,
        model: nn.Module,
        optim: Optim,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        phase: str = "main",
    ) -> None:
        super().__init__(model, optim, precision, torch.device(device), phase)
        self.compute = self.named
        self.master = self.compute
        if precision == "bf16":
            self.master = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in self.compute.items()}
            for parameter in self.compute.values():
                parameter.data = parameter.data.bfloat16()
        self.trained = {name: p for name, p in self.master.items() if p.requires_grad}
        self.adam = adamw(self.trained, optim)

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        if self.precision == "bf16":  # fp32 sums, or small gradients of late micro-batches would vanish
            for name, master in self.trained.items():
                gradient = self.compute[name].grad
                if gradient is not None:
                    self.compute[name].grad = None
                    master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def _update(self, lr: float) -> Tensor:
        for parameter in self.trained.values():
            if parameter.grad is None:  # unused this step on this rank; the collective needs the same shapes everywhere
                parameter.grad = torch.zeros_like(parameter)
        if world()[1] > 1:
            flat = sum_over_ranks(torch.cat([p.grad.flatten() for p in self.trained.values()]))
            parts = flat.split([p.numel() for p in self.trained.values()])
            for parameter, part in zip(self.trained.values(), parts, strict=True):
                parameter.grad = part.view_as(parameter)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained.values()])
        if self.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.optim.clip, norm)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self._publish()
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        """The fp32 weights into the copy that computes."""
        if self.precision == "bf16":
            for name, master in self.master.items():
                self.compute[name].copy_(master)

    def state(self) -> State:
        if world()[0]:
            return State(updates=self.updates)
        whole = {name: p.detach() for name, p in self.master.items()} | buffers(self.model)
        moments = {
            f"{name}.{moment}": empty_moments(self.adam, p)[moment]
            for name, p in self.trained.items()
            for moment in MOMENTS
        }
        return State(
            {name: value.to("cpu", copy=True) for name, value in whole.items()},
            {name: value.to("cpu", copy=True) for name, value in moments.items()},
            self.updates,
        )

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Continues from `state`, which is whole on every rank."""
        check_names(self.model, state, self.phase)
        for name, value in (self.master | buffers(self.model)).items():
            value.copy_(state.weights[name])
        for name, parameter in self.trained.items():
            slot = empty_moments(self.adam, parameter)
            slot["step"].fill_(state.updates)
            for moment in MOMENTS:
                slot[moment].copy_(state.moments[f"{name}.{moment}"])
        self.updates = state.updates
        self._publish()
