"""Answers of /tokenize and /detokenize, as vLLM has them."""

import asyncio

from serve.http.chats import encode
from serve.http.errors import translate
from serve.http.replies import Text, Tokens
from serve.http.schema import Detokenization, Tokenization
from serve.http.served import Served


async def tokenize(served: Served, body: Tokenization) -> Tokens:
    """add_special_tokens: a prompt opens a document, as in a completion."""

    def ids() -> list[int]:
        if body.messages is not None:
            return encode(served, body.messages, body.tools)
        if body.add_special_tokens:
            return served.prompts.encode(body.prompt)
        if served.prompts.tokenizer is None:
            raise ValueError("prompt: the model has no tokenizer")
        served.prompts.check_text(body.prompt)
        return served.prompts.tokenizer.encode(body.prompt, add_special_tokens=False).ids

    try:
        tokens = await asyncio.to_thread(ids)
    except ValueError as error:
        raise translate(error) from error
    spelled = [served.prompts.tokenizer.id_to_token(token) for token in tokens] if body.return_token_strs else None
    return Tokens(count=len(tokens), max_model_len=served.prompts.longest, tokens=tokens, token_strs=spelled)


async def detokenize(served: Served, body: Detokenization) -> Text:
    prompts = served.prompts
    if prompts.tokenizer is None:
        raise translate(ValueError("tokens: the model has no tokenizer"))
    wrong = next((token for token in body.tokens if token >= prompts.vocab), None)
    if wrong is not None:
        raise translate(ValueError(f"tokens: {wrong} is not in the vocabulary of {prompts.vocab} tokens"))
    return Text(prompt=await asyncio.to_thread(prompts.tokenizer.decode, body.tokens, skip_special_tokens=False))
