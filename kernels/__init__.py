"""Maths on tensors: each op has a definition, a form for CPUs and one for GPUs, behind one public function.

The functions have the names of their folders, so `kernels.attention` is the function; its module is reached by
`from kernels.attention import View`.
"""

from kernels.attention import View, attention
from kernels.block_sparse_attention import block_sparse_attention
from kernels.conv1d import conv1d
from kernels.diagonal_scan import diagonal_scan
from kernels.entmax import entmax
from kernels.fp8_matmul import fp8_matmul
from kernels.gated_delta import gated_delta
from kernels.generalized_delta import generalized_delta
from kernels.grouped_matmul import grouped_matmul
from kernels.linear_attention import linear_attention
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.log_scan import log_scan
from kernels.long_conv import long_conv
from kernels.nearest_code import nearest_code, residual_codes
from kernels.newton_scan import para_gru, para_lstm
from kernels.norm import layer_norm, rms_norm
from kernels.quantized_matmul import quantize, quantized_matmul
from kernels.ring import ring_attention, ring_recurrence
from kernels.rnn import elman, gru, indrnn, lstm, min_gru, min_lstm, slstm
from kernels.rope import rope, rope_angles
from kernels.routing import dispatch, route
from kernels.segment_reduce import segment_reduce
from kernels.selective_scan import selective_scan
from kernels.softpick import softpick
from kernels.swiglu import swiglu
from kernels.wkv4 import wkv4

__all__ = [
    "View",
    "attention",
    "block_sparse_attention",
    "conv1d",
    "diagonal_scan",
    "dispatch",
    "elman",
    "entmax",
    "fp8_matmul",
    "gated_delta",
    "generalized_delta",
    "grouped_matmul",
    "gru",
    "indrnn",
    "layer_norm",
    "linear_attention",
    "linear_cross_entropy",
    "log_scan",
    "long_conv",
    "lstm",
    "min_gru",
    "min_lstm",
    "nearest_code",
    "para_gru",
    "para_lstm",
    "quantize",
    "quantized_matmul",
    "residual_codes",
    "ring_attention",
    "ring_recurrence",
    "rms_norm",
    "rope",
    "rope_angles",
    "route",
    "segment_reduce",
    "selective_scan",
    "slstm",
    "softpick",
    "swiglu",
    "wkv4",
]
