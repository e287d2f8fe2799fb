"""The layers of an architecture: blocks of any mixers and ffns, tiled over the depth. Decoders, encoders and policies
are such a stack between an embedding and a head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.config import parse_pattern
from models.layers.norm import Norm
from models.recompute import recomputed
from models.span import Span
from models.state import State, TensorSpec, prefixed, scope
from models.stateful import Absent, Place, Stateful

Branches = Callable[[Place], dict[str, Stateful]]


class Layers(nn.ModuleList):
    """Blocks that run one after the other, with their state under their numbers."""

    recompute = False  # set by a training job: blocks keep their inputs alone (activation checkpointing)

    @property
    def causal(self) -> bool:
        """Whether every block is."""
        return all(block.causal for block in self)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        """The blocks' state, prefixed with their layers."""
        spec = {}
        for layer, block in enumerate(self):
            spec |= prefixed(str(layer), block.state_spec(max_len))
        return spec

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        """x (B, T, D) through every block, and the state after (None when none was given)."""
        after = None if state is None else {}
        for layer, block in enumerate(self):
            if self.recompute and state is None and torch.is_grad_enabled():
                x_BTD = recomputed(block, x_BTD, at)
                continue
            x_BTD, part = block(x_BTD, at, scope(state, str(layer)))
            if after is not None:
                after |= prefixed(str(layer), part)
        return x_BTD, after


class Stack(Layers):
    """`layers` blocks of width `dim`; state names are prefixed with the layer.

    pattern, ffn, block: patterns of mixers, ffns and residual schemes; each repeats over the depth.
    norm, eps: of the blocks' norms. vocab: token classes, for parts that look tokens up.
    extra: branches of each layer between its mixer and its ffn.
    adapt: what becomes of a mixer's config before it is built.
    """

    def __init__(
        self,
        pattern: str,
        ffn: str,
        block: str,
        dim: int,
        layers: int,
        vocab: int = 0,
        norm: Norm = "rms",
        eps: float = 1e-6,
        extra: Branches | None = None,
        adapt: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        mixers, ffns = parse_pattern(pattern, "mixer"), parse_pattern(ffn, "ffn")
        schemes = parse_pattern(block, "block")
        if len(set(schemes)) > 1 and any(scheme.alone for scheme, _ in schemes):
            raise ValueError(f"block={block!r}: a scheme of several streams cannot stand beside another")
        for layer in range(layers):
            place = Place(dim, layer, layers, vocab, norm, eps)
            (mixer, mixer_config), (inner, ffn_config) = mixers[layer % len(mixers)], ffns[layer % len(ffns)]
            parts = {
                "mixer": mixer(adapt(mixer_config) if adapt else mixer_config, place),
                **(extra(place) if extra else {}),
                "ffn": inner(ffn_config, place),
            }
            scheme, scheme_config = schemes[layer % len(schemes)]
            branches = {name: part for name, part in parts.items() if not isinstance(part, Absent)}
            if not branches:
                raise ValueError(f"layer {layer} has neither a mixer nor an ffn: pattern {pattern!r}, ffn {ffn!r}")
            self.append(scheme(scheme_config, branches, place))


@torch.no_grad()
def draw_linears(module: nn.Module, layers: int) -> None:
    """Draw every linear weight from N(0, 1/fan_in), over the residual branches where it writes to the stream (`wo`).

    Biases become zero; a weight that a part has set to zero stays so.
    """
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear) and linear.weight.any():
            branches = 2 * layers if name.endswith("wo") else 1
            nn.init.normal_(linear.weight, std=(linear.in_features * branches) ** -0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
