"""Shaped logits are the definition's, to the bit the same whether tokens were pushed, replayed or lie ahead."""

import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import grammar
from serve.grammar import Grammars
from serve.sampler import Sampling
from serve.shaping import Shaper, shape

CLASSES, ENDS = 40, (1, 2)
TOKENS = st.lists(st.integers(3, CLASSES - 1), max_size=90)


def defined(logits_C: torch.Tensor, s: Sampling, prompt: list[int], generated: list[int]) -> torch.Tensor:
    """One token at a time."""
    logits_C, counts = logits_C.float().clone(), Counter(generated)
    for token, value in s.logit_bias:
        logits_C[token] += value
    if len(generated) < s.min_tokens:
        logits_C[[*ENDS, *s.stop_token_ids]] = float("-inf")
    for token in {*prompt, *generated} if s.repetition_penalty != 1 else set():
        value = logits_C[token]
        logits_C[token] = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
    for token, count in counts.items():
        logits_C[token] -= s.frequency_penalty * count + s.presence_penalty
    return logits_C


samplings = st.builds(
    Sampling,
    frequency_penalty=st.sampled_from([0.0, 0.3, -1.0]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.sampled_from([(), ((5, 2.5), (9, -100.0))]),
    max_tokens=st.just(200),
    min_tokens=st.sampled_from([0, 4, 100]),
    stop_token_ids=st.sampled_from([(), (7,)]),
)


@settings(max_examples=150, deadline=None)
@given(samplings, TOKENS, TOKENS, st.lists(st.integers(3, CLASSES - 1), max_size=6), st.sampled_from(["32", "16"]))
def test_it_is_the_definition(sampling, prompt, generated, ahead, width):
    logits_NC = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(len(prompt))) * 4
    logits_NC = logits_NC.bfloat16() if width == "16" else logits_NC
    before_NC = logits_NC.clone()
    replayed = Shaper(sampling, prompt, [*generated, *ahead], ENDS)
    pushed = Shaper(sampling, prompt, (), ENDS)
    for token in generated:
        pushed.push(token)
    wanted = [(pushed, ahead), (None, ()), (replayed, ()), (pushed, ahead)]
    shaped_NC = shape(logits_NC, wanted)
    assert torch.equal(logits_NC, before_NC) and torch.equal(shaped_NC[1], logits_NC[1].float())
    same_NC = shape(logits_NC[:1].expand(4, -1), wanted)
    assert torch.equal(same_NC[0], same_NC[2]) and torch.equal(same_NC[0], same_NC[3])
    expected_C = defined(logits_NC[0], sampling, prompt, [*generated, *ahead])
    torch.testing.assert_close(shaped_NC[0], expected_C, atol=1e-5, rtol=1e-6)


def test_nothing_to_do_is_nothing_done():
    logits_NC = torch.randn(2, 5)
    assert shape(logits_NC, [(None, ()), (None, ())]) is logits_NC


@pytest.mark.parametrize("stop", [(), ("a",)])
def test_a_grammar_that_has_only_an_end_has_it_before_min_tokens(tokenizer, stop):
    stop = tuple(map(tokenizer.token_to_id, stop))
    ends = [tokenizer.token_to_id("<|eos|>")]
    matcher = Grammars(tokenizer, 300, ends).matcher(grammar.of_regex("a" if stop else ""))
    shaper = Shaper(Sampling(min_tokens=3, stop_token_ids=stop), ends=ends, matcher=matcher)
    left = shape(torch.zeros(1, 300), [(shaper, ())])[0].isfinite().nonzero()[:, 0].tolist()
    assert left == [*(stop or ends)]


@pytest.mark.parametrize("classes", [300, 320])
def test_a_grammar_along_a_draft(tokenizer, classes):
    """Each place of a draft has the mask of its own tokens; the matcher itself has not moved. A model may have more
    classes than its tokenizer has tokens, and they have no text."""
    ends = [tokenizer.token_to_id(end) for end in ("<|eos|>", "<|end|>")]
    grammars = Grammars(tokenizer, classes, ends)
    shaper = Shaper(Sampling(), ends=ends, matcher=grammars.matcher(grammar.of_regex("(ab)*c")))
    a, b, c = (tokenizer.token_to_id(letter) for letter in "abc")
    wanted = [(shaper, ()), (shaper, [a]), (shaper, [a, b]), (shaper, [b]), (shaper, [c]), (shaper, ())]
    shaped_NC = shape(torch.zeros(6, classes), wanted)
    allowed = [set((row == 0).nonzero()[:, 0].tolist()) for row in shaped_NC]
    whole = [token for token in range(300) if re.fullmatch("(ab)*(a|c)?", tokenizer.decode([token]) or "-")]
    assert allowed[0] == allowed[2] == allowed[5] == set(whole) and {a, c} <= allowed[0]
    assert b in allowed[1] and not allowed[1] & {a, c}
    assert len(allowed[3]) == classes  # no draft goes on there
    assert allowed[4] == set(ends)
