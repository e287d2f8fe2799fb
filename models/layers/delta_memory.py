"""A matrix memory under the gated delta rule, behind a short convolution: what gated_deltanet and kda share.

Kernels keep both, so documents, padding, chunks and rollback are their business; a mixer says what is projected, how it
decays and what gates the output.
"""

import torch
from torch import Tensor, nn

import kernels
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class DeltaMemory(Stateful):
    """Adds `conv` over `width` channels with `taps`, `norm` of a head's values and `wo`; `size` is (H, K, V)."""

    family = "attention"
    keeps = True

    def remember_in(self, size: tuple[int, int, int], width: int, taps: int, place: Place) -> None:
        """Makes the parts, once the subclass knows their sizes."""
        self.size = size
        self.conv = nn.Parameter(torch.empty(width, taps).uniform_(-1, 1) * taps**-0.5)
        self.norm = RMSNorm(size[2], place.eps)
        self.wo = nn.Linear(size[0] * size[2], place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        width, taps = self.conv.shape
        return {
            "conv": TensorSpec((taps - 1, width), self.wo.weight.dtype),
            "matrix": TensorSpec(self.size, torch.float32),
        }

    def convolved(self, qkv_BTD: Tensor, at: Span, state: State | None) -> tuple[Tensor, Tensor]:
        """silu of the causal convolution of q, k and v together, (B, T, width); and its tail."""
        tail = None if state is None else state["conv"]
        options = {"state_BWD": tail, "segments_BT": at.segments_BT, "keep": at.keep}
        return kernels.conv1d(qkv_BTD, self.conv, activation="silu", **options)

    def corrected(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        decay: Tensor,
        write_BTH: Tensor,
        at: Span,
        state: State | None,
    ) -> tuple[Tensor, Tensor]:
        """What the memory answers (B, T, H, V), and the memory after. q, k: of length one; decay: log, by head or by
        channel; write: how much of the error is taken in."""
        matrix = None if state is None else state["matrix"]
        options = {"state_BHKV": matrix, "segments_BT": at.segments_BT, "keep": at.keep}
        return kernels.gated_delta(q_BTHK, k_BTHK, v_BTHV, decay, write_BTH, **options)

    def told(self, y_BTHV: Tensor, gate_BTHV: Tensor, dtype: torch.dtype) -> Tensor:
        """The answer, normed by head and gated (fp32), as it goes to the stream: (B, T, D)."""
        return self.wo((self.norm(y_BTHV).float() * gate_BTHV).to(dtype).flatten(2))
