"""A weight that is packed for decoding on a CPU, and a model whose linear layers hold such weights.

To a layer it is a tensor like any other: its shape, its dtype (that of activations), products with it, rows of it. What
is done to it besides these two sees it unpacked. So no layer knows, and a tied embedding stays one weight.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.packed_linear import BITS, Packed, packed_linear, unpack
from kernels.packed_linear import pack as pack_weight
from kernels.packed_linear import rows as packed_rows
from models.heads.lm import LM


class PackedWeight(Tensor):
    """Stands for a weight (F, D). `dtype`: of the activations, in which products and rows come out."""

    packed: Packed

    @staticmethod
    def __new__(cls, packed: Packed, dtype: torch.dtype) -> "PackedWeight":
        weight = Tensor._make_wrapper_subclass(
            cls, (packed.size, packed.dim), dtype=dtype, device=packed.weight.device, requires_grad=False
        )
        weight.packed = packed
        return weight

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        """A weight with memory of its own; torch would look for a storage, which there is none of."""
        weight = PackedWeight(deepcopy(self.packed, memo), self.dtype)
        memo[id(self)] = nn.Parameter(weight, requires_grad=False) if isinstance(self, nn.Parameter) else weight
        return memo[id(self)]

    def __repr__(self, **options: object) -> str:
        return f"PackedWeight({tuple(self.shape)}, {self.packed.bits} bits, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and _packed(args, 1) and not kwargs:
            bias = args[2] if len(args) > 2 else None
            return packed_linear(args[0], args[1].packed, None if bias is None else bias.float())
        if func is F.embedding and _packed(args, 1):
            return packed_rows(args[1].packed, args[0], args[1].dtype)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # a Parameter is made of one
            return PackedWeight(args[0].packed, args[0].dtype)
        args, kwargs = torch.utils._pytree.tree_map_only(
            PackedWeight, lambda weight: unpack(weight.packed, weight.dtype), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        scales = self.packed.scales_PGN
        return self.packed.weight.nbytes + (0 if scales is None else scales.nbytes)


def _packed(args: tuple, place: int) -> bool:
    return len(args) > place and isinstance(args[place], PackedWeight)


@torch.no_grad()
def pack(model: nn.Module, weights: str) -> nn.Module:
    """`model`, in place, with the weights of its linear layers and of its head packed as `weights`.

    weights: fp32, bf16, int8 or int4. All its floating numbers become float32 for fp32 and bfloat16 for bf16; with int8
    and int4 they stay what they are, and linear weights are rounded to the nearest. A tied embedding is packed with the
    head. Weights
    of fewer than 16 rows or columns stay as they are. The unpacked weights are freed.
    ValueError for other names, and for a model that is not on a CPU.
    """
    if weights not in BITS:
        raise ValueError(f"weights={weights!r}: choose {', '.join(BITS)}")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ValueError(f"weights={weights!r}: weights are packed for CPUs; move the model there first")
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weights)
    if wanted is not None:
        model.to(wanted)
    kept = list(model.parameters())  # so that no other tensor gets the id of one that is replaced
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, LM)) and min(module.weight.shape) >= 16:
            done.setdefault(id(module.weight), _held(module.weight, weights))
    for module in model.modules():
        if isinstance(module, (nn.Linear, LM, nn.Embedding)) and id(module.weight) in done:
            module.weight = done[id(module.weight)]
    del kept
    return model


def _held(weight: Tensor, weights: str) -> nn.Parameter:
    return nn.Parameter(PackedWeight(pack_weight(weight, weights), weight.dtype), requires_grad=False)
