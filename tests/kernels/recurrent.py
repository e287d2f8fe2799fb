"""What the tests of recurrent ops share: packed documents, and the checks that hold of any op with a carried state.

An op is given as `run(segments, keep)(**inputs) -> (y, *states)`; names ending in a time dimension are cut along it,
the inputs named in `states` are what is carried in.
"""

import pytest
import torch

from tests.kernels.physics import DEVICE, chain, close, placed
from tests.kernels.suite import Differentiable


def packed(rows, tokens):
    """Documents of several lengths with padding in front, inside and at the end; row 0 begins with the carried one."""
    segments_BT = torch.zeros(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        starts = torch.rand(tokens) < 0.08
        starts[0] = row > 0
        segments_BT[row] = starts.cumsum(0)
        segments_BT[row][torch.rand(tokens) < 0.2] = -1
    if tokens < 8:
        return segments_BT
    segments_BT[:, tokens // 3 : tokens // 3 + 3] = -1
    segments_BT[-1, :2] = -1
    segments_BT[-1, -4:] = -1
    return segments_BT


class Recurrent:
    """Checks of one op: `run` as above, `inputs(tokens, rows)` draws its tensors, `fixed` names those without a time
    dimension, `states` those of them that are carried, in the order in which the op returns them."""

    def __init__(self, run, inputs, states, fixed=()):
        self._run, self._inputs, self.states = run, inputs, states
        self.fixed = {*states, *fixed}

    def run(self, segments=None, **options):
        return self._run(None if segments is None else segments.to(DEVICE), **options)

    def inputs(self, *args, **options):
        return placed(self._inputs(*args, **options))

    def cut(self, x, columns):
        return {n: v if v is None or n in self.fixed else v[:, columns] for n, v in x.items()}

    def documents_and_padding_are_as_if_alone(self):
        x, segments = self.inputs(90, rows=1), torch.full((1, 90), -1)
        segments[0, 3:40], segments[0, 44:70], segments[0, 75:88] = 0, 1, 2
        segments[0, 20] = -1
        y, *after = self.run(segments)(**x)
        for number in range(3):
            at = segments[0] == number
            fresh = {} if number == 0 else dict.fromkeys(self.states)
            y_alone, *after_alone = self.run()(**{**self.cut(x, at), **fresh})
            close(y[:, at], y_alone)
        for ours, alone in zip(after, after_alone, strict=True):
            close(ours, alone)

    def padding_alone_changes_no_bit(self):
        x = self.inputs(7, rows=2)
        _, *after = self.run(torch.full((2, 7), -1))(**x)
        for name, state in zip(self.states, after, strict=True):
            assert torch.equal(state, x[name])

    def split_is_one_pass(self, cut):
        x = self.inputs(100)
        carried = [x[name].requires_grad_() for name in self.states]
        y, *after = self.run()(**x)
        y1, *middle = self.run()(**self.cut(x, slice(cut)))
        y2, *end = self.run()(**{**self.cut(x, slice(cut, None)), **dict(zip(self.states, middle, strict=True))})
        close(torch.cat([y1, y2], 1), y)
        for one, two in zip(after, end, strict=True):
            close(two, one)
        one = torch.autograd.grad(sum(s.square().sum() for s in after) + y.sum(), carried)
        two = torch.autograd.grad(sum(s.square().sum() for s in end) + y1.sum() + y2.sum(), carried)
        for a, b in zip(one, two, strict=True):
            close(b, a)

    def keep_is_the_state_of_shorter_calls(self):
        x, segments = self.inputs(70, rows=2), packed(2, 70)
        _, *kept = self.run(segments, keep=5)(**x)
        for j in range(6):
            n = 65 + j
            _, *short = self.run(segments[:, :n])(**self.cut(x, slice(n)))
            for ours, theirs in zip(kept, short, strict=True):
                close(ours[:, j], theirs)

    def earlier_outputs_do_not_change_by_a_bit(self):
        x = self.inputs(150)
        y = self.run()(**x)[0]
        for cut in (1, 15, 16, 63, 64, 100):
            first, second = self.cut(x, slice(cut)), self.cut(x, slice(cut, None))
            other = {n: v if n in self.fixed else torch.cat([first[n], second[n] * 0.5], 1) for n, v in x.items()}
            assert torch.equal(self.run()(**other)[0][:, :cut], y[:, :cut])

    def rows_are_independent(self):
        x, segments = self.inputs(80, rows=3), packed(3, 80)
        alone = {n: v if n in self.fixed - {*self.states} else v[1:2] for n, v in x.items()}
        for ours, theirs in zip(self.run(segments)(**x), self.run(segments[1:2])(**alone), strict=True):
            close(theirs, ours[1:2])


class Carried:
    """Tests of all ops with a carried state; `RECURRENTS` are named ones."""

    RECURRENTS: dict[str, Recurrent]

    def test_documents_and_padding_are_as_if_alone(self, recurrent):
        recurrent.documents_and_padding_are_as_if_alone()

    def test_padding_alone_changes_no_bit(self, recurrent):
        recurrent.padding_alone_changes_no_bit()

    @pytest.mark.parametrize("cut", [1, 37, 64, 99])
    def test_split_is_one_pass(self, recurrent, cut):
        recurrent.split_is_one_pass(cut)

    def test_keep_is_the_state_of_shorter_calls(self, recurrent):
        recurrent.keep_is_the_state_of_shorter_calls()

    def test_earlier_outputs_do_not_change_by_a_bit(self, recurrent):
        recurrent.earlier_outputs_do_not_change_by_a_bit()

    def test_rows_are_independent(self, recurrent):
        recurrent.rows_are_independent()


class Memory(Differentiable, Carried):
    """What holds of the ops with a matrix memory. `inputs(tokens, rows, heads, key, value, state, ...)` draws tensors,
    `call` is the public function."""

    inputs = call = None

    def __init_subclass__(cls):
        cls.RECURRENTS = {"memory": Recurrent(cls.run, cls.inputs, ["state_BHKV"])}

    @classmethod
    def run(cls, segments=None, **options):
        return lambda **x: cls.call(**{"segments_BT": segments, **x}, **options)

    @pytest.mark.parametrize("gate", [0.0, 30.0, torch.inf])
    def test_any_decay_is_safe(self, gate, form, decays):
        x = self.inputs(40, rows=1, heads=1, **decays)
        x["decay"] = torch.where(torch.rand_like(x["decay"]) < 0.3, -gate, x["decay"])
        chain(self.run(), x, form)


def cases(call, inputs, **each):
    """CASES of an op with a matrix memory. `each`: name -> options of `inputs`, such as the kinds of decay."""

    def case(tokens, rows=1, heads=1, keep=0, documents=False, **sizes):
        def draw():
            x = inputs(tokens, rows=rows, heads=heads, **sizes)
            if documents:
                x["segments_BT"] = packed(rows, tokens)
            return lambda **given: call(**given, keep=keep), x

        return draw

    found = {}
    for name, options in each.items():
        found |= {
            f"{name}-packed": case(41, rows=2, heads=2, documents=True, **options),
            f"{name}-odd": case(63, key=60, value=60, state=False, **options),
            f"{name}-keep": case(21, rows=2, keep=2, documents=True, **options),
        }
    options = next(iter(each.values()))
    return found | {
        "chunks": case(130, **options),
        # Slow decay: a long sum, which the definition rounds as often as a matrix product does.
        "wide": case(66, key=70, value=36, gate=0.02, **options),
        "whole": case(16, key=16, value=16, **options),
        "short": case(3, rows=2, documents=True, **options),
        "kept": case(2, keep=2, **options),
        "one": case(1, heads=2, state=False, **options),
        "none": case(0, **options),
    }


def small(call, inputs, **each):
    """SMALL cases of the same."""

    def case(keep, **options):
        def draw():
            x = inputs(6, rows=1, heads=1, key=3, value=2, **options)
            x["segments_BT"] = torch.tensor([[0, 0, -1, 1, 1, 2]])
            return lambda **given: call(**given, keep=keep), x

        return draw

    first = next(iter(each.values()))
    return {name: case(0, **options) for name, options in each.items()} | {"keep": case(1, **first)}
