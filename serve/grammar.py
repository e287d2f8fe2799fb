"""Completions that follow a grammar: JSON of a schema, a regular expression, a choice, a context-free grammar.

A grammar travels as text (`Sampling.grammar`), in the form of the llguidance library, which says at each position what
tokens may come. The end token is allowed exactly where the grammar may end. Schemas come from strangers: sizes, and
with them the time that compiling and each step may take, are bounded.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

MOST_BYTES = 64 * 2**10  # of a grammar's text
_END = "<|end of the grammar|>"
MOST_MULTIPLE = 1000  # that numbers may have to be multiples of: compiling takes time in proportion
_LIMITS = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
}
_KEPT = 32  # compiled grammars; a copy of one is made in microseconds
# Written as json.dumps does. Free white space would let a model that likes it never come to the point.
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarError(ValueError):
    """A grammar that cannot be followed, or no further."""


class Matcher:
    """Where one completion stands in its grammar."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def push(self, tokens: Sequence[int]) -> None:
        """`tokens` were generated."""
        self._state.consume_tokens(list(tokens))
        self._check()

    @property
    def finished(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._state.is_stopped()

    def allowed(self, classes: int, ahead: Sequence[int] = ()) -> Tensor | None:
        """(classes,) bool: what may come after what was pushed and `ahead`; None when `ahead` itself may not come."""
        passed = self._state.try_consume_tokens(list(ahead)) if ahead else 0
        try:
            if passed < len(ahead):
                return None
            bits = torch.frombuffer(bytearray(self._state.compute_bitmask()), dtype=torch.uint8)
            self._check()
        finally:
            if passed:
                self._state.rollback(passed)
        allowed_C = (bits[:, None] >> _BITS & 1).view(-1)[:classes].bool()
        return (
            allowed_C if len(allowed_C) == classes else torch.nn.functional.pad(allowed_C, (0, classes - len(bits) * 8))
        )

    def _check(self) -> None:
        if self._state.is_error():
            raise GrammarError(f"the grammar is too complex here: {_line(self._state.get_error())}")


_BITS = torch.arange(8, dtype=torch.uint8)


class Grammars:
    """Of one vocabulary, for any thread.

    classes: of the model, which may be more than the tokenizer's. ends: end tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, classes: int, ends: Iterable[int] = ()) -> None:
        self._tokenizer, self._classes, self._ends = tokenizer, classes, sorted(ends)
        self._lock = Lock()
        self._vocabulary = lru_cache(1)(self._load)
        self._compiled = lru_cache(_KEPT)(self._compile)

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of `grammar`. GrammarError for one that cannot be followed."""
        compiled = self._compiled(grammar)
        with self._lock:
            return Matcher(compiled.deep_copy())

    def _load(self) -> Any:
        """The library's view of the vocabulary; it wants an end token also where the model has none."""
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            raise GrammarError("the model has no tokenizer, so its tokens have no text to constrain")
        tokenizer, ends = self._tokenizer, self._ends
        if not ends:
            tokenizer = Tokenizer.from_str(tokenizer.to_str())
            tokenizer.add_special_tokens([_END])
            ends = [tokenizer.token_to_id(_END)]
        try:
            return LLTokenizer(tokenizer.to_str(), max(self._classes, tokenizer.get_vocab_size()), ends)
        except ValueError as error:
            raise GrammarError(f"this model's tokenizer cannot be constrained: {_line(error)}") from None

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        _check_size(grammar)
        _check_multiples(grammar)
        limits = LLParserLimits(**_LIMITS)
        state = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=limits)
        if not state.is_error():
            state.compute_bitmask()  # some limits show at the first step only
        if state.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_line(state.get_error())}")
        return state


def of_schema(schema: Mapping[str, Any]) -> str:
    """JSON as a JSON schema wants it."""
    from llguidance import LLMatcher

    try:
        _check_size(json.dumps(schema))
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_WRITING)
    except GrammarError:
        raise
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema cannot be read: {_line(error)}") from None


def _check_size(text: str) -> None:
    if len(text) > MOST_BYTES:
        raise GrammarError(f"it has {len(text)} bytes, at most {MOST_BYTES} are allowed")


def _check_multiples(grammar: str) -> None:
    """Of all together, for the library multiplies them. The schemas are looked at as they are spelled in `grammar`."""
    spelled = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), grammar)
    found = re.findall(r'multipleOf\\*"\s*:\s*([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2})?)', spelled)
    whole = 1
    for number in found:
        _, digits, exponent = Decimal(number).normalize().as_tuple()  # 0.25 is as hard as 25
        whole = math.lcm(whole, int("".join(map(str, digits))) * 10 ** max(exponent, 0))
    if whole > MOST_MULTIPLE:
        raise GrammarError(f"multipleOf: all together at most {MOST_MULTIPLE} is allowed")


def of_regex(regex: str) -> str:
    """A text that `regex` matches as a whole."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def of_choice(choices: Sequence[str]) -> str:
    """One of `choices`."""
    return of_lark("start: " + " | ".join(map(literal, choices)))


def of_lark(lark: str) -> str:
    """A context-free grammar in the library's dialect of Lark."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(lark)


def literal(text: str) -> str:
    """`text` as itself in a Lark grammar."""
    return json.dumps(text)


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON of `schema`, as part of a Lark rule."""
    return "%json " + json.dumps({**schema, "x-guidance": _WRITING})


def _line(error: object) -> str:
    """What a library complains about, without the dump of its state."""
    text = re.split(r"\n<state>|\n *1 \| ", str(error))[0]
    return " ".join(text.split())[:300]
