"""One policy for RLlib over any registered mixer and ffn: its state comes from `state_spec`, no architecture by name.

Observations are embedded, pass a stack of `models.block.Block`, and two heads read the policy and the value. The same
`forward` samples (T = 1) and trains (fragments of `max_seq_len` steps that begin at a stored state), so both compute
the same logits. An episode has no end that is known in advance, so growing state is bounded by `context`: mixers with a
`window` see the last `context` steps; what grows and has none, or a longer one, begins afresh every `context` steps.
"""

import dataclasses
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from models.config import make_config as make_part
from models.config import parse_decoder
from models.layers import norm
from models.span import Span
from models.stack import Stack, draw_linears
from models.state import State, TensorSpec


@dataclasses.dataclass(frozen=True)
class Config:
    """What `model_config` holds.

    model:        a decoder architecture whose layers are used, with its options: `hybrid`, `mor(steps=2)`.
    pattern, ffn: parts tiled over `layers`, as in a decoder; empty: the model's own.
    context:      steps that growing state reaches back.
    max_seq_len:  steps of a training fragment, through which gradients flow; the name is RLlib's.
    """

    model: str = "decoder(pattern=gated_deltanet)"
    pattern: str = ""
    ffn: str = ""
    dim: int = 64
    layers: int = 1
    context: int = 64
    max_seq_len: int = 32

    def __post_init__(self) -> None:
        for field in ("dim", "layers", "context", "max_seq_len"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")


class Policy(TorchRLModule, ValueFunctionAPI):
    """model_config: the fields of `Config` as a dict. Observations: Box or Discrete. Actions: what RLlib knows."""

    def setup(self) -> None:
        given = {name: value for name, value in self.model_config.items() if name != "vf_share_layers"}  # PPO adds it
        config = self.settings = make_config(given)
        self.encoder, vocab = _encoder(self.observation_space, config.dim)
        self.blocks = stack(config, vocab)
        self.norm = norm.make("rms", config.dim, 1e-6)
        outputs = self.get_inference_action_dist_cls().required_input_dim(self.action_space)
        self.policy, self.value = nn.Linear(config.dim, outputs), nn.Linear(config.dim, 1)
        self._init_weights()
        self._spec = {"length": TensorSpec((), torch.int64)} | self.blocks.state_spec(config.context)
        self._restarts = any(_outgrown(spec, config.context) for spec in self._spec.values())
        self._initial = {name: spec.empty(1, config.context)[0].numpy() for name, spec in self._spec.items()}

    @torch.no_grad()
    def _init_weights(self) -> None:
        """As a decoder's: N(0, 1/fan_in), smaller where it writes to the stream; an almost uniform first policy."""
        draw_linears(self.blocks, len(self.blocks))
        nn.init.orthogonal_(self.policy.weight, 0.01)
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.policy.bias)
        nn.init.zeros_(self.value.bias)

    # -- state ---------------------------------------------------------------------------------------------------

    def is_stateful(self) -> bool:
        return True

    def get_initial_state(self) -> dict[str, np.ndarray]:
        """State of one row before its first step: name -> array without a row dimension. Do not write into it."""
        return self._initial

    def init_state(self, rows: int) -> State:
        """The same for `rows` rows, as tensors."""
        return {name: spec.empty(rows, self.settings.context) for name, spec in self._spec.items()}

    def step(self, obs_BT: Tensor, state: State) -> tuple[Tensor, State]:
        """Features (B, T, D) and the state after. obs: (B, T, *shape) floats, or (B, T) int64 when Discrete.

        Padding comes last in a row, where a causal stack lets it disturb nothing, so it needs no mask. A mask would
        even be wrong: RLlib's LOSS_MASK also leaves out the step whose value GAE bootstraps from.
        """
        at = self._span(obs_BT, state["length"])
        x_BTD = self.encoder(obs_BT if at.ids_BT is not None else obs_BT.flatten(2).float())
        x_BTD, after = self.blocks(x_BTD, at, {name: value for name, value in state.items() if name != "length"})
        return self.norm(x_BTD), {"length": at.positions_BT[:, -1] + 1} | after

    def _span(self, obs_BT: Tensor, length_B: Tensor) -> Span:
        ids_BT = obs_BT if isinstance(self.encoder, nn.Embedding) else None
        positions_BT = length_B[:, None] + torch.arange(obs_BT.shape[1], device=obs_BT.device)
        if not self._restarts:
            return Span(positions_BT, ids_BT, None, length_B)
        context = self.settings.context
        return Span(positions_BT % context, ids_BT, positions_BT // context, length_B)

    # -- what RLlib calls ----------------------------------------------------------------------------------------

    def _forward(self, batch: dict[str, Any], **kwargs) -> dict[str, Any]:
        x_BTD, state = self.step(batch[Columns.OBS], batch[Columns.STATE_IN])
        return {Columns.ACTION_DIST_INPUTS: self.policy(x_BTD), Columns.STATE_OUT: state}

    def _forward_train(self, batch: dict[str, Any], **kwargs) -> dict[str, Any]:
        x_BTD, _ = self.step(batch[Columns.OBS], batch[Columns.STATE_IN])
        return {Columns.ACTION_DIST_INPUTS: self.policy(x_BTD), Columns.EMBEDDINGS: x_BTD}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Values (B, T). embeddings: those of `_forward_train`, which are computed anew when missing."""
        if embeddings is None:
            embeddings, _ = self.step(batch[Columns.OBS], batch[Columns.STATE_IN])
        return self.value(embeddings).squeeze(-1)

    def forward_exploration(self, batch: dict[str, Any], **kwargs) -> dict[str, Any]:
        if self.training:  # walking all submodules to set a flag that is set costs as much as a layer
            self.eval()
        with torch.inference_mode():
            return self._forward(batch)

    forward_inference = forward_exploration


def make_config(options: dict[str, Any]) -> Config:
    """`Config(**options)`; ValueError lists the known options for an unknown one."""
    known = [field.name for field in dataclasses.fields(Config)]
    for name in options:
        if name not in known:
            raise ValueError(f"model_config has no option {name!r}; its options: {', '.join(known)}")
    return Config(**options)


def _encoder(space: gym.Space, dim: int) -> tuple[nn.Module, int]:
    """From observations to the width of the stack, and the number of token classes (0: observations are no tokens)."""
    if isinstance(space, gym.spaces.Discrete):
        return nn.Embedding(int(space.n), dim), int(space.n)
    if isinstance(space, gym.spaces.Box):
        return nn.Sequential(nn.Linear(int(np.prod(space.shape)), dim), nn.Tanh(), nn.Linear(dim, dim)), 0
    raise ValueError(f"observation space {space}: must be Box or Discrete; add RLlib's FlattenObservations connector")


def stack(config: Config, vocab: int = 0) -> Stack:
    """The layers of a policy; ValueError, one line, for an architecture, pattern or width that cannot be built."""
    cls, options = parse_decoder(config.model)
    if cls.needs_memory:
        raise ValueError(f"model {config.model!r}: reads an encoder's output, which a policy has not; choose another")
    given = {name: value for name in ("pattern", "ffn") if (value := getattr(config, name))}
    sizes = {"dim": config.dim, "layers": config.layers, "vocab": vocab}
    tiny = vars(cls.Config.tiny())
    layers = cls.stack(make_part(cls, {**tiny, **options, **given, **sizes}), adapt=partial(_bounded, config.context))
    if not layers.causal:
        named = f"model={config.model!r}, pattern={config.pattern!r}, ffn={config.ffn!r}"
        raise ValueError(f"{named}: a policy needs causal parts, one of these sees the future")
    return layers


def _outgrown(spec: TensorSpec, context: int) -> bool:
    """Whether growing state of `context` steps is too small for an episode: it has no window, or a longer one."""
    return spec.every > 0 and (not spec.window or spec.capacity(context) < spec.window)


def _bounded(context: int, mixer: Any) -> Any:
    """A mixer's config, seeing `context` steps where it could see all."""
    return dataclasses.replace(mixer, window=context) if getattr(mixer, "window", None) == 0 else mixer
