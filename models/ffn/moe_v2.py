"""Mixture of experts without a balance loss: a bias on the choice alone evens the load, beside a shared expert.

    s = sigmoid(W_r x);  y = scale sum_{e in top-k of s + b} s_e / (sum of the k) E_e(x) + shared(x)
    after a step: b_e += rate * sign(mean load - load_e)

arXiv 2412.19437 (DeepSeek-V3), 2408.15664 (the bias), 2401.06066 (shared experts). b never weighs an output and has no
gradient. With choice=expert each expert takes the tokens that score highest for it, as many as its share of a row
(2202.09368): that is a rule of training, which sees whole rows; in eval and with a state tokens choose. Options cover
its relatives: a gate on the shared expert (Qwen3-Next), weights on the experts' input (Llama 4), experts in a narrower
space (Nemotron-H).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import at_least
from models.ffn.moe import MoE
from models.layers.choice import Choice
from models.layers.experts import Dense, Experts
from models.layers.routing import Few, balance, load, wide
from models.span import Span
from models.state import State
from models.stateful import Place


class MoEV2(MoE):
    @dataclass(frozen=True)
    class Config(MoE.Config):
        """shared: units of the expert every token passes, 0: none. shared_gate: its output times sigmoid(w . x).

        score: of a logit. groups: experts fall into so many, of which a token's best_groups count, by the sum of their
        two best. scale: of the routed experts' sum. weigh: whether weights go to what experts read or to what they
        give. latent: width of what experts read and write, 0: dim. choice: who chooses in training. rate: of the bias,
        while tokens choose.
        """

        balance: float = 0.0
        shared: int = 64
        shared_gate: bool = False
        score: Literal["sigmoid", "softmax"] = "sigmoid"
        groups: int = 1
        best_groups: int = 1
        scale: float = 1.0
        weigh: Literal["output", "input"] = "output"
        latent: int = 0
        choice: Literal["token", "expert"] = "token"
        rate: float = 0.001

        @classmethod
        def tiny(cls) -> "MoEV2.Config":
            return cls(groups=2)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, groups=1, best_groups=1)
        c = config
        if c.experts % c.groups or c.best_groups > c.groups:
            raise ValueError(f"moe_v2: groups={c.groups} must divide experts={c.experts}, best_groups be at most that")
        if c.active > c.best_groups * (c.experts // c.groups):
            raise ValueError(f"moe_v2: active={c.active} experts must fit into best_groups={c.best_groups}")
        hidden = self.experts.wo.shape[1]
        if c.latent:
            self.experts = Experts(c.latent, hidden, c.experts, c.activation, 0)
            self.into = nn.Linear(place.dim, c.latent, bias=False)
            self.wo = nn.Linear(c.latent, place.dim, bias=False)
        if c.shared:
            self.shared = Dense(place.dim, c.shared, c.activation)
        if c.shared_gate:
            if not c.shared:
                raise ValueError("moe_v2: shared_gate needs a shared expert, shared=units")
            self.shared_gate = nn.Linear(place.dim, 1, bias=False)
        if c.groups > c.best_groups:
            self.group_choice = Few()
        if c.choice == "expert":
            self.token_choice = Choice()
        self.register_buffer("bias", torch.zeros(c.experts))
        self.register_buffer("load", torch.zeros(c.experts), persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "MoEV2":
        """Low precision is not for the bias: its steps would be lost, and with them the balance."""
        bias, load_E = self.bias, self.load
        super()._apply(fn, recurse)
        if self.bias.dtype != bias.dtype:
            self.bias, self.load = bias.to(self.bias.device), load_E.to(self.bias.device)
        return self

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        training = self.training and state is None
        logits_BTE = wide(self.router, x_BTD)
        scores_BTE = logits_BTE.sigmoid() if c.score == "sigmoid" else logits_BTE.softmax(-1)
        e_BTD = self.into(x_BTD) if c.latent else x_BTD
        if training and c.choice == "expert":
            y_BTD, load_E = self._experts_choose(e_BTD, scores_BTE, at)
        else:
            chosen_BTk = self.choice(self._open(scores_BTE.detach() + self.bias), c.active)
            load_E = load(chosen_BTk, c.experts, at.valid_BT) if training else None
            weights_BTk = self.weights(scores_BTE, chosen_BTk) * c.scale
            y_BTD = self.experts(
                e_BTD.flatten(0, 1),
                chosen_BTk.flatten(0, 1),
                weights_BTk.flatten(0, 1),
                weigh_input=c.weigh == "input",
            ).view_as(e_BTD)
        if training:
            if c.choice == "token":
                self.load += load_E
            balance(scores_BTE / scores_BTE.sum(-1, keepdim=True), load_E, at, c.balance)
        y_BTD = self.wo(y_BTD) if c.latent else y_BTD
        if c.shared:
            shared_BTD = self.shared(x_BTD)
            y_BTD = y_BTD + (self.shared_gate(x_BTD).sigmoid() * shared_BTD if c.shared_gate else shared_BTD)
        return y_BTD, state

    def _open(self, scores_BTE: Tensor) -> Tensor:
        """The scores, lowest where an expert is not in one of the best groups."""
        c = self.config
        if c.best_groups == c.groups:
            return scores_BTE
        scores_BTGE = scores_BTE.unflatten(-1, (c.groups, -1))
        best_BTG = scores_BTGE.topk(min(2, scores_BTGE.shape[-1]), -1).values.sum(-1)
        open_BTG = torch.zeros_like(best_BTG, dtype=torch.bool)
        open_BTG = open_BTG.scatter(-1, self.group_choice(best_BTG, c.best_groups), True)
        return scores_BTGE.masked_fill(~open_BTG[..., None], torch.finfo(scores_BTE.dtype).min).flatten(-2)

    def _experts_choose(self, x_BTD: Tensor, scores_BTE: Tensor, at: Span) -> tuple[Tensor, Tensor]:
        """Output, and the load of each expert; each takes ceil(T active / experts) tokens of each row."""
        c = self.config
        rows, tokens = x_BTD.shape[:2]
        lowest = torch.finfo(scores_BTE.dtype).min
        wanted_BTE = self._open(scores_BTE.detach())
        if at.valid_BT is not None:
            wanted_BTE = wanted_BTE.masked_fill(~at.valid_BT[..., None], lowest)
        wanted_BET = wanted_BTE.transpose(1, 2)
        room = -(-tokens * c.active // c.experts)
        chosen_BEC = self.token_choice(wanted_BET, room)
        taken_BET = torch.zeros_like(wanted_BET, dtype=torch.bool).scatter(2, chosen_BEC, True) & (wanted_BET > lowest)
        scores_BET = scores_BTE.transpose(1, 2)
        weights_BET = scores_BET * taken_BET
        if c.normalize:
            weights_BET = weights_BET / (weights_BET.sum(1, keepdim=True) + 1e-20)
        real = taken_BET.shape[::2].numel() if at.valid_BT is None else at.valid_BT.sum().clamp(min=1)
        at.log(dropped=1 - taken_BET.any(1).sum() / real)
        weights_M1 = (weights_BET.gather(2, chosen_BEC) * c.scale).transpose(0, 1).flatten()[:, None]
        first_B11 = tokens * torch.arange(rows, device=x_BTD.device)[:, None, None]
        token_M = (chosen_BEC + first_B11).transpose(0, 1).flatten()  # by expert, as products wants them
        x_ND = x_BTD.flatten(0, 1)
        x_MD = x_ND[token_M]
        if c.weigh == "input":
            x_MD, weights_M1 = (x_MD * weights_M1).to(x_BTD.dtype), (weights_M1 != 0).to(weights_M1.dtype)
        y_MD = self.experts.products(x_MD, torch.full_like(self.load, rows * room, dtype=torch.int64))
        y_ND = torch.zeros_like(x_ND, dtype=weights_M1.dtype).index_add(0, token_M, y_MD * weights_M1)
        return y_ND.to(x_BTD.dtype).view_as(x_BTD), taken_BET.sum((0, 2), dtype=torch.float32)

    def after_step(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.load)
        self.bias += self.config.rate * (self.load.mean() - self.load).sign()
        self.load.zero_()
