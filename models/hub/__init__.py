"""Models on disk: `save(model, path)` and `load(path)`, one door for trained runs and exported models.

A model folder holds config.json (name and config), model.safetensors, mostly a tokenizer.json, and a manifest with the
sha256 of each. A run's folder is accepted too and means its newest complete checkpoint.
"""

import json
from pathlib import Path

from torch import Tensor

from models.hub.hf import load_hf, save_hf
from models.model import Model

__all__ = ["contents", "load", "load_hf", "locate", "save", "save_hf", "set_weights", "weights"]


def save(model: Model, path: str, tokenizer: bytes | None = None) -> None:
    """Write `model` as a folder at `path` (local or URI); `tokenizer`: the bytes of its tokenizer.json."""
    from cluster import folder

    folder.write(str(path), contents(model, tokenizer), {})


def contents(model: Model, tokenizer: bytes | None = None) -> dict[str, bytes | dict[str, Tensor]]:
    """The files of a model folder. A tensor with two names (tied weights) is stored under its first."""
    from models.config import to_json

    files = {"config.json": json.dumps(to_json(model.config), indent=2).encode(), "model.safetensors": weights(model)}
    return files if tokenizer is None else files | {"tokenizer.json": tokenizer}


def weights(model: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each tensor once."""
    unique = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {
        name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items() if unique[id(tensor)] == name
    }


def load(path: str) -> Model:
    """The model at `path`, in eval mode, each floating weight in the dtype it is stored in.

    ValueError or FileNotFoundError in one line when it is not one.
    """
    from cluster import folder
    from models.config import from_json
    from models.registry import owner

    stored = folder.load(locate(str(path)))
    config = from_json(json.loads(stored.bytes("config.json")))
    model = owner(config)(config)
    tensors = stored.tensors("model.safetensors")
    for name, weight in model.state_dict(keep_vars=True).items():
        if name in tensors and weight.is_floating_point() and tensors[name].is_floating_point():
            weight.data = weight.data.to(tensors[name].dtype)  # the same Parameter, so ties hold
    set_weights(model, tensors, str(path))
    return model.eval()


def locate(path: str) -> str:
    """The model folder that `path` means: itself, or the newest complete checkpoint of a run."""
    from cluster import folder

    if folder.complete(path):
        return path
    newest = folder.latest(f"{path.rstrip('/')}/checkpoints")
    if newest is None:
        where = "" if "://" in path or Path(path).exists() else " (no such folder)"
        raise FileNotFoundError(f"{path}: neither a model folder nor a run with a complete checkpoint{where}")
    return newest


def set_weights(model: Model, tensors: dict[str, Tensor], source: str) -> None:
    """Load `tensors` by name; every name and shape must match, tied names may be given once."""
    expected = weights(model)
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(f"{source}: weights do not fit; missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the config makes {tuple(expected[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)
