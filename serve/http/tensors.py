"""Tensors in JSON: nested lists, or {"base64": little-endian bytes, "shape": [...], "dtype": "float32"}.

A row may be sent either way; what is wrong with one is told in a line that begins with its name.
"""

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.model import Batch, Input

Dtype = Literal["float16", "float32", "float64", "uint8", "int32", "int64"]
_WIRE = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "uint8": "u1", "int32": "<i4", "int64": "<i8"}


class Encoded(BaseModel):
    """A tensor as base64 of its little-endian bytes, row by row."""

    model_config = ConfigDict(extra="forbid", strict=True)

    base64: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=16)]
    dtype: Dtype


def read(name: str, given: Any, wanted: Input) -> Tensor:
    """The tensor that was sent as `name`, with its dimension of rows. ValueError in one line when it is no such one."""
    tensor = _decode(name, given) if isinstance(given, Encoded) else _nested(name, given)
    if tensor.is_floating_point():
        if not wanted.dtype.is_floating_point:
            raise ValueError(f"{name}: must be whole numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: must be finite numbers")
    shape = tuple(tensor.shape)
    fits = len(shape) == 1 + len(wanted.shape) and all(w in (None, size) for size, w in zip(shape[1:], wanted.shape))
    if not fits or not tensor.numel():
        sizes = ", ".join("any" if size is None else str(size) for size in ("rows", *wanted.shape))
        raise ValueError(f"{name}: has shape {list(shape)}, expected [{sizes}], none of them 0")
    if not wanted.dtype.is_floating_point:
        low, high = int(tensor.min()), int(tensor.max())
        least, most = wanted.least, wanted.most
        if (least is not None and low < least) or (most is not None and high > most):
            raise ValueError(f"{name}: has numbers from {low} to {high}, allowed are {_range(least, most)}")
    return tensor.to(wanted.dtype)


def write(tensor: Tensor, encoding: Literal["list", "base64"]) -> Any:
    """As it is sent. What is not finite has no JSON and becomes null in a list."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    elif tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    if encoding == "base64":
        dtype = str(tensor.dtype).removeprefix("torch.")
        data = tensor.numpy().astype(_WIRE[dtype]).tobytes()
        return {"base64": base64.b64encode(data).decode(), "shape": list(tensor.shape), "dtype": dtype}
    plain = tensor.tolist()
    return plain if not tensor.is_floating_point() or bool(tensor.isfinite().all()) else _without_holes(plain)


def describe(takes: dict[str, Input]) -> dict[str, Any]:
    """What can be sent, as the list of models tells it."""
    told = {}
    for name, wanted in takes.items():
        shape = ["rows", *("any" if size is None else size for size in wanted.shape)]
        limits = {"minimum": wanted.least, "maximum": wanted.most}
        told[name] = {
            "dtype": str(wanted.dtype).removeprefix("torch."),
            "shape": shape,
            **{key: value for key, value in limits.items() if value is not None},
            "required": not wanted.optional,
        }
    return told


def together(inputs: Batch, takes: Mapping[str, Input]) -> None:
    """ValueError when tensors do not go with each other."""
    rows(inputs)
    for name, tensor in inputs.items():
        like = takes[name].like
        if like is not None and tensor.shape != inputs[like].shape:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}, which differs from {like}'s")


def rows(inputs: Batch) -> int:
    """ValueError when the tensors differ in it."""
    counts = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "inputs: all need the same number of rows, not " + ", ".join(f"{n}: {c}" for n, c in counts.items())
        )
    return next(iter(counts.values()))


def _decode(name: str, given: Encoded) -> Tensor:
    try:
        data = base64.b64decode(given.base64, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: is not base64: {error}") from None
    dtype = numpy.dtype(_WIRE[given.dtype])
    size = math.prod(given.shape) * dtype.itemsize
    if len(data) != size:
        raise ValueError(f"{name}: has {len(data)} bytes, but {given.shape} of {given.dtype} are {size}")
    return torch.from_numpy(numpy.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(given.shape))


def _nested(name: str, given: Any) -> Tensor:
    try:
        array = numpy.array(given)
    except (ValueError, OverflowError):
        raise ValueError(f"{name}: its lists differ in length or depth") from None
    if array.dtype.kind not in "iuf" or array.dtype == numpy.uint64:
        raise ValueError(f"{name}: must be lists of numbers of 64 bits, or an object with base64, shape and dtype")
    return torch.from_numpy(array)


def _range(least: int | None, most: int | None) -> str:
    return f"{'any' if least is None else least} to {'any' if most is None else most}"


def _without_holes(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_holes(each) for each in value]
    return value if math.isfinite(value) else None
