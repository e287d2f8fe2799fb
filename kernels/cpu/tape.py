"""A function of tensors recorded once as a list of torch ops and then played in C++, where no Python is left.

Recording runs the function on tensors without numbers, so one whose path depends on numbers cannot be recorded and says
so; a kernel that looks at them (`kernels.op`) is one op, and does so when it is played. What depends on no input is
computed at once, and what is computed twice is computed once: layers that each ask for the same angles or pages get
them from the first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cpu
from kernels.cpu.fuse import fused


class NotRecorded(RuntimeError):
    """The function looks at numbers, or uses what a tape does not know."""


class Recorder(TorchDispatchMode):
    """Notes every op with its arguments, of which tensors are noted by what made them."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.slots: dict[int, int] = {id(x): slot for slot, x in enumerate(inputs)}
        self.alive: list[Tensor] = list(inputs)  # so that ids stay theirs
        self.constants: dict[int, Tensor] = {}
        self.nodes: list[tuple[Any, list, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        outputs = found if isinstance(found, (tuple, list)) else [found]
        if not func._schema.is_mutable and not any(isinstance(x, Tensor) for x in outputs):
            return found  # a device, a size: no numbers, for which fake tensors have none
        noted = [self._noted(value) for value in _in_order(func._schema, args, kwargs or {})]
        results = []
        for x in outputs:
            if x is None:
                continue
            results.append(self._slot(x, made=True))
        self.nodes.append((func, noted, results))
        return found

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _Slot(self._slot(value))
        if isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value):
            return [None if x is None else _Slot(self._slot(x)) for x in value]
        return value

    def _slot(self, x: Tensor, made: bool = False) -> int:
        known = self.slots.get(id(x))
        if known is None:
            known = self.slots[id(x)] = len(self.alive)
            self.alive.append(x)
            if not made:
                if isinstance(x, FakeTensor):
                    raise NotRecorded("a tensor came from outside of the function")
                self.constants[known] = x
        return known


class _Slot(int):
    """The number of a tensor, where other numbers stand for themselves."""


class _Size(tuple):
    """A number that grows with the sizes of a call: a + b B + c N + d B N."""


class Tape:
    """`function(*inputs)` for inputs whose shapes grow with two sizes B and N, such as rows and pages.

    example: (B, N) -> inputs of these sizes, any nest of tuples, lists, dicts and dataclasses; only shapes are looked
    at. rows, pages: the smallest and the largest B and N of calls; the function is recorded in between and at both
    ends, and numbers that are not linear in each of B and N, or a path that depends on them, cannot be recorded.
    Outputs come in the nest that the function returns. NotRecorded when it cannot be, or the C++ is not available.
    """

    def __init__(
        self, function: Callable, example: Callable[[int, int], tuple], rows: tuple[int, int], pages: tuple[int, int]
    ) -> None:
        if not cpu.available():
            raise NotRecorded("there is no C++ here")
        places = [(b, n) for b in _samples(*rows) for n in _samples(*pages)]
        takes = [_recorded(function, example(b, n)) for b, n in places]
        first, self._outputs, wanted = takes[0]
        if any(again != wanted for _, _, again in takes):
            raise NotRecorded("its path depends on the sizes")
        nodes = _merged([recorder.nodes for recorder, _, _ in takes], places)
        self._wanted = list(wanted)
        self._tape = torch.classes.edifice_cpu.Tape()
        self.ops = _write(self._tape, first, nodes, self._wanted)

    def __call__(self, b: int, n: int, *inputs: Any) -> Any:
        """What the function would return for these inputs, of sizes b and n."""
        return rebuilt(self._outputs, iter(self._tape.play(leaves(inputs), self._wanted, b, n)))


def _samples(least: int, most: int) -> list[int]:
    """Sizes to look at: two that tell a slope, and the far end, which tells a bend."""
    return sorted({least, min(least + 1, most), most})


def _recorded(function: Callable, inputs: tuple) -> tuple[Recorder, Any, list[int]]:
    given = leaves(inputs)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes, torch.inference_mode():
            faked = [fakes.from_tensor(x, static_shapes=True) for x in given]
            recorder = Recorder(faked)
            with recorder:
                outputs = function(*rebuilt(inputs, iter(faked)))
            return recorder, outputs, [recorder._slot(x) for x in leaves(outputs)]
    except NotRecorded:
        raise
    except Exception as error:  # whatever a function does with numbers that are not there
        raise NotRecorded(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _merged(takes: list[list[tuple]], places: list[tuple[int, int]]) -> list[tuple]:
    """The nodes of one recording, in which numbers that differ between them grow with the sizes."""
    if any(len(nodes) != len(takes[0]) for nodes in takes):
        raise NotRecorded("its path depends on the sizes")
    merged = []
    for same in zip(*takes):
        func, args, results = same[0]
        if any(other[0] is not func or other[2] != results or len(other[1]) != len(args) for other in same):
            raise NotRecorded("its path depends on the sizes")
        merged.append((func, [_growing(list(values), places) for values in zip(*(node[1] for node in same))], results))
    return merged


def _growing(values: list, places: list[tuple[int, int]]) -> Any:
    """One value of all recordings: itself, or a size, or a list of both."""
    first = values[0]
    if isinstance(first, (list, tuple)):
        if any(not isinstance(value, (list, tuple)) or len(value) != len(first) for value in values):
            raise NotRecorded("a list grows with the sizes")
        return [_growing(list(same), places) for same in zip(*values)]
    if all(type(value) is type(first) and (value is first or value == first) for value in values):
        return first
    if any(type(value) is not int for value in values):
        raise NotRecorded("an argument depends on the sizes")
    known = dict(zip(places, values))
    (b0, *more_b), (n0, *more_n) = (sorted(set(side)) for side in zip(*places))
    b1, n1 = (more_b or [b0 + 1])[0], (more_n or [n0 + 1])[0]
    v00 = known[b0, n0]
    v10, v01 = known.get((b1, n0), v00), known.get((b0, n1), v00)
    v11 = known.get((b1, n1), v10 + v01 - v00)
    d = (v11 - v10 - v01 + v00) // ((b1 - b0) * (n1 - n0))
    b, c = (v10 - v00) // (b1 - b0) - d * n0, (v01 - v00) // (n1 - n0) - d * b0
    size = _Size((v00 - b * b0 - c * n0 - d * b0 * n0, b, c, d))
    if any(size[0] + size[1] * b + size[2] * n + size[3] * b * n != value for (b, n), value in known.items()):
        raise NotRecorded("a number bends with the sizes")
    return size


def _write(tape: Any, recorder: Recorder, nodes: list[tuple], wanted: list[int]) -> int:
    """The ops that have to be played, on `tape`; their number."""
    root = list(range(len(recorder.alive)))  # the slot whose memory it is
    written: set[int] = set()
    for func, args, results in nodes:
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and isinstance(value, _Slot):
                for result in results:
                    root[result] = root[value]
                if argument.alias_info.is_write:
                    written.add(root[value])
            elif argument.alias_info is not None and isinstance(value, list):
                raise NotRecorded(f"{func} writes a list of tensors")
    values = dict(recorder.constants)
    same: dict[int, int] = {}
    made: dict[Any, list[int]] = {}
    kept = []
    for func, args, results in nodes:
        args = [_renamed(value, same) for value in args]
        touched = [root[slot] for slot in (*_slots(args), *results)]
        pure = results and not written.intersection(touched) and not func._schema.is_mutable
        key = (func, repr(args)) if pure and torch.Tag.nondeterministic_seeded not in func.tags else None
        if key in made:
            same.update(zip(results, made[key]))
            continue
        if key is not None:
            made[key] = results
            if all(slot in values for slot in _slots(args)) and not _grows(args):
                positional, named = _given(func._schema, [_valued(value, values) for value in args])
                found = func(*positional, **named)
                values.update(zip(results, found if isinstance(found, (tuple, list)) else [found]))
                continue
        kept.append((func, args, results))
    for index, slot in enumerate(wanted):
        wanted[index] = same.get(slot, slot)
    kept = _needed(kept, set(wanted), written, root)
    looked_at = {slot for slot in range(len(root)) if root[slot] in written} | set(wanted)
    kept = fused(kept, recorder.alive.__getitem__, _slots, looked_at)
    used = {slot for _, args, _ in kept for slot in _slots(args)} | set(wanted)
    for slot in used & values.keys():
        tape.constant(slot, values[slot])
    last: dict[int, int] = {}
    for number, (_, args, results) in enumerate(kept):
        last.update((slot, number) for slot in (*_slots(args), *results))
    for number, (func, args, results) in enumerate(kept):
        for argument, value in zip(func._schema.arguments, args):
            _put(tape, str(argument.type), value)
        over = [s for s in {*_slots(args), *results} if last[s] == number and s not in wanted and s not in values]
        tape.call(func._schema.name, func._schema.overload_name, list(results), over)
    return len(kept)


def _needed(nodes: list, wanted: set[int], written: set[int], root: list[int]) -> list:
    """The nodes that outputs or memory of others depend on, in order."""
    kept, live = [], set(wanted)
    for func, args, results in reversed(nodes):
        if func._schema.is_mutable or live.intersection(results) or any(root[r] in written for r in results):
            live.update(_slots(args))
            kept.append((func, args, results))
    return kept[::-1]


def _in_order(schema: Any, args: tuple, kwargs: dict) -> list:
    """One value for each argument of the schema."""
    rest = schema.arguments[len(args) :]
    return [*args, *(kwargs[a.name] if a.name in kwargs else a.default_value for a in rest)]


def _given(schema: Any, values: list) -> tuple[list, dict]:
    split = next((i for i, a in enumerate(schema.arguments) if a.kwarg_only), len(values))
    return values[:split], {a.name: v for a, v in zip(schema.arguments[split:], values[split:])}


def _slots(args: list) -> list[int]:
    flat = [x for value in args for x in (value if isinstance(value, list) else [value])]
    return [x for x in flat if isinstance(x, _Slot)]


def _grows(args: list) -> bool:
    return any(isinstance(x, _Size) or (isinstance(x, list) and _grows(x)) for x in args)


def _renamed(value: Any, same: dict[int, int]) -> Any:
    if isinstance(value, list):
        return [_renamed(x, same) for x in value]
    return _Slot(same.get(value, value)) if isinstance(value, _Slot) else value


def _valued(value: Any, values: dict[int, Tensor]) -> Any:
    if isinstance(value, list):
        return [_valued(x, values) for x in value]
    return values[value] if isinstance(value, _Slot) else value


def _put(tape: Any, kind: str, value: Any) -> None:
    """One argument of the next op, as the type its schema wants."""
    if isinstance(value, _Slot):
        tape.slot(value)
    elif isinstance(value, _Size):
        tape.number_of_size(list(value)) if kind in ("Tensor", "Optional[Tensor]") else tape.size(list(value))
    elif isinstance(value, list) and _grows(value):
        tape.sizes([x for part in value for x in (part if isinstance(part, _Size) else (part, 0, 0, 0))])
    elif value is None:
        tape.none()
    elif isinstance(value, list) and any(isinstance(x, _Slot) for x in value):
        tape.list([-1 if x is None else x for x in value], "Optional[Tensor]" in kind)
    elif isinstance(value, (bool, int, float)) and kind in ("Tensor", "Optional[Tensor]"):
        tape.number(value)
    elif isinstance(value, bool):
        tape.flag(value)
    elif isinstance(value, torch.dtype):
        tape.whole(_NUMBER[value])
    elif isinstance(value, torch.device):
        tape.device(str(value))
    elif isinstance(value, torch.layout):
        tape.whole(_LAYOUT[value])
    elif isinstance(value, torch.memory_format):
        tape.whole(_FORMAT[value])
    elif isinstance(value, int):
        tape.real(float(value)) if "float" in kind else tape.whole(value)
    elif isinstance(value, float):
        tape.real(value)
    elif isinstance(value, str):
        tape.text(value)
    elif isinstance(value, (list, tuple)) and all(isinstance(x, bool) for x in value) and "bool" in kind:
        tape.flags(list(value))
    elif isinstance(value, (list, tuple)) and all(isinstance(x, (int, float)) for x in value):
        tape.reals([float(x) for x in value]) if "float" in kind else tape.wholes(list(value))
    else:
        raise NotRecorded(f"an argument of type {type(value).__name__}")


def _numbers() -> dict[torch.dtype, int]:
    """torch's numbers of its types, as ops get them."""
    order = ["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex32", "complex64",
             "complex128", "bool", None, None, None, "bfloat16"]  # fmt: skip
    return {getattr(torch, name): number for number, name in enumerate(order) if name}


_NUMBER = _numbers()
_LAYOUT = {torch.strided: 0}
_FORMAT = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2, torch.channels_last_3d: 3}


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a nest, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in _parts(tree) for leaf in leaves(part)]


def rebuilt(tree: Any, tensors: Any) -> Any:
    """The nest with other tensors in the places of its own."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, dict):
        return {name: rebuilt(tree[name], tensors) for name in sorted(tree)}
    if isinstance(tree, (list, tuple)):
        return type(tree)([rebuilt(part, tensors) for part in tree])
    fields = getattr(tree, "__dataclass_fields__", None)
    if fields is None:
        return tree
    return type(tree)(**{name: rebuilt(getattr(tree, name), tensors) for name in fields})


def _parts(tree: Any) -> list:
    if isinstance(tree, dict):  # the same in whatever order it was filled
        return [tree[name] for name in sorted(tree)]
    if isinstance(tree, (list, tuple)):
        return list(tree)
    return [getattr(tree, name) for name in getattr(tree, "__dataclass_fields__", ())]
