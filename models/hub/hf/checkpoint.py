"""What a model type says of a checkpoint: our config and the rows of its tensors. And our models as types see them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Size

from models.config import parse_part, parse_pattern, to_text
from models.decoder import Decoder
from models.hub.hf.layout import Row
from models.mixers.gqa import GQA
from models.mixers.sliding_window import SlidingWindow
from models.registry import owner
from models.stateful import Absent, Place, Stateful

SIZES = {"heads", "head_dim", "key_dim", "value_dim", "hidden", "width"}  # 0: derived, so shapes decide
TRAINING = {"balance", "rate", "choice"}  # say nothing of a trained model
PARTS = {"positions": "position", "scores": "score"}


@dataclass(frozen=True)
class Checkpoint:
    """config: of our decoder. rows: of all its tensors. skipped: pattern of tensors that hold nothing it computes.

    aliases: beginnings of names under which files also hold what rows call otherwise. repeated: names of tensors that
    files may hold beside the equal ones.
    """

    config: Decoder.Config
    rows: list[Row]
    skipped: str = ""
    aliases: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)


def tiled(parts: Sequence[Any]) -> str:
    """Configs of parts, one for each layer (None: no such branch), as the shortest pattern: `3*gated_deltanet gqa`."""
    texts = ["none" if part is None else to_text(part) for part in parts]
    period = next(p for p in range(1, len(texts) + 1) if all(text == texts[i % p] for i, text in enumerate(texts)))
    terms, start = [], 0
    for end in range(1, period + 1):
        if end == period or texts[end] != texts[start]:
            terms.append(f"{end - start}*{texts[start]}" if end - start > 1 else texts[start])
            start = end
    return " ".join(terms)


class Layers:
    """A decoder's parts layer by layer, whatever its patterns look like as text."""

    def __init__(self, config: Decoder.Config) -> None:
        self.config = config
        self.mixers, self.ffns, self.blocks = (
            self._expanded(text, kind)
            for text, kind in ((config.pattern, "mixer"), (config.ffn, "ffn"), (config.block, "block"))
        )

    def _expanded(self, text: str, kind: str) -> list[Any]:
        configs = [None if cls is Absent else config for cls, config in parse_pattern(text, kind)]
        configs = [_plain(config) for config in configs]
        return [configs[layer % len(configs)] for layer in range(self.config.layers)]

    def differences(self, other: "Layers") -> list[str]:
        """What is not the same in another, a line each."""
        found = []
        for kind in ("mixers", "ffns", "blocks"):
            for layer, (a, b) in enumerate(zip(getattr(self, kind), getattr(other, kind))):
                if not _alike(a, b) or (a != b and kind != "blocks" and self._shapes(a) != self._shapes(b)):
                    found.append(f"layer {layer} has {_text(a)}, there it would be {_text(b)}")
        for name in ("vocab", "dim", "layers", "norm", "eps", "scale", "embedding_norm", "tied"):
            a, b = getattr(self.config, name), getattr(other.config, name)
            if a != b:
                found.append(f"{name} is {a}, there it would be {b}")
        if not _alike(*(parse_part(c.config.head, "head")[1] for c in (self, other))):
            found.append(f"head is {self.config.head}, there it would be {other.config.head}")
        return found

    def _shapes(self, config: Any) -> dict[str, Size]:
        """Of the weights that a part has in this model."""
        c = self.config
        part = owner(config)(config, Place(c.dim, 0, c.layers, c.vocab, c.norm, c.eps))
        return {name: weight.shape for name, weight in part.state_dict().items()}


class Ours(Layers):
    """A model that is to be written."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model.config)
        self.model = model

    def first(self, cls: type[Stateful]) -> Any:
        """The first part of that class. ValueError when there is none."""
        for block in self.model.blocks:
            for part in block.children():
                if isinstance(part, cls):
                    return part
        raise ValueError(f"it has {cls.__name__}, this model is {self.config.pattern} with {self.config.ffn}")

    def only(self, cls: type[Stateful]) -> list[Any]:
        """The configs of all mixers. ValueError when one is not of that class."""
        if not all(isinstance(config, cls.Config) for config in self.mixers):
            raise ValueError(f"all its mixers are {cls.__name__}, this model has {self.config.pattern}")
        return self.mixers


def option(text: str, kind: str, name: str) -> Any:
    """An option of a part given as text. ValueError when the part has no such option."""
    config = parse_part(text, kind)[1]
    if name not in vars(config):
        raise ValueError(f"its {kind} has a {name}, not {text}")
    return vars(config)[name]


def _plain(config: Any) -> Any:
    """Sliding windows as what they are, grouped-query attention."""
    return GQA.Config(**vars(config)) if isinstance(config, SlidingWindow.Config) else config


def _alike(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or a is None:
        return a is b
    for name in (option.name for option in fields(a)):
        x, y = getattr(a, name), getattr(b, name)
        if name in PARTS:
            x, y = (parse_part(text, PARTS[name]) for text in (x, y))
        if x != y and name not in TRAINING and not (name in SIZES and not (x and y)):
            return False
    return True


def _text(config: Any) -> str:
    return "none" if config is None else to_text(config)
