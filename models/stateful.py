"""The decode contract: whatever remembers something over time keeps it, and everything else follows.

    state_spec(max_len) -> dict[str, TensorSpec]
    forward(x_BTD, at: Span, state=None) -> (y_BTD, state)

One call is training (no state), prefill, a chunk, a decode step or the check of a draft: with a state, any length
T >= 1 goes on where the last call ended. Suites generated from the registry hold every part to that.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.span import Span
from models.state import Drafted, Kept, State, TensorSpec, along, flush, owned, written


@dataclass(frozen=True)
class Place:
    """Where in a stack a part stands: the model's width, its layer of how many, the number of token classes.

    norm, eps: how the stack normalises (rms, layer, layer_bias); eps also of the norms inside parts.
    """

    dim: int
    layer: int = 0
    layers: int = 1
    vocab: int = 0
    norm: str = "rms"
    eps: float = 1e-6


class Stateful(nn.Module):
    """A mixer, ffn, block or head. A subclass has a frozen `Config` and is built as `Part(config, place)`.

    kind:   what the registry files it under.
    family: of the catalogue.
    causal: earlier outputs never depend on later tokens. What is not causal is not served as a language model.
    exact:  earlier outputs are bit-equal whatever comes later; False: equal to rounding, where tokens are multiplied
            together whose number depends on what they are.
    keeps:  forward itself answers `at.keep` (its kernels do); others are walked token by token, which is slow and
            always right.
    trees:  forward itself answers `at.parents_BT`; others are run once for each line of a draft tree.
    """

    kind = "mixer"
    family = ""
    causal = True
    exact = True
    keeps = False
    trees = False

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        """Name -> spec of each state tensor of a row of at most `max_len` tokens; empty: remembers nothing."""
        return {}

    def after_step(self) -> None:
        """Called once after each optimizer step, on whole weights: what learns by another rule than a gradient."""

    def __call__(self, x_BTD: Tensor, at: Span, state: State | None = None, **inputs) -> tuple[Tensor, State | None]:
        if state is None:
            return super().__call__(x_BTD, at, None, **inputs)
        if not at.keep:
            y_BTD, after = super().__call__(x_BTD, at, state, **inputs)
            return y_BTD, flush(after)
        if not 0 < at.keep <= x_BTD.shape[1]:
            raise ValueError(f"keep={at.keep}: a call of {x_BTD.shape[1]} tokens can keep 1..{x_BTD.shape[1]}")
        if at.parents_BT is not None and not self.trees and state:
            return self._unfold(x_BTD, at, state, **inputs)
        if not self.keeps and state:
            return self._walk(x_BTD, at, state, **inputs)
        y_BTD, after = super().__call__(x_BTD, at, state, **inputs)
        fixed = self._fixed()
        return y_BTD, {n: Kept(v) if n in fixed and isinstance(v, Tensor) else v for n, v in flush(after).items()}

    def _unfold(self, x_BTD: Tensor, at: Span, state: State, **inputs) -> tuple[Tensor, State]:
        """The lines of the draft tree as rows of one call, which keeps all moments and writes nothing."""
        lines, before = at.paths, dict(at.shared)
        chain = at.along(lines)
        given = dict(chain.shared)
        y_RKD, after = self(lines.spread(x_BTD), chain, along(state, lines, self._fixed()), **inputs)
        for name, value in chain.shared.items():
            at.shared[name] = before[name] if value is given.get(name) else lines.gather(value)
        branched = {}
        for name, value in after.items():
            value = replace(value, paths=lines)
            branched[name] = replace(value, value=state[name]) if isinstance(value, Drafted) else value
        return lines.gather(y_RKD), branched

    def _fixed(self) -> set[str]:
        return {name for name, spec in self.state_spec(1).items() if not spec.every}

    def _walk(self, x_BTD: Tensor, at: Span, state: State, **inputs) -> tuple[Tensor, State]:
        """One call per token, stacking the fixed-size state before the last `keep` columns and after each."""
        fixed, tokens = self._fixed(), x_BTD.shape[1]
        outputs, moments, drafted = [], {name: [] for name in fixed}, []
        state = owned(state) if at.drafts else state
        for t in range(tokens + 1):
            if t >= tokens - at.keep:
                for name in fixed:
                    moments[name].append(state[name])
            if t < tokens:
                y_B1D, state = super().__call__(x_BTD[:, t : t + 1], at.column(t), state, **inputs)
                drafted.append({name: value for name, value in state.items() if isinstance(value, Drafted)})
                state = written(flush(state))  # guesses, too, are read by those that follow
                outputs.append(y_B1D)
        kept = {name: Kept(torch.stack(values, 1)) for name, values in moments.items()}
        grown = {name: Drafted.joined([step[name] for step in drafted]) for name in drafted[0]}
        return torch.cat(outputs, 1), {**state, **kept, **grown}


class Absent(Stateful):
    """`none` in a pattern: the layer has no such branch."""

    def __init__(self, config: Stateful.Config, place: Place) -> None:
        super().__init__()
