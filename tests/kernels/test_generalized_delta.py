"""generalized_delta: chunked against its form and the gated delta rule, the carried state, documents, padding."""

import pytest
import torch
from torch.nn.functional import normalize

from kernels import gated_delta, generalized_delta
from tests.kernels.physics import chain, close, using
from tests.kernels.recurrent import Recurrent, packed

NAMES = ("q_BTHK", "k_BTHK", "v_BTHV", "decay_BTHK", "a_BTHK", "b_BTHK")


def inputs(tokens=63, rows=2, heads=2, key=12, value=20, dtype=torch.float32, state=True, gate=0.6):
    """As RWKV-7 draws them: a is a unit key, negated, and b the same key times a rate per channel."""
    unit = normalize(torch.randn(rows, tokens, heads, key), dim=-1)
    made = {
        "q_BTHK": normalize(torch.randn(rows, tokens, heads, key), dim=-1),
        "k_BTHK": normalize(torch.randn(rows, tokens, heads, key), dim=-1),
        "v_BTHV": torch.randn(rows, tokens, heads, value),
        "decay_BTHK": -torch.rand(rows, tokens, heads, key) * gate,
        "a_BTHK": -unit,
        "b_BTHK": unit * torch.rand(rows, tokens, heads, key),
    }
    made = {name: x.to(dtype) for name, x in made.items()}
    wide = torch.promote_types(dtype, torch.float32)
    return made | {"state_BHKV": torch.randn(rows, heads, key, value, dtype=wide) if state else None}


def run(segments=None, keep=0, scale=0.5):
    return lambda **x: generalized_delta(
        *(x[n] for n in NAMES), state_BHKV=x["state_BHKV"], segments_BT=segments, keep=keep, scale=scale
    )


recurrent = Recurrent(run, inputs, ["state_BHKV"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, keep", [(0, 0), (1, 0), (1, 1), (5, 2), (15, 0), (16, 0), (70, 3)])
@pytest.mark.parametrize("state", [True, False])
def test_chain(tokens, keep, state, dtype):
    chain(run(keep=keep), inputs(tokens, dtype=dtype, state=state))


@pytest.mark.parametrize("tokens, keep", [(3, 0), (33, 2), (90, 0)])
@pytest.mark.parametrize("state", [True, False])
def test_chain_packed(tokens, keep, state):
    segments = packed(3, tokens) if tokens > 8 else torch.tensor([[0, -1, 0], [-1, 1, 2], [-1, -1, -1]])
    chain(run(segments, keep), inputs(tokens, rows=3, state=state))


def test_chain_odd_sizes():
    chain(run(scale=0.7), inputs(63, rows=1, heads=3, key=60, value=60))


@pytest.mark.parametrize("gate", [0.0, 30.0, torch.inf])
def test_any_decay_is_safe(gate):
    x = inputs(80)
    x["decay_BTHK"] = torch.where(torch.rand(2, 80, 2, 12) < 0.3, -gate, x["decay_BTHK"])
    chain(run(), x)


def test_documents_and_padding_are_as_if_alone():
    recurrent.documents_and_padding_are_as_if_alone()


def test_padding_alone_changes_no_bit():
    recurrent.padding_alone_changes_no_bit()


@pytest.mark.parametrize("cut", [1, 37, 64, 99])
def test_split_is_one_pass(cut):
    recurrent.split_is_one_pass(cut)


def test_keep_is_the_state_of_shorter_calls():
    recurrent.keep_is_the_state_of_shorter_calls()


def test_earlier_outputs_do_not_change_by_a_bit():
    recurrent.earlier_outputs_do_not_change_by_a_bit()


def test_rows_are_independent():
    recurrent.rows_are_independent()


def test_gradcheck():
    x = {n: v.double().requires_grad_() for n, v in inputs(6, rows=1, heads=1, key=3, value=2).items()}
    segments = torch.tensor([[0, 0, -1, 1, 1, 2]])

    def call(keep):
        return lambda *v: run(segments, keep)(**dict(zip(x, v, strict=True)))

    with using("reference"):
        assert torch.autograd.gradcheck(call(0), tuple(x.values()))
    assert torch.autograd.gradcheck(call(1), tuple(x.values()))
    assert torch.autograd.gradgradcheck(call(0), tuple(x.values()))


def test_is_the_recurrence_in_row_form():
    """M_t = M_{t-1} (diag(exp(w)) + a b^T) + v k^T by hand, one head, where our S is M^T."""
    x = {n: v.double() for n, v in inputs(40, rows=1, heads=1).items()}
    q, k, v, decay, a, b = (x[n][0, :, 0] for n in NAMES)
    memory, outputs = x["state_BHKV"][0, 0].T, []
    for t in range(40):
        memory = memory @ (decay[t].exp().diag() + torch.outer(a[t], b[t])) + torch.outer(v[t], k[t])
        outputs.append(0.5 * memory @ q[t])
    y, state = run()(**x)
    close(y[0, :, 0], torch.stack(outputs), 1e-12)
    close(state[0, 0], memory.T, 1e-12)


def test_contains_the_gated_delta_rule():
    x = {n: v.double() for n, v in inputs(70).items()}
    decay, beta = -torch.rand(2, 70, 2).double(), torch.rand(2, 70, 2).double()
    k, state = x["a_BTHK"], x["state_BHKV"]
    y, after = generalized_delta(
        x["q_BTHK"],
        k * beta[..., None],
        x["v_BTHV"],
        decay[..., None].expand_as(k),
        k * decay[..., None].exp(),
        -k * beta[..., None],
        state_BHKV=state,
    )
    expected, expected_after = gated_delta(x["q_BTHK"], k, x["v_BTHV"], decay, beta, scale=1.0, state_BHKV=state)
    close(y, expected, 1e-12)
    close(after, expected_after, 1e-12)


def test_opcheck_and_compile():
    x, segments = inputs(20), packed(2, 20)
    args = (*(x[n] for n in NAMES), x["state_BHKV"], segments, 0.5, 2)
    torch.library.opcheck(torch.ops.edifice.generalized_delta.default, args)
    torch.compiler.reset()
    compiled = torch.compile(run(segments, 2), backend="eager", fullgraph=True)
    for ours, eager in zip(compiled(**x), run(segments, 2)(**x), strict=True):
        assert torch.equal(ours, eager)


def test_mistakes_name_the_argument():
    x = inputs(4)
    with pytest.raises(ValueError, match="a_BTHK"):
        run()(**{**x, "a_BTHK": x["a_BTHK"][..., :2]})
    with pytest.raises(ValueError, match="v_BTHV"):
        run()(**{**x, "v_BTHV": x["v_BTHV"][:, :2]})
    with pytest.raises(ValueError, match="keep=9"):
        run(keep=9)(**x)
    with pytest.raises(TypeError, match="segments_BT"):
        run(torch.zeros(2, 4))(**x)
