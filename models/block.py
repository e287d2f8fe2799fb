"""One layer of a decoder: a mixer over time and an ffn over channels, each in its own residual branch.

x = x + mixer(norm(x));  x = x + ffn(norm(x))
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.config import parse_pattern
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State, TensorSpec, prefixed, scope
from models.stateful import Place, Stateful


class Block(Stateful):
    """Pre-norm residual block around any mixer and any ffn."""

    kind = "block"
    keeps = True  # its parts do
    branches = ("mixer", "ffn")  # in order; each is a part, with a norm before it

    def __init__(self, mixer: Stateful, ffn: Stateful, dim: int, eps: float) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(dim, eps), mixer
        self.ffn_norm, self.ffn = RMSNorm(dim, eps), ffn

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        specs = {name: getattr(self, name).state_spec(max_len) for name in self.branches}
        return {key: spec for name, part in specs.items() for key, spec in prefixed(name, part).items()}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        after = {}
        for name in self.branches:
            y_BTD, part = getattr(self, name)(getattr(self, f"{name}_norm")(x_BTD), at, scope(state, name))
            x_BTD = x_BTD + y_BTD
            after |= prefixed(name, part or {})
        return x_BTD, None if state is None else after


def tile(pattern: str, ffn: str, dim: int, layers: int, vocab: int) -> Iterator[tuple[Stateful, Stateful, Place]]:
    """The mixer and the ffn of each layer, freshly built, and where they stand: patterns repeat over the depth."""
    mixers, ffns = parse_pattern(pattern, "mixer"), parse_pattern(ffn, "ffn")
    for layer in range(layers):
        place = Place(dim, layer, layers, vocab)
        (mixer, mixer_config), (inner, ffn_config) = mixers[layer % len(mixers)], ffns[layer % len(ffns)]
        yield mixer(mixer_config, place), inner(ffn_config, place), place


@torch.no_grad()
def draw_linears(stack: nn.Module, layers: int) -> None:
    """Draw every linear weight from N(0, 1/fan_in), over the residual branches where it writes to the stream (`wo`).

    Biases become zero; a weight that a part has set to zero stays so.
    """
    for name, module in stack.named_modules():
        if isinstance(module, nn.Linear) and module.weight.any():
            branches = 2 * layers if name.endswith("wo") else 1
            nn.init.normal_(module.weight, std=(module.in_features * branches) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
