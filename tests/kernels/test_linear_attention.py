"""linear_attention: chunked against its form, the carried state, documents and padding."""

import pytest
import torch
from torch.nn.functional import normalize

from kernels import linear_attention
from tests.kernels.physics import chain, close, using
from tests.kernels.recurrent import Recurrent, packed

NAMES = ("q_BTHK", "k_BTHK", "v_BTHV", "decay_BTH")


def inputs(tokens=63, rows=2, heads=2, key=12, value=20, dtype=torch.float32, state=True, decay=True):
    made = {
        "q_BTHK": normalize(torch.randn(rows, tokens, heads, key), dim=-1).to(dtype),
        "k_BTHK": normalize(torch.randn(rows, tokens, heads, key), dim=-1).to(dtype),
        "v_BTHV": torch.randn(rows, tokens, heads, value).to(dtype),
        "decay_BTH": (-torch.rand(rows, tokens, heads) * 0.3).to(dtype) if decay else None,
    }
    wide = torch.promote_types(dtype, torch.float32)
    return made | {"state_BHKV": torch.randn(rows, heads, key, value, dtype=wide) if state else None}


def run(segments=None, keep=0, scale=0.5):
    return lambda **x: linear_attention(
        *(x[n] for n in NAMES), state_BHKV=x["state_BHKV"], segments_BT=segments, keep=keep, scale=scale
    )


recurrent = Recurrent(run, inputs, ["state_BHKV"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, keep", [(0, 0), (1, 0), (1, 1), (5, 2), (63, 0), (64, 0), (130, 3)])
@pytest.mark.parametrize("state, decay", [(True, True), (False, True), (True, False)])
def test_chain(tokens, keep, state, decay, dtype):
    chain(run(keep=keep), inputs(tokens, dtype=dtype, state=state, decay=decay))


@pytest.mark.parametrize("tokens, keep", [(3, 0), (63, 2), (150, 0)])
@pytest.mark.parametrize("state, decay", [(True, True), (False, True), (True, False)])
def test_chain_packed(tokens, keep, state, decay):
    segments = packed(3, tokens) if tokens > 8 else torch.tensor([[0, -1, 0], [-1, 1, 2], [-1, -1, -1]])
    chain(run(segments, keep), inputs(tokens, rows=3, state=state, decay=decay))


def test_chain_odd_sizes():
    chain(run(scale=0.7), inputs(63, rows=1, heads=3, key=60, value=60))


@pytest.mark.parametrize("gate", [0.0, 30.0, torch.inf])
def test_any_decay_is_safe(gate):
    x = inputs(80)
    x["decay_BTH"] = torch.where(torch.rand(2, 80, 2) < 0.3, -gate, x["decay_BTH"])
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


def test_is_masked_attention_without_softmax():
    """The parallel form of the papers: y = ((q k^T) * D) v with D_ij the product of the gates between."""
    x = {n: v.double() for n, v in inputs(70, state=False).items() if v is not None}
    q, k, v, decay = (x[n].transpose(1, 2) for n in NAMES)
    between = torch.zeros(2, 2, 70, 70, dtype=torch.float64)
    for i in range(70):
        for j in range(i + 1):
            between[:, :, i, j] = decay[:, :, j + 1 : i + 1].sum(-1).exp()
    y, state = run()(**x, state_BHKV=None)
    close(y, 0.5 * ((q @ k.transpose(2, 3) * between) @ v).transpose(1, 2), 1e-12)
    close(state, (k * between[:, :, -1, :, None]).transpose(2, 3) @ v, 1e-12)


def test_opcheck_and_compile():
    x, segments = inputs(20), packed(2, 20)
    args = (*(x[n] for n in NAMES), x["state_BHKV"], segments, 0.5, 2)
    torch.library.opcheck(torch.ops.edifice.linear_attention.default, args)
    torch.compiler.reset()
    compiled = torch.compile(run(segments, 2), backend="eager", fullgraph=True)
    for ours, eager in zip(compiled(**x), run(segments, 2)(**x), strict=True):
        assert torch.equal(ours, eager)


def test_mistakes_name_the_argument():
    x = inputs(4)
    with pytest.raises(ValueError, match="decay_BTH"):
        run()(**{**x, "decay_BTH": x["decay_BTH"][:, :2]})
    with pytest.raises(ValueError, match="state_BHKV"):
        run()(**{**x, "state_BHKV": x["state_BHKV"][..., :3]})
    with pytest.raises(ValueError, match="keep=9"):
        run(keep=9)(**x)
    with pytest.raises(TypeError, match="segments_BT"):
        run(torch.zeros(2, 4))(**x)
