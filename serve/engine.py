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
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush
from itertools import count, islice
from time import monotonic, perf_counter, sleep

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from models.decoder import Decoder
from serve.grammar import GrammarError, Grammars
from serve.memory import StateMemory
from serve.pace import Pace
from serve.prefix import PrefixCache
from serve.prompt_logprobs import read_prompts
from serve.prompts import Prompts
from serve.replay import recording
from serve.request import DEFAULT, Event, Request, Result
from serve.sampler import Logprobs, Sampling, logprobs, sample
from serve.scheduler import Scheduler, Sequence, Work
from serve.shaping import Shaper, shape
from serve.speculative import Draft, Drafter, Speculation
from serve.step import Call, Part, Step, grouped
from serve.text import TextStream
from serve.timing import Timing

EOS, END = "<|eos|>", "<|end|>"  # of a document, and of a turn in a chat
PIECE = 64  # tokens of a page at least, where each call computes one


class Engine:
    """Continuous batching over the rows of one decoder. Not thread-safe, but for `prompts`.

    model: a causal decoder; it is put in eval mode. tokenizer: for text prompts and stop texts, text in events, the end
    tokens <|eos|> and <|end|>. max_rows, max_len: requests computed together, tokens of prompt and completion.
    memory_bytes: of state, None for as much as max_rows rows of max_len tokens need. chunk, page: tokens of prompts in
    a step at most, and of a page at least. ends: spellings of further end tokens. drafter: guesses tokens that calls
    then check. prefix_cache: what was computed of a prompt is found again by those that begin the same; isolated: of
    the same key only. preempt: what becomes of the state of a request that must wait: recompute, or offload to the
    host.
    batch_invariant: the numbers of a request depend on itself alone, to the last bit, whoever else is there, however
    often it is preempted, and when another engine on an equal machine goes on with it. A call then computes one
    request, in runs that follow from its prompt, so many requests take as long as one after the other.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int = 32,
        max_len: int = 2048,
        memory_bytes: int | None = None,
        chunk: int = 2048,
        page: int = 16,
        ends: Items[str] = (),
        drafter: Drafter | None = None,
        prefix_cache: bool = True,
        isolated: bool = False,
        preempt: str = "recompute",
        batch_invariant: bool = False,
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
        if preempt not in ("recompute", "offload"):
            raise ValueError(f"preempt={preempt!r}: must be 'recompute' or 'offload'")
        if batch_invariant and drafter is not None:
            raise ValueError("batch_invariant: drafts are checked in calls that plain decoding does not make")
        page = max(page, PIECE) if batch_invariant else page
        spec = model.state_spec(max_len)
        self.memory = StateMemory(spec, max_rows, max_len, memory_bytes, page, self.device, sharing=prefix_cache)
        self.cache = PrefixCache(self.memory) if prefix_cache else None
        self.pace = Pace(chunk)
        self.call = Step(self.model, self.memory, trees=drafter is not None and drafter.trees)
        self.speculation = None if drafter is None else Speculation(drafter)
        self.scheduler = Scheduler(
            self.memory, self.pace, self.cache, preempt == "offload", isolated, batch_invariant, self._forget
        )
        known = [] if tokenizer is None else [tokenizer.token_to_id(end) for end in (EOS, END, *ends)]
        self.ends = frozenset(token for token in known if token is not None)
        self.grammars = Grammars(tokenizer, model.config.vocab, self.ends)
        self.prompts = Prompts(tokenizer, model.config.vocab, max_len, self.memory.longest)
        self._ids = count()
        self._steps = self._generated = 0
        self._timing = Timing()
        self._live: dict[int, Sequence] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap of times and requests
        self._pending: list[Event] = []

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether there is anything for `step` to do."""
        return bool(self._live or self._pending)

    def submit(self, request: Request) -> int:
        """Take a request in and return its id, the `id` of its events. ValueError as in `Prompts.check`."""
        self.prompts.check(request)
        sampling = request.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        text = None if self.tokenizer is None else TextStream(self.tokenizer, sampling.stop)
        for token in request.resumed if text else ():
            text.push(token)
        tokens = [*request.prompt, *request.resumed]
        sequence = Sequence(next(self._ids), tokens, sampling, len(request.prompt), text)
        sequence.priority, sequence.key, sequence.embed = request.priority, request.key, request.embed
        if sampling.prompt_logprobs is not None and not request.resumed:  # else they were told with the first token
            sequence.prompt_logprobs = []
        if sampling.shaped:
            try:
                matcher = self.grammars.matcher(sampling.grammar) if sampling.grammar else None
                sequence.shaper = Shaper(sampling, request.prompt, request.resumed, self.ends, matcher)
            except GrammarError as error:  # whoever asks first (`Grammars.matcher`) never gets here
                self._pending.append(Event(sequence.id, None, "", "error", error=error))
                return sequence.id
        self._live[sequence.id] = sequence
        self.scheduler.submit(sequence)
        if request.deadline is not None:
            heappush(self._deadlines, (monotonic() + request.deadline, sequence.id))
        return sequence.id

    def cancel(self, id: int) -> None:
        """End a request now; its row is free, and the next step reports it. One that has ended is left alone."""
        self._stop(id, "cancelled")

    def _stop(self, id: int, reason: str) -> None:
        sequence = self._live.get(id)
        if sequence is not None:
            self._end(sequence)
            self._pending.append(Event(id, None, "", reason, cached=sequence.cached or 0))

    def stats(self) -> dict[str, float]:
        """Numbers for /metrics, from any thread.

        running, waiting: requests; rows: that can run. pages_used, pages_total: pages of running requests, and all.
        prefix_queries, prefix_hits: tokens looked for in the prefix cache, and found; evictions: blocks it gave up.
        preemptions, steps; generated, drafted, accepted: tokens. Histograms as of `serve.timing`.
        """
        scheduler, memory, cache, speculation = self.scheduler, self.memory, self.cache, self.speculation
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "rows": memory.rows,
            "pages_used": memory.used_pages,
            "pages_total": memory.pages,
            "prefix_queries": cache.queries if cache else 0,
            "prefix_hits": cache.hits if cache else 0,
            "evictions": cache.evictions if cache else 0,
            "preemptions": scheduler.preemptions,
            "drafted": speculation.drafted if speculation else 0,
            "accepted": speculation.accepted if speculation else 0,
            "drafts": speculation.drafts if speculation else 0,
            "steps": self._steps,
            "generated": self._generated,
            **self._timing.stats(),
        }

    # -- steps ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one step. A request in it gets no event, one, or with speculation several, in order."""
        while self._deadlines and self._deadlines[0][0] <= monotonic():
            self._stop(heappop(self._deadlines)[1], "deadline")
        events, self._pending = self._pending, []
        work = self.scheduler.plan()
        self._steps += bool(work)
        begun = begin = perf_counter()
        drafts, computed = self._drafts(work), 0
        while work:
            computed += sum(tokens for _, tokens in work)
            parts = [Part(sequence, tokens, drafts.get(sequence.id)) for sequence, tokens in work]
            for group in grouped(parts, alone=self.scheduler.invariant):
                call = self.call(group)
                events += self._finish(call)
                begin, since = perf_counter(), begin
                self._timed(call, begin - since)
            work, drafts = self.scheduler.rest(), {}
        if computed:
            self._timing.add("step", computed)
        self.pace.stepped(perf_counter() - begun)
        return events

    def _timed(self, call: Call, seconds: float) -> None:
        """What a call costs decides how much the next steps compute."""
        parts = call.parts
        if any(part.tokens > 1 for part in parts):
            self.pace.computed(sum(part.tokens for part in parts), seconds)
        else:
            self.pace.generated(len(parts), seconds)
            if self.speculation is not None and call.usual:
                self.speculation.timed(len(parts), call.x_BTD.shape[1], seconds)

    def _drafts(self, work: Work) -> dict[int, Draft]:
        """Drafts by sequence, for those that lack only their last token."""
        if self.speculation is None:
            return {}
        sequences = [sequence for sequence, _ in work if sequence.missing == 1]
        if not sequences:
            return {}

        def room(sequence: Sequence) -> int:
            left = sequence.sampling.max_tokens - sequence.generated
            return min(left, self.scheduler.room(sequence) or left) - 1

        def ready(tokens: int) -> bool:
            return self.call.ready(tuple(sequence.row for sequence in sequences), tokens)

        drafts = self.speculation.propose(sequences, room, ready)
        return {
            sequence.id: draft
            for sequence, draft in zip(sequences, drafts)
            if draft is not None and self.memory.grow(sequence.row, len(sequence.tokens) + max(draft.depths()))
        }

    def _finish(self, call: Call) -> list[Event]:
        """Draws the next tokens of the sequences of a call, keeps what drafts were right about, tells of both."""
        ready = [part for part in call.parts if part.complete]
        drawn = iter(self._draw(ready, call.logits_NC) if ready else ())
        outcomes = [next(drawn) if part.complete else [] for part in call.parts]
        paths = [
            part.draft.follow([token for token, _ in outcome]) if part.draft and isinstance(outcome, list) else []
            for part, outcome in zip(call.parts, outcomes)
        ]
        read_prompts(self.model, call)
        call.commit(paths)
        events = []
        for index, (part, path, outcome) in enumerate(zip(call.parts, paths, outcomes)):
            sequence = part.sequence
            if self.speculation is not None:
                if self.speculation.drafter.reads:
                    self.speculation.drafter.see(sequence, call.outputs(index, path))
                if part.draft:
                    self.speculation.learn(sequence, part.draft, path)
            self.scheduler.computed(sequence, part.tokens + len(path))
            if isinstance(outcome, Exception):
                events.append(self._fail(sequence, outcome))
            elif outcome and sequence.embed:
                events.append(self._embedded(sequence, call.x_BTD[index, part.tokens - 1]))
            elif outcome and not sequence.sampling.max_tokens:
                self._end(sequence)
                events.append(Event(sequence.id, None, "", "length", **self._told_once(sequence)))
            elif outcome:
                events += self._accept_all(sequence, [outcome[0], *(outcome[1 + node] for node in path)])
        return events

    def _draw(self, parts: list[Part], logits_NC: Tensor) -> list[list[tuple[int, Logprobs | None]] | Exception]:
        """For each part the token drawn after its last known one, then after each of its draft.

        What breaks is tried again one by one: who breaks alone ends alone.
        """
        samplings, positions, wanted = [], [], []
        for part in parts:
            sequence, draft = part.sequence, part.draft
            sampling = sequence.sampling
            samplings += [sampling] * part.wanted
            positions += [sequence.generated + depth for depth in (0, *(draft.depths() if draft else ()))]
            wanted.append((sequence.shaper, ()))
            for node in range(part.wanted - 1):
                wanted.append((sequence.shaper, draft.ancestry(node) if sequence.shaper else ()))
        try:
            tokens = sample(shape(logits_NC, wanted), samplings, positions)
            told = logprobs(logits_NC, tokens, [sampling.logprobs for sampling in samplings])
        except Exception as error:
            if not bool(logits_NC.amax(-1).isfinite().all()):  # the model broke, and what others share may be damaged
                raise
            if len(parts) == 1:
                return [error]
            own = logits_NC.split([part.wanted for part in parts])
            return [self._draw([part], logits_NC)[0] for part, logits_NC in zip(parts, own)]
        drawn = iter(zip(tokens, told))
        return [list(islice(drawn, part.wanted)) for part in parts]

    def _embedded(self, sequence: Sequence, x_D: Tensor) -> Event:
        """The output at the last token of a prompt, of length 1."""
        self._end(sequence)
        return Event(sequence.id, None, "", "stop", embedding=normalize(x_D.float(), dim=0).tolist())

    def _fail(self, sequence: Sequence, error: Exception) -> Event:
        """Ends one sequence, and goes on with the others."""
        self._end(sequence)
        return Event(sequence.id, None, "", "error", error=error)

    def _end(self, sequence: Sequence) -> None:
        del self._live[sequence.id]  # first: one that has ended already is an error of the engine
        self.scheduler.remove(sequence)
        self._forget(sequence)
        if sequence.first is not None:
            self._timing.ended(sequence.arrived, sequence.begun, sequence.first, perf_counter())

    def _forget(self, sequence: Sequence) -> None:
        if self.speculation is not None:
            self.speculation.forget(sequence)

    def _accept_all(self, sequence: Sequence, drawn: list[tuple[int, Logprobs | None]]) -> list[Event]:
        """The next tokens of a sequence, up to the one that ends it."""
        events = []
        try:
            for token, told in drawn:
                events.append(self._accept(sequence, token, told))
                if events[-1].reason is not None:
                    break
        except Exception as error:
            events.append(self._fail(sequence, error))
        return events

    def _accept(self, sequence: Sequence, token: int, told: Logprobs | None) -> Event:
        """The next token of a sequence, and whether it is the last."""
        sequence.tokens.append(token)
        sequence.generated += 1
        if sequence.first is None:
            sequence.first = perf_counter()
        self._generated += 1
        sampling, stream, text, reason = sequence.sampling, sequence.text, "", None
        offset = 0 if stream is None else stream.length
        if (token in self.ends and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            reason = "stop"
        else:
            if stream is not None:
                text = stream.push(token)
                reason = "stop" if stream.stopped else None
            if sequence.shaper is not None:
                sequence.shaper.push(token)
                reason = "stop" if sequence.shaper.finished else reason
        if reason is None and sequence.generated >= sampling.max_tokens:
            reason = "length"
        if reason is not None:
            text += stream.close() if stream is not None else ""
            self._end(sequence)
        return Event(sequence.id, token, text, reason, told, offset, **self._told_once(sequence))

    def _told_once(self, sequence: Sequence) -> dict[str, object]:
        """What the first event of a sequence tells of its prompt."""
        found = {"cached": sequence.cached, "prompt_logprobs": sequence.prompt_logprobs}
        sequence.cached, sequence.prompt_logprobs = 0, None
        return found

    def warm(self) -> None:
        """Do now what is slow once: kernels are built, and steps are recorded of one row and of several, with drafts of
        every width and of short prompts."""
        replay, sampling = self.call.replay, Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)
        usual, replay.after, replay.aside = (replay.after, replay.aside), 1, False
        self.generate([[0, 0]], sampling)
        self.generate([[0, 0], [0, 0, 0]], sampling)
        replay.after, replay.aside = usual
        for rows in (1, min(2, self.memory.rows)):
            self.call.ready_for_prompts(range(rows), min(self.pace.chunk, self.memory.longest))
            if self.speculation is not None:
                self.speculation.ready(rows, partial(self.call.ready, range(rows)))
        while recording():
            sleep(0.01)

    # -- a whole batch -------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Iterable[str | Items[int]], sampling: Sampling | Items[Sampling] = DEFAULT
    ) -> list[Result]:
        """Complete `prompts`, texts or token ids, with one sampling for all or one each. Blocks until all are done.

        When something breaks one of them, it is raised in the end.
        """
        prompts = [self.prompts.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(samplings)} samplings")
        requests = [Request(prompt, own) for prompt, own in zip(prompts, samplings)]
        for request in requests:
            self.prompts.check(request)
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
    prompt = next((event.prompt_logprobs for event in events if event.prompt_logprobs is not None), ())
    return Result(tokens, "".join(event.text for event in events), events[-1].reason, told, prompt)
