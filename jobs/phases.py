"""Several phases as one engine: a step runs each phase of the model in turn, and each has an engine of its own.

`model.phases()` is the schedule of a step: names, in order, one of them twice when it is to be updated twice (on the
same rows). A phase trains the submodule that it is named after and nothing else. Parameters of no phase must not want
gradients; the model's own `after_step` may move them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jobs.engine import Batch, Engine, State, buffers, check_names, parameters_of, world
from jobs.optim import MOMENTS


def check_phases(model: nn.Module, phases: tuple[str, ...]) -> None:
    """ValueError when a phase has nothing to train, or something that can be trained is in no phase."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for phase in phases:
        own = trained & parameters_of(model, phase).keys()
        if not own:
            raise ValueError(
                f"{type(model).__name__}: phase {phase!r} has no parameters; name a phase after a submodule"
            )
    left = sorted(trained - {name for phase in phases for name in parameters_of(model, phase)})
    if left:
        raise ValueError(f"{type(model).__name__}: {left[0]} belongs to no phase of {phases}; set requires_grad=False")


class Phases(Engine):
    """The engine of a model with several phases. make(phase) -> the engine of one of them, around the same model."""

    def __init__(self, model: nn.Module, make: Callable[[str], Engine], device: torch.device | str = "cpu") -> None:
        self.model, self.device, self.updates = model.to(device), torch.device(device), 0
        self.phases = tuple(model.phases())
        check_phases(model, self.phases)
        whole = dict(model.named_parameters()) | buffers(model)
        fresh = State({name: value.detach().cpu().clone() for name, value in whole.items()})
        self.engines = {phase: make(phase) for phase in dict.fromkeys(self.phases)}
        owned = {name for engine in self.engines.values() for name in engine.named}
        self.rest = {name: p for name, p in model.named_parameters() if name not in owned}
        for name, parameter in self.rest.items():  # an engine may have cast them with its own
            parameter.data = parameter.data.to(fresh.weights[name].dtype)
        trained = [n for engine in self.engines.values() for n, p in engine.named.items() if p.requires_grad]
        fresh.moments = {f"{n}.{m}": torch.zeros_like(fresh.weights[n]) for n in trained for m in MOMENTS}
        self.load(fresh)

    def step(self, batches: list[Batch], lr: float) -> dict[str, float]:
        """Every phase of a step, on the same rows. The record of the first has plain names (a run is judged by it), the
        others' begin with the phase: generator.loss. A phase that runs twice is recorded at its last update.
        """
        records = {phase: self.engines[phase].update(batches, lr) for phase in self.phases}
        self.updates += 1
        self.model.after_step()
        return self._joined(records)

    def measure(self, batch: Batch) -> tuple[dict[str, float], int]:
        found = {phase: engine.measure(batch) for phase, engine in self.engines.items()}
        return self._joined({phase: sums for phase, (sums, _) in found.items()}), found[self.phases[0]][1]

    def _joined(self, records: dict[str, dict[str, float]]) -> dict[str, float]:
        named = {"" if phase == self.phases[0] else f"{phase}.": record for phase, record in records.items()}
        return {
            prefix + name: value
            for prefix, record in named.items()
            for name, value in record.items()
            if not prefix or name != "items"
        }

    def state(self) -> State:
        """As of one engine: names are disjoint. `updates` counts steps."""
        whole = State(updates=self.updates)
        for engine in self.engines.values():
            part = engine.state()
            whole.weights |= part.weights
            whole.moments |= part.moments
        if world()[0] == 0:
            whole.weights |= {name: p.detach().to("cpu", copy=True) for name, p in self.rest.items()}
        return whole

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Continues from `state`, which is whole on every rank."""
        check_names(self.model, state)
        for phase, engine in self.engines.items():
            engine.load(State(state.weights, state.moments, state.updates * self.phases.count(phase)))
        for name, parameter in self.rest.items():
            parameter.copy_(state.weights[name])
        self.updates = state.updates

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.engines[self.phases[0]].forward(batch)
