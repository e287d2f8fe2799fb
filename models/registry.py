"""Architectures by name. The file stem is the name; nothing is listed by hand and nothing is imported before use.

A file `models/<folder>/<name>.py` registers the class whose name is the stem in camel case (`gated_deltanet` ->
`GatedDeltaNet`; capitals are free). The folder says its kind.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from models.stateful import Absent

ROOT = Path(__file__).parent
KINDS = {
    "mixers": "mixer",
    "ffn": "ffn",
    "blocks": "block",
    "heads": "head",
    "positions": "position",
    "scores": "score",
    "caches": "cache",
    "patterns": "pattern",
    "encoders": "encoder",
}  # every other folder: module
HOSTS = {  # kind of a part -> the decoder's field that it is named in, and how
    "mixer": ("pattern", "{}"),
    "ffn": ("ffn", "{}"),
    "block": ("block", "{}"),
    "head": ("head", "{}"),
    "position": ("pattern", "gqa(positions={})"),
    "score": ("pattern", "gqa(scores={})"),
    "cache": ("pattern", "gqa(cache={})"),
}
_PAPER = r"arXiv[: ](\d{4}\.\d{4,5})"
_INTERNAL = {"layers", "hub", "quant"}  # folders without architectures


@cache
def _files() -> dict[str, str]:
    """name -> module path."""
    files = {"decoder": "models.decoder"}
    for path in sorted(ROOT.glob("*/*.py")):
        folder, name = path.parent.name, path.stem
        if folder in _INTERNAL or name.startswith("_"):
            continue
        if name in files:
            raise RuntimeError(f"{name} is registered twice: {files[name]} and models.{folder}.{name}")
        files[name] = f"models.{folder}.{name}"
    return files


def kind_of(name: str) -> str:
    """mixer, ffn, block, head, position, score, cache, pattern, encoder or module."""
    return KINDS.get(_files()[name].split(".")[1], "module")


def names(family: str | None = None, kind: str | None = None) -> list[str]:
    """Registered names, sorted; `family` as in the catalogue (imports the files), `kind` by folder."""
    found = (name for name in _files() if kind is None or kind_of(name) == kind)
    return sorted(name for name in found if family is None or lookup(name).family == family)


def lookup(name: str) -> type[nn.Module]:
    """The class registered under `name`; ValueError names the nearest ones."""
    if name not in _files():
        raise _unknown(name, names())
    module = importlib.import_module(_files()[name])
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if cls.__module__ == module.__name__ and cls.__name__.lower() == name.replace("_", ""):
            if cls.Config.__module__ != cls.__module__:  # a config names its part by the file it stands in
                raise RuntimeError(f"{module.__name__}: {cls.__name__} must have a Config of its own")
            return cls
    raise RuntimeError(f"{module.__name__} must define a class named {name!r} in camel case")


def _unknown(name: str, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return ValueError(f"no architecture is called {name!r}; {hint}")


def part(name: str, kind: str) -> type[nn.Module]:
    """The class of a part of the given kind; `none` is no mixer, or no ffn."""
    if name == "none" and kind in ("mixer", "ffn"):
        return Absent
    if name not in _files():
        raise _unknown(name, names(kind=kind))
    cls = lookup(name)
    if kind_of(name) != kind:
        raise ValueError(f"{name} is a {kind_of(name)}, not a {kind}; known: {', '.join(names(kind=kind))}")
    return cls


def model(name: str) -> type[nn.Module]:
    """The class of a complete model: a module or a pattern."""
    cls = lookup(name)
    if kind_of(name) in HOSTS:
        raise ValueError(f"{name} is a {kind_of(name)}, a part; build it with models.build({name!r})")
    return cls


def name_of(cls: type[nn.Module]) -> str:
    """The name a class is registered under."""
    return cls.__module__.rsplit(".", 1)[1]


def owner(config: Any) -> type[nn.Module]:
    """The class whose `Config` this is."""
    return lookup(type(config).__module__.rsplit(".", 1)[1])


def build(name: str, **overrides: Any) -> nn.Module:
    """A model by name: the tiny config, with `overrides`.

    A part is built inside a tiny `Decoder`; overrides that are fields of the decoder go there, the rest to the part.
    ValueError names an unknown field and lists the known ones.
    """
    config = config_of(name, **overrides)
    return owner(config)(config)


def config_of(name: str, **overrides: Any) -> Any:
    """The config that `build` builds."""
    from models.config import make_config, to_text
    from models.decoder import Decoder

    cls = lookup(name)
    if kind_of(name) not in HOSTS:
        return make_config(cls, {**vars(cls.Config.tiny()), **overrides})
    of_decoder = {key: value for key, value in overrides.items() if key in Decoder.Config.__dataclass_fields__}
    options = {key: value for key, value in overrides.items() if key not in of_decoder}
    part = to_text(make_config(cls, {**tiny_options(cls), **options}))
    field, host = HOSTS[kind_of(name)]
    if field in of_decoder:
        raise ValueError(f"build({name!r}, {field}=...): {name} takes that place; build('decoder', ...) chooses both")
    return make_config(Decoder, {**vars(Decoder.Config.tiny()), field: host.format(part), **of_decoder})


def tiny_options(cls: type[nn.Module]) -> dict[str, Any]:
    """Options of a part that make it show what it does in a few tokens; most parts do so by default."""
    return vars(cls.Config.tiny()) if "tiny" in dir(cls.Config) else {}


def card(name: str) -> dict[str, Any]:
    """What is known of an architecture without training it.

    name, kind, family; paper: arXiv id, of a docstring's line that begins with one, else the first; idea: the file's
    docstring; parameters of the tiny model; options with their defaults; state: each tensor of a tiny row of 1024
    tokens; supports: what the model, or the one around a part, can do.
    """
    from models.decoder import Decoder

    cls, model = lookup(name), build(name)
    text = inspect.getdoc(importlib.import_module(cls.__module__)) or ""
    paper = re.search(_PAPER.replace("arXiv", "^arXiv"), text, re.MULTILINE) or re.search(_PAPER, text)
    return {
        "name": name,
        "kind": kind_of(name),
        "family": cls.family,
        "paper": paper.group(1) if paper else None,
        "idea": text,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "options": tuple(f"{field.name}={field.default!r}" for field in dataclasses.fields(cls.Config)),
        "state": tuple(
            f"{key} {'x'.join(map(str, spec.shape)) or 'scalar'}{f' every {spec.every}' if spec.every else ''}"
            for key, spec in (model.state_spec(1024).items() if isinstance(model, Decoder) else ())
        ),
        "supports": supports(model),
    }


def supports(model: nn.Module) -> tuple[str, ...]:
    """train; serve, rl: it goes on from a prompt or an observation; predict: it answers a whole input."""
    from models.decoder import Decoder
    from models.model import Model

    if isinstance(model, Decoder) and model.causal and not model.needs_memory:
        return ("train", "serve", "rl")
    return ("train", "predict") if type(model).predict is not Model.predict else ("train",)
