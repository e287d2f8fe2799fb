"""One layer of a stack: its branches, a mixer over time and an ffn over channels, joined by a residual scheme.

A scheme is a file of models/blocks/. A branch whose part is `none` is not there at all, with its norms.
"""

from torch import Tensor

from models.span import Span
from models.state import State, TensorSpec, prefixed, scope
from models.stateful import Place, Stateful


class Block(Stateful):
    """Built as `Scheme(config, branches, place)`; branches: name -> part, in order, which become submodules.

    alone: between such blocks the stream is not (B, T, dim), so other schemes cannot stand beside them.
    """

    kind = "block"
    family = "transformer"
    keeps = trees = True  # its parts do
    alone = False

    def __init__(self, config: Stateful.Config, branches: dict[str, Stateful], place: Place) -> None:
        super().__init__()
        self.config, self.place, self.branches = config, place, tuple(branches)
        for name, part in branches.items():
            self.add_module(name, part)

    @property
    def causal(self) -> bool:
        """Whether all its parts are."""
        return all(getattr(self, name).causal for name in self.branches)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        specs = {name: getattr(self, name).state_spec(max_len) for name in self.branches}
        return {key: spec for name, part in specs.items() for key, spec in prefixed(name, part).items()}

    def run(self, name: str, x_BTD: Tensor, at: Span, state: State | None, after: State) -> Tensor:
        """The output of one branch; what it remembers goes into `after`."""
        y_BTD, part = getattr(self, name)(x_BTD, at, scope(state, name))
        after |= prefixed(name, part or {})
        return y_BTD
