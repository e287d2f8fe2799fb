"""Hugging Face checkpoints by `model_type`: `load_hf(path)` and `save_hf(model, path)`.

A file of this folder named like the model type has `read(fields, tensors) -> (config, weights)` and
`write(model) -> (config dict, tensors)`. Nothing of transformers is needed. A field of a checkpoint's config that would
change its numbers and is not honoured is an error that names it.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from models.hub.hf.fields import Fields
from models.model import Model

TYPES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "fields", "rope")
)


def load_hf(path: str) -> Model:
    """The model in the folder `path` (config.json, model*.safetensors), in eval mode, in the dtype it is stored in.

    ValueError, one line, names what cannot be honoured: a broken file, an unknown model type, a config field, a missing
    or unused weight.
    """
    from models.hub import set_weights
    from models.registry import owner

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json there, so it is not a Hugging Face checkpoint")
    try:
        record = _record(folder / "config.json")
        kind = record.get("model_type")
        if kind not in TYPES:
            raise ValueError(f"model_type {kind!r} is not known; known: {', '.join(TYPES)}")
        fields, tensors = Fields(record, "config.json"), _read(folder)
        config, weights = _module(kind).read(fields, tensors)
        fields.finish()
        model = owner(config)(config).to(next(iter(weights.values())).dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    set_weights(model, weights, str(path))
    return model.eval()


def save_hf(model: Model, path: str) -> None:
    """Write `model` as a Hugging Face checkpoint that transformers loads; ValueError when no model type covers it."""
    from safetensors.torch import save_file

    reasons = []
    for kind in TYPES:
        try:
            record, tensors = _module(kind).write(model)
            break
        except ValueError as error:
            reasons.append(f"{kind}: {error}")
    else:
        raise ValueError(f"no Hugging Face model type covers this model ({'; '.join(reasons)})")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(record | {"model_type": kind, "dtype": dtype}, indent=2) + "\n")


def _module(kind: str):
    return importlib.import_module(f"models.hub.hf.{kind}")


def _record(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{file.name} holds {type(record).__name__}, not an object")
    return record


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, one file or the shards that its index names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        places = Fields(_record(index), index.name).take("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index.name}: weight_map is not an object of file names")
        names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {missing[0]} is missing (only safetensors are read, never pickles)")
    tensors = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{name} is damaged: {error}") from None
    return tensors
