"""Reading a checkpoint's config so that nothing in it is passed over in silence."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

# Fields that say nothing about the numbers a model computes.
HARMLESS = {
    "architectures", "model_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "hidden_dropout",
    "attn_implementation", "_attn_implementation", "return_dict", "output_attentions", "output_hidden_states",
    "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "tokenizer_class",
    "auto_map", "cache_implementation", "_attn_implementation_autoset", "embd_pdrop", "resid_pdrop",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
}  # fmt: skip

_ABSENT = object()


class Fields:
    """A config's fields; each is taken once, and `finish` refuses those that nobody took."""

    def __init__(self, record: dict[str, Any], source: str) -> None:
        self._rest = {name: value for name, value in record.items() if name not in HARMLESS}
        self._source = source

    def take(self, name: str, default: Any = _ABSENT) -> Any:
        """The value of a field; `default` also for null. ValueError when it is needed and missing."""
        value = self._rest.pop(name, None)
        if value is None:
            if default is _ABSENT:
                raise ValueError(f"{self._source}: {name} is missing")
            return default
        return value

    def peek(self, name: str) -> Any:
        """The value of a field that is still to be taken; None when it is not there."""
        return self._rest.get(name)

    def whole(self, name: str, default: Any = _ABSENT, low: int = 1) -> Any:
        """A field that is a whole number of at least `low`."""
        return self._checked(name, default, f"a whole number of at least {low}", lambda v: type(v) is int and v >= low)

    def wholes(self, name: str, default: Any = _ABSENT) -> Any:
        """A field that is a list of whole numbers."""
        return self._checked(
            name,
            default,
            "a list of whole numbers",
            lambda v: isinstance(v, list) and all(type(item) is int for item in v),
        )

    def number(self, name: str, default: Any = _ABSENT) -> Any:
        """A field that is a number above 0, as float."""
        value = self._checked(name, default, "a number above 0", _positive)
        return value if value is None else float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A field that is a list of numbers above 0."""
        value = self._checked(
            name, _ABSENT, "a list of numbers above 0", lambda v: isinstance(v, list) and all(map(_positive, v))
        )
        return tuple(map(float, value))

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        return self._checked(name, default, "true or false", lambda v: type(v) is bool)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse any value but those we compute; null and absent mean the first."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{self._source}: {name}={value!r} is not honoured; it can be {' or '.join(map(repr, allowed))}"
            )

    def window(self, name: str, absent: int = 0) -> int:
        """A field that is a number of tokens, 0 for null; `absent` when it is not there at all."""
        return self.whole(name, 0) if name in self._rest else absent

    def cap(self, name: str, absent: float = 0.0) -> float:
        """A field that bounds logits, 0 for null; `absent` when it is not there at all."""
        return self.number(name, 0.0) if name in self._rest else absent

    def kinds(self, name: str, layers: int, allowed: Sequence[str], absent: Sequence[str]) -> list[str]:
        """A field that names the kind of each layer; `absent` when it is not there."""
        value = self.take(name, None)
        value = list(absent) if value is None else value
        if not isinstance(value, list) or len(value) < layers or any(kind not in allowed for kind in value):
            raise ValueError(
                f"{self._source}: {name}={value!r} must be a list of {layers} of {', '.join(map(repr, allowed))}"
            )
        return value[:layers]

    def ignore(self, *names: str) -> None:
        """Fields that only say how a model of this type is trained or computed, not what."""
        for name in names:
            self._rest.pop(name, None)

    def inside(self, name: str) -> "Fields | None":
        """A field that holds fields, or None."""
        value = self.take(name, None)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{self._source}: {name}={value!r} must be an object")
        return None if value is None else Fields(value, f"{self._source}: {name}")

    def _checked(self, name: str, default: Any, what: str, allowed: Callable[[Any], bool]) -> Any:
        value = self.take(name, default)
        if value is not default and not allowed(value):
            raise ValueError(f"{self._source}: {name}={value!r} must be {what}")
        return value

    def finish(self) -> None:
        """ValueError that names the first field nobody took, unless it is null."""
        left = sorted(name for name, value in self._rest.items() if value is not None)
        if left:
            raise ValueError(f"{self._source}: {left[0]}={self._rest[left[0]]!r} is not honoured by this loader")


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max
