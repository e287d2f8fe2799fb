"""What every sequence part must keep, as functions that take a decoder and raise AssertionError when it does not.

They are generated over the registry in test_contract.py and turned against planted faults in test_plants.py.
"""

import dataclasses
import random
import typing
from contextlib import contextmanager

import torch

import models
from models import registry
from models.config import make_config, to_text
from models.decoder import Decoder
from models.layers.choice import Choice
from models.state import Pages, fork, put, restore, select, snapshot, take
from models.stateful import Place, Stateful

TOKENS = 23
TIE = 1e-5  # scores closer than this may change places by rounding
OTHER_PARTS = {
    "positions": ["nope"],
    "scores": ["ssmax"],
    "cache": ["kv_compression(budget=8)"],
    "pattern": ["lstm"],
    "ffn": ["channel_mix"],
}  # of options that name a part


def same(a, b, tolerance=1e-4, what=""):
    """Equal relative to the scale of the values; fp32 through four layers differed by 3.5e-5 at worst of 300 draws."""
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    error = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: error {error:.2e} at scale {scale:.2e}"


def tokens(decoder, rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(decoder.config.vocab, (rows, length), generator=generator)


def documents(rows, length, seed, padding=True):
    """Random document ids (B, T): changes at random columns, -1 at random columns."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(rows, length, generator=generator) < 0.15).long().cumsum(1)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.2, -1, ids) if padding else ids


def paged(decoder, rows, max_len, size, seed=0):
    """The state of `init_state`, but growing tensors in shuffled pages of `size` entries, poisoned with NaN.

    Tensors of as many pages have one table, as those that are appended together must.
    """
    generator, orders = torch.Generator().manual_seed(seed), {}
    state, spec = decoder.init_state(rows, max_len), decoder.state_spec(max_len)
    for name, value in state.items():
        if spec[name].every:
            blocks = -(-value.shape[1] // size)
            if blocks not in orders:
                orders[blocks] = torch.randperm(rows * blocks, generator=generator).view(rows, blocks) + 1
            pool = torch.full((rows * blocks + 1, size, *value.shape[2:]), float("nan"), dtype=value.dtype)
            state[name] = Pages(pool, orders[blocks])
    return state


def in_chunks(decoder, ids, cuts, state, segments=None):
    """Logits over the whole row, computed in chunks that carry the state."""
    outputs = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        part = None if segments is None else segments[:, start:end]
        logits, state = decoder.logits(ids[:, start:end], state, part)
        outputs.append(logits)
    return torch.cat(outputs, 1), state


def real(logits, segments):
    """Logits with those of padding zeroed: they are unspecified, but must be finite."""
    assert logits.isfinite().all(), "an output is not finite"
    return logits if segments is None else logits * (segments >= 0)[..., None]


def split_anywhere(decoder, seed, state_of=Decoder.init_state):
    """Any cuts, with documents and padding or without: the logits of one pass."""
    pick = random.Random(seed)
    ids = tokens(decoder, 3, TOKENS, seed)
    for segments in (None, documents(3, TOKENS, seed)):
        whole = real(decoder.logits(ids, None, segments)[0], segments)
        one_call, _ = decoder.logits(ids, state_of(decoder, 3, TOKENS + 9), segments)
        same(real(one_call, segments), whole, what="one call with a state")
        for _ in range(3):
            cuts = sorted(pick.sample(range(1, TOKENS), pick.randint(1, 8)))
            parts, _ = in_chunks(decoder, ids, cuts, state_of(decoder, 3, TOKENS + 9), segments)
            same(real(parts, segments), whole, what=f"cut at {cuts}")


def step_by_step(decoder, seed, state_of=Decoder.init_state):
    ids, segments = tokens(decoder, 2, TOKENS, seed), documents(2, TOKENS, seed)
    for ids_of in (None, segments):
        whole = real(decoder.logits(ids, None, ids_of)[0], ids_of)
        steps, _ = in_chunks(decoder, ids, range(1, TOKENS), state_of(decoder, 2, TOKENS), ids_of)
        same(real(steps, ids_of), whole, what="one token at a time")


def ragged_rows(decoder, seed, state_of=Decoder.init_state):
    """Rows of different lengths, padded left, right or in the middle, then stepped together: each as if alone."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, TOKENS, 11, 1]
    ids = tokens(decoder, 4, TOKENS + 4, seed)
    keep = torch.zeros(4, TOKENS, dtype=torch.bool)
    for row, length in enumerate(lengths):
        keep[row, torch.randperm(TOKENS, generator=generator)[:length]] = True
    padded = torch.zeros(4, TOKENS, dtype=torch.int64)
    for row, length in enumerate(lengths):
        padded[row, keep[row]] = ids[row, :length]
    together, state = decoder.logits(padded, state_of(decoder, 4, TOKENS + 4), torch.where(keep, 0, -1))
    steps = []
    for step in range(4):
        column = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])[:, None]
        logits, state = decoder.logits(column, state)
        steps.append(logits)
    steps = torch.cat(steps, 1)
    for row, length in enumerate(lengths):
        alone, _ = decoder.logits(ids[row : row + 1, : length + 4])
        same(together[row, keep[row]], alone[0, :length], what=f"padded row {row}")
        same(steps[row], alone[0, length:], what=f"steps after row {row}")


def documents_apart(decoder, seed):
    """Packed documents equal the same documents alone, also when the second begins inside a carried row."""
    ids = tokens(decoder, 1, TOKENS, seed)
    segments = torch.tensor([[4] * 9 + [7] * 5 + [2] * (TOKENS - 14)])
    whole, _ = decoder.logits(ids, None, segments)
    carried, _ = in_chunks(decoder, ids, [5, 12], decoder.init_state(1, TOKENS), segments)
    for start, end in ((0, 9), (9, 14), (14, TOKENS)):
        alone, _ = decoder.logits(ids[:, start:end])
        same(whole[:, start:end], alone, what="packed")
        same(carried[:, start:end], alone, what="packed in a carried row")


def padding_writes_nothing(decoder, seed, state_of=Decoder.init_state):
    """A call of padding alone leaves every fixed tensor bit-equal, and the row goes on as if it had not been."""
    ids = tokens(decoder, 2, TOKENS, seed)
    _, before = decoder.logits(ids[:, :9], state_of(decoder, 2, TOKENS))
    expected, _ = decoder.logits(ids[:, 9:], restore(before, copy := snapshot(before)))
    before = restore(before, copy)
    _, after = decoder.logits(ids[:, :7] * 0, before, torch.full((2, 7), -1))
    for name, value in after.items():
        if not isinstance(value, Pages):
            assert torch.equal(value, copy[name]), f"padding wrote {name}"
    same(decoder.logits(ids[:, 9:], after)[0], expected, what="after padding")


def kept_states(decoder, seed, state_of=Decoder.init_state):
    """keep=k then select: each row goes on as if its call had ended where it was cut."""
    ids = tokens(decoder, 5, TOKENS, seed)
    for segments, kept in ((None, 4), (documents(5, 10, seed).clamp(max=0), 10)):
        _, prefix = decoder.logits(ids[:, :6], state_of(decoder, 5, TOKENS + 9))
        _, state = decoder.logits(ids[:, 6:16], prefix, segments, keep=kept)
        ends = torch.tensor([0, kept, 1, kept - 1, 2])
        going_on, _ = decoder.logits(ids[:, 16:], select(state, ends))
        for row, end in enumerate(ends.tolist()):
            stop = 16 - kept + end
            _, alone = decoder.logits(ids[row : row + 1, :6], decoder.init_state(1, TOKENS + 9))
            if stop > 6:
                part = None if segments is None else segments[row : row + 1, : stop - 6]
                _, alone = decoder.logits(ids[row : row + 1, 6:stop], alone, part)
            same(going_on[row : row + 1], decoder.logits(ids[row : row + 1, 16:], alone)[0], what=f"cut at {end}")


def no_keeping_across_documents(decoder, seed):
    """A call that begins a document in a carried row overwrites its cache, so it cannot be rolled back: an error."""
    ids = tokens(decoder, 1, TOKENS, seed)
    _, state = decoder.logits(ids[:, :6], decoder.init_state(1, TOKENS))
    try:
        decoder.logits(ids[:, 6:9], state, torch.tensor([[0, 0, 5]]), keep=2)
    except ValueError:
        return
    raise AssertionError("keep across the start of a document was accepted")


def snapshots(decoder, seed, state_of=Decoder.init_state):
    """snapshot, run on, restore: never happened."""
    ids = tokens(decoder, 2, TOKENS, seed)
    _, state = decoder.logits(ids[:, :9], state_of(decoder, 2, TOKENS + 9))
    copy = snapshot(state)
    expected, after = decoder.logits(ids[:, 9:14], state)
    decoder.logits(ids[:, 14:], after)
    again, _ = decoder.logits(ids[:, 9:14], restore(after, copy))
    assert torch.equal(again, expected), "restored state goes on differently"


def rows_move(decoder, seed):
    """take, put and fork: rows are independent of their place in the batch and of their neighbours."""
    ids = tokens(decoder, 4, TOKENS, seed)
    _, state = decoder.logits(ids[:, :9], decoder.init_state(4, TOKENS))
    expected, _ = decoder.logits(ids[:, 9:], state)
    order = torch.tensor([2, 0, 3, 1])
    same(decoder.logits(ids[order, 9:], take(state, order))[0], expected[order], what="rows taken in another order")
    blank = put(decoder.init_state(4, TOKENS), order, take(state, order))
    same(decoder.logits(ids[:, 9:], blank)[0], expected, what="rows put back")
    eight = fork(take(state, torch.tensor([1])), 8)
    ends = tokens(decoder, 8, 5, seed + 1)
    forked, _ = decoder.logits(ends, eight)
    for row in range(8):
        alone, _ = decoder.logits(torch.cat([ids[1:2, :9], ends[row : row + 1]], 1))
        same(forked[row : row + 1], alone[:, 9:], what="forked row")


def spec_is_true(decoder, seed):
    """State after a call has the names, shapes and dtypes that state_spec declares, rows on dim 0."""
    _, state = decoder.logits(tokens(decoder, 3, 9, seed), decoder.init_state(3, 40))
    spec = decoder.state_spec(40)
    assert state.keys() == spec.keys()
    for name, value in state.items():
        grown = (spec[name].capacity(40),) if spec[name].every else ()
        assert value.shape == (3, *grown, *spec[name].shape) and value.dtype == spec[name].dtype, name


def no_future_leak(decoder, seed):
    """Changing later tokens leaves earlier outputs bit-equal, or equal to rounding if a part says so."""
    exact = all(part.exact for part in decoder.modules() if isinstance(part, Stateful))
    ids = tokens(decoder, 2, TOKENS, seed)
    base, _ = decoder.logits(ids)
    for cut in (1, 7, TOKENS - 1):
        other = ids.clone()
        other[:, cut:] = (other[:, cut:] + 1) % decoder.config.vocab
        changed, _ = decoder.logits(other)
        same(changed[:, :cut], base[:, :cut], 0 if exact else 2e-6, f"tokens from {cut} on changed earlier outputs")
        assert not torch.equal(changed[:, cut:], base[:, cut:])


def gradient_through_state(decoder, seed):
    """The gradient of a later chunk reaches an earlier one through the state as it does in one pass."""
    ids = tokens(decoder, 2, TOKENS, seed)
    parameters = list(decoder.parameters())

    def gradients(logits):
        found = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]

    one_pass = gradients(decoder.logits(ids)[0][:, 9:])
    _, state = decoder.logits(ids[:, :9], decoder.init_state(2, TOKENS))
    through = gradients(decoder.logits(ids[:, 9:], state)[0])
    for (name, _), ours, expected in zip(decoder.named_parameters(), through, one_pass):
        same(ours, expected, 1e-4, what=f"gradient of {name} through the state")


def every_parameter_learns(decoder, seed):
    torch.manual_seed(seed)
    for parameter in decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for training in (True, False):  # further losses are of training, routing without capacity is not
        total, _ = decoder.train(training)(decoder.example(3, seed))
        total.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"no gradient for {name}"


class Decisions:
    """What the `Choice` modules of a decoder decided, in order."""

    def __init__(self):
        self.made = []  # (scores, count, chosen)

    def record(self, module, inputs, chosen):
        self.made.append((*inputs, chosen))

    def gap(self):
        """Between what was last chosen and what was first left out, the smallest of all decisions."""
        gaps = [float("inf")]
        for scores, count, _ in self.made:
            if count < scores.shape[-1]:
                last, left_out = scores.sort(-1, descending=True).values[..., count - 1 : count + 1].unbind(-1)
                real = last > torch.finfo(scores.dtype).min  # what is masked was not up for a decision
                gaps += (last - left_out)[real].tolist()
        return min(gaps)

    @contextmanager
    def watch(self, decoder, hook=None):
        """Record the decisions of the calls inside, or hook them."""
        hooks = [m.register_forward_hook(hook or self.record) for m in decoder.modules() if isinstance(m, Choice)]
        try:
            yield self
        finally:
            for handle in hooks:
                handle.remove()

    def replayed(self, decoder):
        """Decisions of the calls inside are those recorded, one after the other."""
        left = iter(self.made)
        return self.watch(decoder, lambda module, inputs, chosen: next(left)[-1])


def settled(check, decoder, seed):
    """Run a check of two paths; with another seed where it fails and a decision was so close that rounding took it."""
    for attempt in range(4):
        decisions = Decisions()
        try:
            with decisions.watch(decoder):
                return check(decoder, seed + attempt)
        except AssertionError:
            if decisions.gap() > TIE or attempt == 3:
                raise


def low_precision(decoder, seed):
    """bf16 stays close to fp32, decisions replayed: they may fall otherwise where scores are close."""
    ids, decisions = tokens(decoder, 2, TOKENS, seed), Decisions()
    with decisions.watch(decoder):
        expected, _ = decoder.logits(ids, decoder.init_state(2, TOKENS))
    decoder.bfloat16()
    with decisions.replayed(decoder):
        low, _ = decoder.logits(ids, decoder.init_state(2, TOKENS))
    assert low.dtype == torch.bfloat16
    error = (low.float() - expected).norm() / expected.norm()
    decoder.float()
    assert error < 0.03 * (decoder.config.layers + 1), f"bf16 differs from fp32 by {error:.3f}"


def compiles(decoder, seed):
    """torch.compile sees one graph, with a state and without."""
    torch.compiler.reset()
    ids, segments = tokens(decoder, 2, 9, seed), documents(2, 9, seed)
    compiled = torch.compile(decoder.logits, backend="eager", fullgraph=True)
    same(compiled(ids)[0], decoder.logits(ids)[0])
    state = decoder.init_state(2, TOKENS)
    same(compiled(ids, state, segments)[0], decoder.logits(ids, state, segments)[0])


ON_ANY_MEMORY = (
    split_anywhere,
    step_by_step,
    ragged_rows,
    padding_writes_nothing,
    kept_states,
    snapshots,
)
CHECKS = (
    documents_apart,
    rows_move,
    no_keeping_across_documents,
    spec_is_true,
    no_future_leak,
    gradient_through_state,
    every_parameter_learns,
    low_precision,
    compiles,
)


def documents_and_padding_apart(decoder, seed):
    """In one pass packed documents, with padding anywhere, equal the same documents alone."""
    ids, segments = tokens(decoder, 2, TOKENS, seed), documents(2, TOKENS, seed)
    whole = real(decoder.logits(ids, None, segments)[0], segments)
    for row in range(2):
        for document in segments[row].unique().tolist():
            if document >= 0:
                own = segments[row] == document
                same(whole[row, own], decoder.logits(ids[row : row + 1, own])[0][0], what="packed")


def future_is_seen(decoder, seed):
    """What says that it is not causal is not: the first output knows the last token."""
    ids = tokens(decoder, 2, TOKENS, seed)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % decoder.config.vocab
    assert not torch.equal(decoder.logits(other)[0][:, 0], decoder.logits(ids)[0][:, 0])


SEES_AHEAD = (documents_and_padding_apart, future_is_seen, every_parameter_learns, low_precision, compiles)


def live_options(cls, kind):
    """Every field of a part's Config changes shapes, outputs or the loss; returns the names of those that do not."""
    hints = typing.get_type_hints(cls.Config)
    tiny, base = registry.tiny_options(cls), _signature(cls, kind, {})
    dead = []
    for field in dataclasses.fields(cls.Config):
        found = []  # whether each value that can be built changed anything
        for value in _other_values(tiny.get(field.name, field.default), hints[field.name], field.name):
            try:
                changed = _signature(cls, kind, {field.name: value})
            except ValueError:
                continue  # not allowed beside the other defaults; try the next
            found.append(changed[0] != base[0] or not torch.equal(changed[1], base[1]))
            if found[-1]:
                break
        assert found, f"no other value of {field.name} could be built"
        if not any(found):
            dead.append(field.name)
    return dead


def _other_values(value, hint, name):
    if typing.get_origin(hint) is typing.Literal:
        return [other for other in typing.get_args(hint) if other != value]
    if hint is bool:
        return [not value]
    if hint is int:
        return [value * 2, value // 2, value + 1, 4] if value else [8, 4, 3]
    if hint is str:
        return OTHER_PARTS[name]
    if typing.get_origin(hint) is tuple:
        return [other for other in (value[::-1], tuple(2 * item for item in value)) if other != value]
    if hint is float:
        return [value * 1.5 + 0.1, value / 2]
    raise AssertionError(f"{name}: no other value known for {hint}")


def _signature(cls, kind, options):
    """Shapes of parameters and state, and numbers, of a decoder around the part, its weights redrawn from one seed.

    The numbers are outputs, and the loss in training after steps that move all but the weights.
    """
    decoder = decoder_around(cls, kind, options, layers=2)  # some parts differ from layer to layer
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        axes = cls.axes if kind == "position" else 1
        places = torch.randint(TOKENS, (2, TOKENS, axes), generator=generator) if axes > 1 else None
        logits, _ = decoder.eval().logits(tokens(decoder, 2, TOKENS, 3), places_BTA=places)
        for _ in range(3):
            total, _ = decoder.train()(decoder.example(2, 3))
            decoder.after_step()
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    return (shapes, decoder.state_spec(TOKENS)), torch.cat([logits.flatten(), total[None]])


def decoder_around(cls, kind, options, layers=1):
    """A tiny decoder around a part; a plant, which is not registered, takes the place of the mixers."""
    torch.manual_seed(0)
    if cls.__module__.startswith("models."):
        field, host = registry.HOSTS[kind]
        part = to_text(make_config(cls, {**registry.tiny_options(cls), **options}))
        return models.build("decoder", layers=layers, **{field: host.format(part)})
    decoder = models.build("decoder", layers=layers)
    for layer, block in enumerate(decoder.blocks):
        block.mixer = cls(cls.Config(**options), Place(decoder.config.dim, layer, layers, decoder.config.vocab))
    return decoder


def parts():
    """(name, kind) of everything the suites are generated over."""
    return [(name, kind) for kind in registry.HOSTS for name in registry.names(kind=kind)]


def ahead():
    """Names of the mixers and ffns that say they see later tokens."""
    return [name for name, kind in parts() if kind in ("mixer", "ffn") and not registry.lookup(name).causal]
