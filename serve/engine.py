"""The engine: requests in, events out, one step of the model at a time. Plain torch, one thread, no HTTP.

    engine = Engine(model, tokenizer)
    engine.submit(Request(prompt=[1, 2, 3], sampling=Sampling(max_tokens=8)))
    while engine.busy:
        for event in engine.step(): ...

Every architecture is served the same way, through its state: `serve.memory` lends rows and pages, `serve.scheduler`
says which tokens a step computes, the model computes them, `serve.sampler` draws the next ones.
"""

import secrets
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import count

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.decoder import Decoder
from models.span import Span
from serve.memory import StateMemory
from serve.sampler import Logprobs, Sampling, logprobs, penalize, sample
from serve.scheduler import Scheduler, Sequence, Work
from serve.text import TextStream

BOS, EOS, END = "<|bos|>", "<|eos|>", "<|end|>"  # of a document, and of a turn in a chat
_DEFAULT = Sampling()
_SPARSE = 0.3  # rows of different lengths share a call when at most this part of it is padding; measured on a CPU


@dataclass(frozen=True)
class Request:
    """prompt: token ids. resumed: tokens generated elsewhere with the same seed; the stream goes on after them."""

    prompt: Items[int]
    sampling: Sampling = _DEFAULT
    resumed: Items[int] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """What a step did for request `id`: a token (None: none), the text that became certain, why it ended (None: not).

    reason: stop (end token or stop text), length, cancelled, error. logprobs: when the request asks for them. offset:
    whole characters of the completion before the token. error: what broke this request, and no other.
    """

    id: int
    token: int | None
    text: str
    reason: str | None
    logprobs: Logprobs | None = None
    offset: int = 0
    error: Exception | None = None


@dataclass(frozen=True)
class Result:
    """A whole completion. tokens: all that were generated, with the end token if there was one.

    logprobs: of each token, when they were asked for.
    """

    tokens: list[int]
    text: str
    reason: str
    logprobs: list[Logprobs]


class Engine:
    """Continuous batching over the rows of one decoder. Not thread-safe, but for `check` and `encode`.

    model: a causal decoder; it is put in eval mode. tokenizer: for text prompts and stop texts, text in events, the end
    tokens <|eos|> and <|end|>. max_rows, max_len: requests computed together, tokens of prompt and completion.
    memory_bytes: of state, None for as much as max_rows rows of max_len tokens need. chunk: prompt tokens of a step.
    page: entries of a page. ends: spellings of further end tokens.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int = 32,
        max_len: int = 2048,
        memory_bytes: int | None = None,
        chunk: int = 256,
        page: int = 16,
        ends: Items[str] = (),
    ) -> None:
        if not isinstance(model, Decoder) or not model.causal:
            raise ValueError(
                f"{type(model).__name__} is not a causal decoder, so it cannot be served as a language model"
            )
        if model.needs_memory:
            raise ValueError(
                f"{type(model).__name__} needs an encoder's output beside each prompt, which cannot be given here; "
                "serve a decoder without cross attention"
            )
        self.model, self.tokenizer, self.max_len = model.eval(), tokenizer, max_len
        self.device = model.embedding.weight.device
        self.memory = StateMemory(model.state_spec(max_len), max_rows, max_len, memory_bytes, page, self.device)
        self.scheduler = Scheduler(self.memory, chunk)
        known = [] if tokenizer is None else [tokenizer.token_to_id(end) for end in (EOS, END, *ends)]
        self.ends = frozenset(token for token in known if token is not None)
        vocab = () if tokenizer is None else tokenizer.get_vocab()
        self._longest_text = max_len * max((len(token.encode()) for token in vocab), default=0)  # in bytes
        self._ids = count()
        self._live: dict[int, Sequence] = {}
        self._pending: list[Event] = []

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether there is anything for `step` to do."""
        return bool(self._live or self._pending)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text prompt, which opens a document. ValueError without a tokenizer, or as `check_text`."""
        if self.tokenizer is None:
            raise ValueError("prompt: the model has no tokenizer, so the prompt must be token ids")
        self.check_text(text)
        start = self.tokenizer.token_to_id(BOS)
        return ([] if start is None else [start]) + self.tokenizer.encode(text, add_special_tokens=False).ids

    def check_text(self, *texts: str) -> None:
        """ValueError when `texts`, one after the other, are too long whatever their tokens: it is told at once."""
        size = sum(len(text.encode()) for text in texts)
        if size > self._longest_text:
            raise ValueError(
                f"prompt has {size} bytes, more than any {self.max_len} tokens of this model: together with max_tokens "
                f"at most {self.max_len} are allowed"
            )

    def check(self, request: Request) -> None:
        """ValueError when `request` can never be answered."""
        vocab, sampling = self.model.config.vocab, request.sampling
        if not request.prompt:
            raise ValueError("prompt: must have at least one token")
        if len(request.resumed) >= sampling.max_tokens:
            raise ValueError(f"resumed: {len(request.resumed)} tokens, but max_tokens={sampling.max_tokens}")
        total = len(request.prompt) + sampling.max_tokens
        if total > self.max_len:
            raise ValueError(
                f"prompt has {len(request.prompt)} tokens and max_tokens is {sampling.max_tokens}: together at most "
                f"{self.max_len} are allowed"
            )
        wrong = next((t for t in (*request.prompt, *request.resumed) if not 0 <= t < vocab), None)
        if wrong is not None:
            raise ValueError(f"prompt: token {wrong} is not in the vocabulary of {vocab} tokens")
        if not self.memory.fits(total):
            raise ValueError(
                f"prompt and max_tokens together are {total} tokens, more than fit into the engine's memory"
            )
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: the model has no tokenizer, so there is no text to compare with")

    def submit(self, request: Request) -> int:
        """Take a request in and return its id, the `id` of its events. ValueError as in `check`."""
        self.check(request)
        sampling = request.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        text = None if self.tokenizer is None else TextStream(self.tokenizer, sampling.stop)
        for token in request.resumed if text else ():
            text.push(token)
        tokens = [*request.prompt, *request.resumed]
        sequence = Sequence(next(self._ids), tokens, sampling, len(request.prompt), text)
        self._live[sequence.id] = sequence
        self.scheduler.waiting.append(sequence)
        return sequence.id

    def cancel(self, id: int) -> None:
        """End a request now; its row is free, and the next step reports it. One that has ended is left alone."""
        sequence = self._live.pop(id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self._pending.append(Event(id, None, "", "cancelled"))

    # -- steps ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one step; at most one event per request that was in it."""
        events, self._pending = self._pending, []
        ready, logits = [], []
        for group in _groups(self.scheduler.plan()):
            done = self._compute(group)
            if done is not None:
                logits.append(done)
                ready += [sequence for sequence, _ in group if not sequence.missing]
        if ready:
            events += self._draw(ready, logits[0] if len(logits) == 1 else torch.cat(logits))
        return events

    def _compute(self, group: Work) -> Tensor | None:
        """One call of the model; logits after the rows whose tokens are now all computed."""
        rows = tuple(sequence.row for sequence, _ in group)
        width = max(tokens for _, tokens in group)
        ids, ragged = [], False
        for sequence, tokens in group:
            part = sequence.tokens[sequence.computed : sequence.computed + tokens]
            ids.append(part + [0] * (width - tokens))
            ragged |= tokens < width
            sequence.computed += tokens
        ids_BT, segments_BT = torch.tensor(ids, device=self.device), None
        if ragged:
            lengths_B1 = torch.tensor([[tokens] for _, tokens in group], device=self.device)
            segments_BT = -(torch.arange(width, device=self.device) >= lengths_B1).long()
        x_BTD, at, state = self.model.hidden(ids_BT, self.memory.take(rows), segments_BT)
        self.memory.put(rows, state)
        last = [(row, tokens - 1) for row, (sequence, tokens) in enumerate(group) if not sequence.missing]
        if not last:
            return None
        if width > 1 or len(last) < len(group):
            row_N, column_N = torch.tensor(last, device=self.device).unbind(1)
            at = Span(at.positions_BT[row_N, column_N][:, None], ids_BT[row_N, column_N][:, None])
            x_BTD = x_BTD[row_N, column_N][:, None]
        return self.model.head(x_BTD, at)[0][:, 0]

    def _draw(self, ready: list[Sequence], logits_BC: Tensor) -> list[Event]:
        """The next token of each sequence. What breaks is tried again one by one: who breaks alone ends alone."""
        samplings = [sequence.sampling for sequence in ready]
        try:
            generated = [s.tokens[s.prompt :] if s.sampling.penalized else () for s in ready]
            tokens = sample(penalize(logits_BC, samplings, generated), samplings, [s.generated for s in ready])
            told = logprobs(logits_BC, tokens, samplings)
        except FloatingPointError:  # it is the model that broke, and the memory others share may be damaged
            raise
        except Exception as error:
            if len(ready) == 1:
                return [self._fail(ready[0], error)]
            return [self._draw([sequence], logits_BC[row : row + 1])[0] for row, sequence in enumerate(ready)]
        events = []
        for sequence, token, own in zip(ready, tokens, told):
            try:
                events.append(self._accept(sequence, token, own))
            except Exception as error:
                events.append(self._fail(sequence, error))
        return events

    def _fail(self, sequence: Sequence, error: Exception) -> Event:
        """Ends one sequence, and goes on with the others."""
        del self._live[sequence.id]  # first: one that has ended already is an error of the engine
        self.scheduler.remove(sequence)
        return Event(sequence.id, None, "", "error", error=error)

    def _accept(self, sequence: Sequence, token: int, told: Logprobs | None) -> Event:
        """The next token of a sequence, and whether it is the last."""
        sequence.tokens.append(token)
        sequence.generated += 1
        sampling, stream, text, reason = sequence.sampling, sequence.text, "", None
        offset = 0 if stream is None else stream.length
        if token in self.ends and not sampling.ignore_eos:
            reason = "stop"
        elif stream is not None:
            text = stream.push(token)
            reason = "stop" if stream.stopped else None
        if reason is None and sequence.generated >= sampling.max_tokens:
            reason = "length"
        if reason is not None:
            text += stream.close() if stream is not None else ""
            self.scheduler.remove(sequence)
            del self._live[sequence.id]
        return Event(sequence.id, token, text, reason, told, offset)

    # -- a whole batch -------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Iterable[str | Items[int]], sampling: Sampling | Items[Sampling] = _DEFAULT
    ) -> list[Result]:
        """Complete `prompts`, texts or token ids, with one sampling for all or one each. Blocks until all are done.

        When something breaks one of them, it is raised in the end.
        """
        prompts = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(samplings)} samplings")
        requests = [Request(prompt, own) for prompt, own in zip(prompts, samplings)]
        for request in requests:
            self.check(request)
        ids = [self.submit(request) for request in requests]
        mine: dict[int, list[Event]] = {id: [] for id in ids}
        others, open_ids = [], set(ids)
        while open_ids:
            for event in self.step():
                mine.get(event.id, others).append(event)
                if event.reason is not None:
                    open_ids.discard(event.id)
        self._pending += others
        broken = next((events[-1].error for events in mine.values() if events[-1].error is not None), None)
        if broken is not None:
            raise broken
        return [_result(events) for events in mine.values()]


def _result(events: list[Event]) -> Result:
    tokens = [event.token for event in events if event.token is not None]
    told = [event.logprobs for event in events if event.logprobs is not None]
    return Result(tokens, "".join(event.text for event in events), events[-1].reason, told)


def _groups(work: Work) -> list[Work]:
    """One call each: the single tokens together, the longer runs with others of similar length."""
    groups = [[item for item in work if item[1] == 1]]
    total = 0
    for item in sorted((item for item in work if item[1] > 1), key=lambda item: -item[1]):
        group = groups[-1]
        if len(groups) > 1 and total + item[1] >= (1 - _SPARSE) * group[0][1] * (len(group) + 1):
            group.append(item)
            total += item[1]
        else:
            groups.append([item])
            total = item[1]
    return [group for group in groups if group]


def load(path: str, **options: object) -> Engine:
    """The engine of a run (its newest checkpoint) or a model folder. One line of ValueError when it is not one.

    The `eos_token` of a tokenizer_config.json in it is an end token too.
    """
    from cluster import folder
    from models import hub
    from serve.chat import CONFIG, spelling

    place = hub.locate(path)
    stored = folder.load(place)
    tokenizer = Tokenizer.from_str(stored.text("tokenizer.json")) if "tokenizer.json" in stored else None
    end = spelling(stored.json(CONFIG).get("eos_token")) if CONFIG in stored else ""
    model = hub.load(place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Engine(model.to(device), tokenizer, ends=[end] if end else [], **options)
