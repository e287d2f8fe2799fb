"""What goes into an engine and what comes out of it: plain values, which also travel between processes."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from serve.sampler import Logprobs, Sampling

DEFAULT = Sampling()


@dataclass(frozen=True)
class Request:
    """prompt: token ids. resumed: tokens generated elsewhere with the same seed; the stream goes on after them.

    priority: lower comes first. deadline: seconds from submission, after which it is cancelled. key: whose it is; keys
    get equal shares of what is computed.
    """

    prompt: Items[int]
    sampling: Sampling = DEFAULT
    resumed: Items[int] = ()
    priority: int = 0
    deadline: float | None = None
    key: str = ""
    embed: bool = False  # no tokens, but the model's output at the last token of the prompt, of length 1


@dataclass(frozen=True, slots=True)
class Event:
    """What a step did for request `id`: a token (None: none), the text that became certain, why it ended (None: not).

    reason: stop (end token or stop text), length, cancelled, deadline, error. logprobs: when the request asks for them.
    offset: whole characters of the completion before the token. error: what broke this request, and no other. cached:
    tokens of the prompt that were found in the prefix cache, told with the first event. prompt_logprobs: of all tokens
    of the prompt but the first, which nothing predicts; told with the first event too, when the request asks for them.
    """

    id: int
    token: int | None
    text: str
    reason: str | None
    logprobs: Logprobs | None = None
    offset: int = 0
    error: Exception | None = None
    cached: int = 0
    embedding: list[float] | None = None
    prompt_logprobs: Items[Logprobs] | None = None


@dataclass(frozen=True)
class Result:
    """A whole completion. tokens: all that were generated, with the end token if there was one.

    logprobs, prompt_logprobs: of each token, and of each of the prompt but the first, when they were asked for.
    """

    tokens: list[int]
    text: str
    reason: str
    logprobs: list[Logprobs]
    prompt_logprobs: Items[Logprobs] = ()
