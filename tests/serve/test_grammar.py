"""A random model that must follow a grammar: what it writes is valid, wherever it stops and however it was computed."""

import json
import re

import jsonschema
import pytest

from serve import grammar
from serve.drafters.ngram import NGram
from serve.engine import Engine
from serve.grammar import GrammarError, Grammars
from serve.request import Request
from serve.sampler import Sampling

POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "integer"}}, "required": ["x", "y"]}
SCHEMAS = {
    "nested": {
        "type": "object",
        "properties": {"at": {**POINT, "additionalProperties": False}, "on": {"type": "boolean"}},
        "required": ["at", "on"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["red", "gr\u00fcn", 3, None, {"a": [1]}]},
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": -5, "maximum": 20},
        "minItems": 1,
        "maxItems": 4,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "format": {"type": "string", "format": "date"},
    "number": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2},
    "multiple": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 3},
    "union": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"const": "both"}]},
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"enum": [1, 2]},
                    "next": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "map": {"type": "object", "patternProperties": {"^[ab]$": {"type": "boolean"}}, "additionalProperties": False},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False, "minItems": 2},
}


@pytest.fixture(scope="module")
def engine(decoder, tokenizer):
    return Engine(decoder, tokenizer, max_len=400)


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_ends_is_valid(engine, name):
    rule = grammar.of_schema(SCHEMAS[name])
    samplings = [
        Sampling(max_tokens=300, temperature=temperature, seed=seed, grammar=rule)
        for seed, temperature in enumerate([0.0, 0.5, 1.0, 1.0, 2.0, 5.0])
    ]
    results = engine.generate(["def"] * len(samplings), samplings)
    ended = [result for result in results if result.reason == "stop"]
    assert len(ended) >= 3
    for result in ended:
        jsonschema.validate(json.loads(result.text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    for result in results:
        assert result.reason in ("stop", "length") and len(result.tokens) <= 300


def test_other_grammars(engine):
    rules = {
        grammar.of_regex(r"[a-f]{3}(-\d)?"): re.compile(r"[a-f]{3}(-\d)?"),
        grammar.of_choice(['say "yes"', "n\u00f6", "a|b"]): re.compile(r'say "yes"|n\u00f6|a\|b'),
        grammar.of_lark('start: sum\nsum: /[0-9]/ ("+" sum)?'): re.compile(r"\d(\+\d)*"),
    }
    for rule, expected in rules.items():
        for seed in range(5):
            result = engine.generate(["x"], Sampling(max_tokens=60, seed=seed, temperature=2.0, grammar=rule))[0]
            assert result.reason == "length" or expected.fullmatch(result.text), result


def test_the_end_comes_only_where_it_may(engine):
    """Also when the model wants nothing but to end, and when it may not end by itself."""
    ends = tuple((end, 100.0) for end in engine.ends)
    rule = grammar.of_regex("(ab)+")
    eager = engine.generate(["x"], Sampling(max_tokens=60, seed=1, grammar=rule, logit_bias=ends))[0]
    assert (eager.text, eager.reason) == ("ab", "stop")
    patient = engine.generate(["x"], Sampling(max_tokens=60, seed=1, grammar=rule, logit_bias=ends, min_tokens=6))[0]
    assert re.fullmatch("(ab)+", patient.text) and len(patient.tokens) > 6 and patient.reason == "stop"
    for seed in range(4):
        result = engine.generate(["x"], Sampling(max_tokens=7, seed=seed, grammar=rule, ignore_eos=True))[0]
        assert "abababababababab".startswith(result.text)


def test_without_end_tokens_it_ends_where_nothing_can_follow(decoder, tokenizer):
    engine = Engine(decoder, tokenizer, max_len=100)
    engine.ends, engine.grammars = frozenset(), Grammars(tokenizer, decoder.config.vocab)
    result = engine.generate(["x"], Sampling(max_tokens=60, seed=1, grammar=grammar.of_regex("[a-c]{5}")))[0]
    assert re.fullmatch("[a-c]{5}", result.text) and result.reason == "stop"


def test_resumed_and_drafted_completions_are_the_same(decoder, tokenizer, engine):
    rule = grammar.of_schema(SCHEMAS["nested"])
    sampling = Sampling(
        max_tokens=120, seed=3, temperature=1.5, grammar=rule, frequency_penalty=0.5, repetition_penalty=1.2
    )
    prompt = engine.prompts.encode("def f(x): return x + 1 def f(x)")
    whole = engine.generate([prompt], sampling)[0]
    assert len(whole.tokens) > 20
    for cut in (1, 9, len(whole.tokens) - 1):
        engine.submit(Request(prompt, sampling, resumed=whole.tokens[:cut]))
        events = []
        while engine.busy:
            events += engine.step()
        assert [event.token for event in events] == whole.tokens[cut:]
        assert events[-1].reason == whole.reason
    guessing = Engine(decoder, tokenizer, max_len=400, drafter=NGram())
    assert guessing.generate([prompt, [0, 1]], sampling)[0] == whole


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "colour"}, "Invalid type: colour"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "Unsatisfiable schema"),
        ({"$ref": "http://elsewhere/x"}, "does not fetch"),
        ({"allOf": [{"type": "null"}, {"type": "string"}]}, "Unsatisfiable schema"),
        ({"enum": ["x" * 50] * 6000}, "bytes, at most"),
        ({"type": "integer", "multipleOf": 99991}, "multipleOf: all together at most 1000 is allowed"),
        ({"allOf": [{"multipleOf": 0.97}, {"multipleOf": 0.89}]}, "multipleOf: all together at most 1000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schemas_that_cannot_be_followed(engine, schema, message):
    with pytest.raises(GrammarError, match=message) as error:
        engine.grammars.matcher(grammar.of_schema(schema))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_grammar_that_breaks_ends_only_its_completion(engine):
    bad = engine.submit(Request([0, 1], Sampling(grammar=grammar.of_lark("start: nothing"), seed=0)))
    good = engine.submit(Request([0, 1], Sampling(max_tokens=4, seed=0, ignore_eos=True)))
    events = []
    while engine.busy:
        events += engine.step()
    assert [type(event.error) for event in events if event.id == bad] == [GrammarError]
    assert len([event for event in events if event.id == good]) == 4
