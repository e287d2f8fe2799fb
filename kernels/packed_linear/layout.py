"""How a linear weight lies in memory so that decoding reads it once, from front to back; `kernels/cpu/linear.cpp` does.

A panel is 16 rows of the weight, all of D, in the order of one tile or vector after the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import check, cpu
from kernels.quantized_matmul.quantize import quantize

WIDE = 16  # rows of a panel
GROUP = 64  # numbers of a row that share a scale, in 8 and 4 bits
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
_DEPTH = {32: 1, 16: 32, 8: GROUP, 4: GROUP}  # columns are filled up with zeros to a multiple


@dataclass(frozen=True)
class Packed:
    """A weight (F, D). weight: panels, as in linear.cpp. scales_PGN: of each group, (P, G, 16) bf16; None above."""

    weight: Tensor
    scales_PGN: Tensor | None
    size: int
    dim: int
    bits: int


def pack(weight_FD: Tensor, weights: str) -> Packed:
    """The weight as `weights`: fp32, bf16, or rounded to int8 or int4, a scale for each 64 numbers of a row.

    Raises ValueError or TypeError naming the argument.
    """
    check.shape("pack", "weight_FD", weight_FD, (None, None), "(F, D)")
    check.floating("pack", "weight_FD", weight_FD)
    if weights not in BITS:
        raise ValueError(f"weights={weights!r}: choose {', '.join(BITS)}")
    bits, (size, dim) = BITS[weights], weight_FD.shape
    filled = pad(weight_FD.detach(), (0, -dim % _DEPTH[bits], 0, -size % WIDE))
    if bits > 8:
        filled = filled.to(torch.float32 if bits == 32 else torch.bfloat16)
        depth = 2 if bits == 16 else 1  # bf16: pairs of columns side by side
        panels = filled.view(-1, WIDE, filled.shape[1] // depth, depth).transpose(1, 2)
        return Packed(_lines(panels.contiguous(), bits), None, size, dim, bits)
    # bf16 scales are rounded before the numbers are chosen, so that the numbers make up for it.
    packed, scales, _ = quantize(filled.bfloat16() if bits == 8 else filled.to(torch.bfloat16), bits=bits, group=GROUP)
    if bits == 8:
        numbers = (packed.to(torch.int16) + 128).to(torch.uint8)
    else:
        numbers = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    quads = numbers.view(-1, WIDE, numbers.shape[1] // GROUP, 16, 4).permute(0, 2, 3, 1, 4)  # P G 16 N 4
    if bits == 4:
        quads = quads[:, :, :8] | quads[:, :, 8:] << 4
    scales_PGN = scales.view(-1, WIDE, scales.shape[1]).transpose(1, 2).contiguous()
    return Packed(quads.contiguous(), scales_PGN, size, dim, bits)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight (F, D) that is held, in `dtype`: what `packed_linear` multiplies with."""
    weight = packed.weight
    if packed.bits == 32:
        whole = weight.transpose(1, 2).flatten(0, 1)
    elif packed.bits == 16:
        whole = weight.flatten(1, 2).transpose(1, 2).flatten(2).flatten(0, 1)
    else:
        zero = 128 if packed.bits == 8 else 8
        quads = weight if packed.bits == 8 else torch.cat([weight & 15, weight >> 4], 2)
        wide = torch.promote_types(dtype, torch.float32)
        numbers = quads.permute(0, 3, 1, 2, 4).flatten(3).to(wide) - zero  # P N G 64
        whole = (numbers * packed.scales_PGN.transpose(1, 2)[..., None].to(wide)).flatten(2).flatten(0, 1)
    return whole[: packed.size, : packed.dim].to(dtype)


def rows(packed: Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (...) int64 of the weight, (..., D) in `dtype`: an embedding."""
    found = _picked(packed.weight, ids)
    if packed.bits <= 8:
        wide = torch.promote_types(dtype, torch.float32)
        quads = found.unflatten(-1, (-1, 8 * packed.bits))  # (..., G, 64 or 32)
        if packed.bits == 4:
            quads = torch.cat([quads & 15, quads >> 4], -1)
        scales = packed.scales_PGN[ids // WIDE, :, ids % WIDE]
        found = ((quads.to(wide) - (128 if packed.bits == 8 else 8)) * scales[..., None].to(wide)).flatten(-2)
    return found[..., : packed.dim].to(dtype)


def _picked(weight: Tensor, ids: Tensor) -> Tensor:
    """What lies in the rows `ids` of panels, (..., numbers), in the weight's dtype: four bytes of every 64."""
    fours = weight.view(torch.int32).flatten(1).unflatten(1, (-1, WIDE))
    if cpu.serves() and weight.is_cpu:
        found = torch.ops.edifice_cpu.picked(fours, ids).view(*ids.shape, -1)
    else:
        found = fours[ids // WIDE, :, ids % WIDE]
    return found.view(weight.dtype)


def _lines(panels: Tensor, bits: int) -> Tensor:
    """(P, D / depth, 16, depth) as its shape is told: fp32 (P, D, 16), bf16 (P, D / 32, 16, 16, 2)."""
    return panels[..., 0].contiguous() if bits == 32 else panels.unflatten(1, (-1, WIDE))
