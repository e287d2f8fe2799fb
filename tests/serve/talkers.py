"""Tiny models that say what a test of the page needs: no end, always the same, nothing but markup."""

import copy

import torch
from tokenizers import Tokenizer

import models

HOSTILE = [
    "<script>hacked=1</script>",
    "<img src=x onerror=hacked=2>",
    "<svg onload=hacked=3>",
    '"><iframe srcdoc="<script>top.hacked=4</script>">',
    "[go](javascript:hacked=5)",
    "<style>*{display:none}</style>",
    "\n```js\n",
    "</code></pre>",
]


def endless(model, tokenizer):
    """`model`, which never ends an answer when it is greedy: the best logit is above 0."""
    model = copy.deepcopy(model)
    ends = [tokenizer.token_to_id(end) for end in ("<|eos|>", "<|end|>")]
    with torch.no_grad():
        model.head.weight[ends] = 0
    return model


def circling(tokenizer):
    """A model whose greedy text goes in circles, as only the last token counts: no attention reaches its stream."""
    torch.manual_seed(0)
    model = models.build("decoder", vocab=tokenizer.get_vocab_size(), dim=32, layers=2, pattern="gqa")
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.wo.weight.zero_()
    return endless(model, tokenizer)


def hostile(tokenizer):
    """A model that mostly says markup, as most of its tokens are some."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens([piece + " " * blanks for blanks in range(1, 80) for piece in HOSTILE])
    torch.manual_seed(0)
    model = models.build("decoder", vocab=tokenizer.get_vocab_size(), dim=32, layers=2, pattern="gqa")
    return endless(model, tokenizer), tokenizer
