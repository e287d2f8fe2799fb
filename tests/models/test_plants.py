"""Faults planted on purpose: each must be caught by the check that is there for it, or the check is worth nothing."""

from dataclasses import dataclass, replace

import contract
import pytest
import torch

import kernels
from kernels import View
from models import registry
from models.mixers.gated_deltanet import GatedDeltaNet
from models.mixers.gqa import GQA
from models.state import Kept


class FutureLeak(GQA):
    """Values are mixed with those of the next token."""

    def forward(self, x_BTD, at, state=None):
        y_BTD, state = super().forward(x_BTD, at, state)
        return y_BTD + 1e-3 * y_BTD.roll(-1, 1), state


class DeadOption(GQA):
    """An option that is read by nobody."""

    @dataclass(frozen=True)
    class Config(GQA.Config):
        gate: bool = False


class WrongStepDecay(GatedDeltaNet):
    """The step path decays a little more than the chunked one."""

    def forward(self, x_BTD, at, state=None):
        y_BTD, after = super().forward(x_BTD, at, state)
        if after is not None and x_BTD.shape[1] == 1:
            after = {**after, "matrix": after["matrix"] * 0.98}
        return y_BTD, after


class SegmentLeak(GatedDeltaNet):
    """A document that begins inside a row keeps the memory of the one before."""

    def forward(self, x_BTD, at, state=None):
        if at.segments_BT is not None:
            at = replace(at, segments_BT=at.segments_BT.clamp(max=0))
        return super().forward(x_BTD, at, state)


class ConvSegmentLeak(GatedDeltaNet):
    """Only the short convolution looks across the start of a document."""

    def forward(self, x_BTD, at, state=None):
        honest = kernels.conv1d

        def leaking(*args, segments_BT=None, **options):
            return honest(*args, segments_BT=None if segments_BT is None else segments_BT.clamp(max=0), **options)

        kernels.conv1d = leaking
        try:
            return super().forward(x_BTD, at, state)
        finally:
            kernels.conv1d = honest


class PaddingWrites(GatedDeltaNet):
    """Padding decays the memory."""

    def forward(self, x_BTD, at, state=None):
        y_BTD, after = super().forward(x_BTD, at, state)
        if after is not None and at.segments_BT is not None and not at.keep:
            padded_B = (at.segments_BT < 0).any(1)
            after = {**after, "matrix": torch.where(padded_B[:, None, None, None], 0.97, 1.0) * after["matrix"]}
        return y_BTD, after


class CacheForgetsItsPast(GQA):
    """With a state, only this call's own tokens are seen."""

    def forward(self, x_BTD, at, state=None):
        honest = kernels.attention
        kernels.attention = lambda q, view, **options: honest(
            q, View(view.new, {}, None, None, view.segments_BT), **options
        )
        try:
            return super().forward(x_BTD, at, state)
        finally:
            kernels.attention = honest


class WindowTooWide(GQA):
    """The window is one token wider with a state than without."""

    @dataclass(frozen=True)
    class Config(GQA.Config):
        window: int = 6

    def forward(self, x_BTD, at, state=None):
        config = self.config
        self.config = config if state is None else replace(config, window=config.window + 1)
        try:
            return super().forward(x_BTD, at, state)
        finally:
            self.config = config


class KeepsTheEnd(GatedDeltaNet):
    """Every kept moment is the final state."""

    def __call__(self, x_BTD, at, state=None):
        y_BTD, after = super().__call__(x_BTD, at, state)
        if at.keep:
            after = {name: Kept(value.moments[:, -1:].expand_as(value.moments)) for name, value in after.items()}
        return y_BTD, after


class DetachedState(GatedDeltaNet):
    """The carried memory is cut from the graph."""

    def forward(self, x_BTD, at, state=None):
        state = None if state is None else {name: value.detach() for name, value in state.items()}
        return super().forward(x_BTD, at, state)


class UnusedParameter(GQA):
    """A weight that nothing reads."""

    def __init__(self, config, place):
        super().__init__(config, place)
        self.gate = torch.nn.Parameter(torch.ones(3))


class GraphBreak(GQA):
    """A value is read back in the middle of forward."""

    def forward(self, x_BTD, at, state=None):
        y_BTD, state = super().forward(x_BTD, at, state)
        return (y_BTD if y_BTD.sum().item() else y_BTD * 2), state


class WrongSpec(GatedDeltaNet):
    """The declared memory is not the one that is returned."""

    def state_spec(self, max_len):
        spec = super().state_spec(max_len)
        return {**spec, "matrix": replace(spec["matrix"], dtype=torch.float64)}


PLANTS = [
    (FutureLeak, "no_future_leak"),
    (WrongStepDecay, "split_anywhere"),
    (WrongStepDecay, "step_by_step"),
    (SegmentLeak, "documents_apart"),
    (ConvSegmentLeak, "documents_apart"),
    (PaddingWrites, "padding_writes_nothing"),
    (PaddingWrites, "ragged_rows"),
    (CacheForgetsItsPast, "step_by_step"),
    (WindowTooWide, "split_anywhere"),
    (KeepsTheEnd, "kept_states"),
    (DetachedState, "gradient_through_state"),
    (UnusedParameter, "every_parameter_learns"),
    (GraphBreak, "compiles"),
    (WrongSpec, "spec_is_true"),
]


@pytest.mark.parametrize("plant,check", PLANTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_is_caught(plant, check):
    run = getattr(contract, check)
    honest = plant.__mro__[1]
    run(contract.decoder_around(honest, "mixer", {}, layers=2), 5)
    with pytest.raises((AssertionError, RuntimeError)):
        run(contract.decoder_around(plant, "mixer", {}, layers=2), 5)


def test_a_dead_option_is_caught():
    assert contract.live_options(DeadOption, "mixer") == ["gate"]
    assert contract.live_options(registry.lookup("gqa"), "mixer") == []
