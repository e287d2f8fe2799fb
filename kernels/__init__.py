"""Maths on tensors: each op has a definition, a form for CPUs and later one for GPUs, behind one public function.

The functions have the names of their folders, so `kernels.attention` is the function; its module is reached by
`from kernels.attention import View`.
"""

from kernels.attention import View, attention
from kernels.conv1d import conv1d
from kernels.gated_delta import gated_delta
from kernels.generalized_delta import generalized_delta
from kernels.linear_attention import linear_attention
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.lstm import lstm
from kernels.norm import layer_norm, rms_norm

__all__ = [
    "View",
    "attention",
    "conv1d",
    "gated_delta",
    "generalized_delta",
    "layer_norm",
    "linear_attention",
    "linear_cross_entropy",
    "lstm",
    "rms_norm",
]
