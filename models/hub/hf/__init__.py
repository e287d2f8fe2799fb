"""Hugging Face checkpoints by `model_type`: `load_hf(path)` and `save_hf(model, path)`.

A file of `types/` named like the model type has `read(fields) -> Checkpoint`, our config and the rows that say which
tensors are which, and `write(ours) -> config dict`. What is written must read back as the same model, so `write` only
has to find the fields, never to prove that nothing is lost. Nothing of transformers is needed. A field of a config that
would change the numbers and is not honoured is an error that names it.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from models.decoder import Decoder
from models.hub.hf import layout
from models.hub.hf.checkpoint import Checkpoint, Layers, Ours
from models.hub.hf.fields import Fields
from models.model import Model
from models.patterns.decoder_only import DecoderOnly

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")  # first choice of models that are several types
TYPES = sorted(path.stem for path in (Path(__file__).parent / "types").glob("*.py"))


def load_hf(path: str) -> Model:
    """The model in the folder `path` (config.json, model*.safetensors), in eval mode, each weight in its stored dtype.

    ValueError, one line, names what cannot be honoured: a broken file, an unknown model type, a config field, a missing
    or unused weight.
    """
    from models.hub import set_weights, weights

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json there, so it is not a Hugging Face checkpoint")
    try:
        record = _record(folder / "config.json")
        kind = record.get("model_type")
        if kind not in TYPES:
            raise ValueError(f"model_type {kind!r} is not known; known: {', '.join(TYPES)}")
        checkpoint, tensors = _checkpoint(kind, record), _read(folder)
        model = Decoder(checkpoint.config)
        shapes = {name: weight.to("meta") for name, weight in weights(model).items()}
        for begin, better in checkpoint.aliases.items():
            names = {name: better + name[len(begin) :] for name in tensors if name.startswith(begin)}
            tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
        found = layout.load(checkpoint.rows, shapes, tensors, checkpoint.skipped, checkpoint.repeated)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, weight in model.state_dict(keep_vars=True).items():
        if isinstance(weight, Parameter):
            weight.data = weight.data.to(found.get(name, weight).dtype)  # the same Parameter, so ties hold
    set_weights(model, found, str(path))
    return model.eval()


def save_hf(model: Model, path: str, model_type: str | None = None) -> None:
    """Write `model` as a Hugging Face checkpoint that transformers loads.

    model_type: None for the plainest that covers the model. ValueError says what is not the same in the nearest one.
    """
    from safetensors.torch import save_file

    if type(model) not in (Decoder, DecoderOnly):  # a subclass has more than its patterns say
        raise ValueError(
            f"no Hugging Face model type covers this model: they are decoders, this is {type(model).__name__}"
        )
    if model_type is not None and model_type not in TYPES:
        raise ValueError(f"model_type {model_type!r} is not known; known: {', '.join(TYPES)}")
    ours, reasons = Ours(model), []
    for kind in [*PLAIN, *TYPES] if model_type is None else [model_type]:
        try:
            record, tensors = _written(kind, ours)
            break
        except Uncovered as error:
            reasons.append((error.size, f"{kind}: {error}"))
    else:
        nearest = min(reasons)[1]
        raise ValueError(f"no Hugging Face model type covers this model; {nearest}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(record | {"dtype": dtype}, indent=2) + "\n")


class Uncovered(ValueError):
    """A model type is not this model; `size`: in how many ways, inf when it cannot even be compared."""

    def __init__(self, message: str, size: float) -> None:
        super().__init__(message)
        self.size = size


def _written(kind: str, ours: Ours) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a type, from which exactly this model is read again; else Uncovered."""
    from models.hub import weights

    try:
        record = {"model_type": kind} | _module(kind).write(ours)
        checkpoint = _checkpoint(kind, json.loads(json.dumps(record)))
    except ValueError as error:
        raise Uncovered(str(error), float("inf")) from None
    differences = ours.differences(Layers(checkpoint.config))
    if differences:
        raise Uncovered(differences[0], len(differences))
    try:
        return record, layout.save(checkpoint.rows, weights(ours.model))
    except ValueError as error:
        raise Uncovered(str(error), 0.5) from None


def _checkpoint(kind: str, record: dict[str, Any]) -> Checkpoint:
    fields = Fields(record, "config.json")
    checkpoint = _module(kind).read(fields)
    fields.finish()
    return checkpoint


def _module(kind: str):
    return importlib.import_module(f"models.hub.hf.types.{kind}")


def _record(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""

    def number(found: dict[str, Any]) -> Any:
        return float(found["__float__"]) if found.keys() == {"__float__"} else found  # as transformers writes infinity

    try:
        record = json.loads(file.read_bytes(), object_hook=number)
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
