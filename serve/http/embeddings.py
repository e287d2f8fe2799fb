"""Answers of POST /v1/embeddings: the decoder's output at the last token of each input, of length 1."""

import asyncio
import base64
import struct
from contextlib import closing
from typing import Any

from serve.http import keys
from serve.http.errors import APIError, translate
from serve.http.limits import Limits
from serve.http.schema import Embedding
from serve.http.served import Served
from serve.request import Event, Request
from serve.sampler import Sampling
from serve.worker import Busy, Failed

_NOTHING = Sampling(max_tokens=1, temperature=0.0)


async def embed(served: Served, body: Embedding, limits: Limits) -> dict[str, Any]:
    """The answer. Raises APIError when there is none; whoever cancels it ends what it still computes."""
    backend, texts, caller = served.backend, body.prompts(), keys.caller()
    vectors: list[list[float]] = [[]] * len(texts)
    options: dict[str, Any] = {"embed": True, "deadline": limits.answer_seconds}
    if caller is not None:
        options |= {"priority": caller.key.priority, "key": caller.key.name}
    try:
        backend.check_room(len(texts))
        encode = served.prompts.encode
        prompts = await asyncio.to_thread(lambda: [encode(one) if isinstance(one, str) else one for one in texts])
        used = sum(map(len, prompts))
        with closing(backend.open([Request(prompt, _NOTHING, **options) for prompt in prompts])) as call:
            if caller is not None:
                caller.charge(used)
            while batch := await call.read():
                for index, event in batch:
                    vectors[index] = _vector(event, limits)
    except (ValueError, Busy, Failed) as error:
        refusal = translate(error)
        if refusal.param == "prompt":
            refusal.param, refusal.message = "input", refusal.message.replace("prompt", "input", 1)
        raise refusal from error
    data = [{"object": "embedding", "index": i, "embedding": _spelled(v, body)} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": used, "total_tokens": used}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _vector(event: Event, limits: Limits) -> list[float]:
    if event.error is not None:
        raise APIError(500, f"an embedding broke: {event.error}", code="embedding_failed")
    if event.reason == "deadline":
        raise APIError(503, f"there was no embedding within {limits.answer_seconds:g} seconds", code="deadline")
    return event.embedding


def _spelled(vector: list[float], body: Embedding) -> list[float] | str:
    if body.encoding_format == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
