"""Cross attention: a decoder's tokens read an encoder's output, projected once into state of fixed size.

    y_t = W_o softmax_j(q_t . k_j / sqrt(K)) v_j over the encoder's tokens j;   k = W_k m, v = W_v m

arXiv 1706.03762. Without a state (training) the encoder's output comes up the stack as `at.shared["memory"]` and
`at.shared["memory_count"]`; with one, `remember` has filled the state. A row that remembers nothing reads zeros.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class CrossAttention(Stateful):
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """memory: tokens of the encoder's output that a row has room for."""

        heads: int = 4
        kv_heads: int = 4
        memory: int = 64

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        if place.dim % config.heads or config.heads % config.kv_heads:
            raise ValueError(
                f"cross attention: dim={place.dim} must be a multiple of heads={config.heads}, and that of "
                f"kv_heads={config.kv_heads}"
            )
        self.config, self.head_dim = config, place.dim // config.heads
        self.wq = nn.Linear(place.dim, config.heads * self.head_dim, bias=False)
        self.wkv = nn.Linear(place.dim, 2 * config.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * self.head_dim, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        entries = TensorSpec((self.config.memory, self.config.kv_heads, self.head_dim), self.wo.weight.dtype)
        return {"k": entries, "v": entries, "count": TensorSpec((), torch.int64)}

    def remember(self, memory_BSD: Tensor, count_B: Tensor) -> State:
        """The state of rows that read `memory_BSD`, of which the first `count_B` tokens of each row are real."""
        room = self.config.memory - memory_BSD.shape[1]
        if room < 0:
            raise ValueError(f"the encoder's output has {memory_BSD.shape[1]} tokens, memory={self.config.memory}")
        kv_BSD = F.pad(self.wkv(memory_BSD), (0, 0, 0, room))
        k_BSGK, v_BSGK = kv_BSD.unflatten(-1, (2 * self.config.kv_heads, self.head_dim)).chunk(2, 2)
        return {"k": k_BSGK, "v": v_BSGK, "count": count_B}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        memory = state
        if state is None and "memory" in at.shared:
            memory = self.remember(at.shared["memory"], at.shared["memory_count"])
        if memory is None:
            return torch.zeros_like(x_BTD), None
        q_BHTK = self.wq(x_BTD).unflatten(-1, (self.config.heads, self.head_dim)).transpose(1, 2)
        real_BS = torch.arange(self.config.memory, device=x_BTD.device) < memory["count"][:, None]
        empty_B1 = memory["count"][:, None] == 0
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            memory["k"].transpose(1, 2),
            memory["v"].transpose(1, 2),
            attn_mask=(real_BS | empty_B1)[:, None, None],  # a row of nothing but masked keys would be NaN
            enable_gqa=True,
        )
        y_BTD = self.wo(y_BHTK.transpose(1, 2).flatten(2)) * ~empty_B1[..., None]
        if state is None or not at.keep:
            return y_BTD, state
        return y_BTD, {name: value[:, None].expand(-1, at.keep + 1, *value.shape[1:]) for name, value in state.items()}
