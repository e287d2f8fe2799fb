"""Log probabilities of a prompt's own tokens, for those who judge texts by a model instead of making them.

They come of the calls that compute the prompt anyway, some places at a time: logits of a whole prompt never exist.
"""

import torch

from models.decoder import Decoder
from models.span import Span
from serve.sampler import logprobs
from serve.step import Call

PLACES = 64  # whose logits exist at a time


def read_prompts(model: Decoder, call: Call) -> None:
    """Adds what `call` tells about the prompts of its sequences to those that want it; before it is committed."""
    for index, part in enumerate(call.parts):
        sequence = part.sequence
        if sequence.prompt_logprobs is None:
            continue
        tokens, told, first = sequence.tokens, sequence.prompt_logprobs, sequence.computed
        end = min(first + part.tokens, sequence.prompt - 1)  # the last token's logits are of what is generated
        while (place := max(first, len(told))) < end:
            stop = min(place + PLACES, end)
            position_N1 = torch.arange(place, stop, device=call.x_BTD.device)[:, None]
            ids_N1 = torch.tensor(tokens[place:stop], device=call.x_BTD.device)[:, None]
            x_N1D = call.x_BTD[index, place - first : stop - first, None]
            logits_NC = model.head(x_N1D, Span(position_N1, ids_N1))[0][:, 0]
            counts = [sequence.sampling.prompt_logprobs] * (stop - place)
            told += logprobs(logits_NC, tokens[place + 1 : stop + 1], counts)
