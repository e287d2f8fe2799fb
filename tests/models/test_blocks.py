"""Residual schemes: hyper-connections against DeepSeek-V4, and what the place of a norm does to gradients by depth."""

import contract
import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

import models
from models.blocks.mhc import MHC
from models.ffn.swiglu import SwiGLU
from models.span import Span
from models.stack import Stack
from models.stateful import Place

PLACEMENTS = ("pre", "post", "inner", "sandwich", "peri", "parallel", "first", "two_hop")


def close(ours, theirs, tolerance=1e-5, what="output"):
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1e-3)
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def at(rows, tokens):
    return Span(torch.arange(tokens).expand(rows, -1))


def test_mhc_is_deepseek_v4(pick):
    """A layer inside the stack: streams in, streams out, through two branches; outputs and all gradients."""
    n, dim, iterations, eps = (
        pick.choice([2, 3, 4]),
        pick.choice([8, 24]),
        pick.choice([1, 3, 20]),
        pick.choice([1e-6, 1e-4]),
    )
    config = DeepseekV4Config(hidden_size=dim, hc_mult=n, hc_sinkhorn_iters=iterations, hc_eps=eps, rms_norm_eps=1e-5)
    place = Place(dim, 1, 3, eps=1e-5)
    branches = {name: SwiGLU(SwiGLU.Config(hidden=16), place) for name in ("mixer", "ffn")}
    ours = MHC(MHC.Config(n, iterations, eps), branches, place)
    theirs = {name: DeepseekV4HyperConnection(config) for name in branches}
    pairs = []
    for name, connection in theirs.items():
        streams = getattr(ours, f"{name}_streams")
        pairs += [(streams.weight, connection.fn), (streams.bias, connection.base), (streams.scale, connection.scale)]
        torch.nn.init.normal_(getattr(ours, f"{name}_norm").weight)
    for one, two in pairs:
        torch.nn.init.normal_(two, std=two.shape[-1] ** -0.5 if two.dim() > 1 else 1.0)
        with torch.no_grad():
            one.copy_(two)
    x = torch.randn(2, 5, n, dim)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ours(ours_x.flatten(2), at(2, 5))[0].view_as(x)
    expected = theirs_x
    for name, connection in theirs.items():
        post, mix, inner = connection(expected)
        out, _ = branches[name](getattr(ours, f"{name}_norm")(inner), at(2, 5))
        expected = post[..., None] * out[:, :, None] + mix.transpose(-1, -2) @ expected
    close(y, expected)
    weight = torch.randn_like(x)
    found = torch.autograd.grad((y * weight).sum(), [ours_x, *(one for one, _ in pairs)])
    wanted = torch.autograd.grad((expected * weight).sum(), [theirs_x, *(two for _, two in pairs)])
    for one, two in zip(found, wanted, strict=True):
        close(one, two, what=f"gradient of {tuple(two.shape)}")


def test_mixing_is_doubly_stochastic(pick):
    """Rows and columns add up to 1, nothing is negative, no direction grows; without Sinkhorn columns do not."""
    for iterations, holds in ((20, True), (1, False)):
        config = MHC.Config(4, iterations)
        streams = MHC(config, {"ffn": SwiGLU(SwiGLU.Config(), Place(16))}, Place(16, 1, 3)).ffn_streams
        torch.nn.init.normal_(streams.bias, std=0.5)
        torch.nn.init.constant_(streams.scale, 0.3)
        pre, post, mix = streams(torch.randn(2, 9, 4, 16))
        assert (pre > 0).all() and (post > 0).all() and (post < 2).all() and (mix >= 0).all()
        error = max((mix.sum(dim) - 1).abs().max().item() for dim in (-1, -2))
        assert (error < 1e-4) == holds, error
        if holds:
            assert torch.linalg.matrix_norm(mix, 2).max() < 1 + 1e-4


def test_streams_carry_what_branches_leave_alone(pick):
    """With branches that write nothing any mixing, at any depth, returns what entered: the mean is kept."""
    stack = Stack("gqa", "swiglu", "mhc(streams=3)", 32, 5)
    for block in stack:
        for name in block.branches:
            torch.nn.init.zeros_(getattr(block, name).wo.weight)
            torch.nn.init.normal_(getattr(block, f"{name}_streams").bias)
            torch.nn.init.ones_(getattr(block, f"{name}_streams").scale)
    x = torch.randn(2, 7, 32)
    close(stack(x, at(2, 7))[0], x, 1e-4)


def test_one_stream_is_the_residual_stream(pick):
    one = models.build("decoder", block="mhc(streams=1)")
    plain = models.build("decoder")
    plain.load_state_dict(one.state_dict())
    ids = contract.tokens(one, 2, 9, 0)
    assert torch.equal(one.logits(ids)[0], plain.logits(ids)[0])


def test_streams_come_to_differ(pick):
    """Copies at the entry, but each learns its own part: after a few steps the streams of a token are not the same."""
    decoder = models.build("decoder", block="mhc")
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    for step in range(3):
        total, _ = decoder(decoder.example(4, step))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        streams = decoder.blocks[0](decoder.embed(contract.tokens(decoder, 1, 9, 0)), at(1, 9))[0].unflatten(
            -1, (4, -1)
        )
    assert streams.std(2).mean() > 1e-3


def by_depth(placement, layers=12, dim=32):
    """Size of the stream after each layer, and of the gradient of each layer's last matrix, all weights of one size."""
    decoder = models.build("decoder", block=f"norm_placement(placement={placement})", layers=layers, dim=dim)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1 and name.startswith("blocks"):
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    sizes = []
    hooks = [
        b.register_forward_hook(lambda _, __, y: sizes.append(y[0].square().mean().sqrt())) for b in decoder.blocks
    ]
    total, _ = decoder(decoder.example(8, 0))
    total.backward()
    for hook in hooks:
        hook.remove()
    return torch.stack(sizes).detach(), torch.stack([block.ffn.wo.weight.grad.norm() for block in decoder.blocks])


def test_where_a_norm_stands_shows_in_gradients_by_depth(pick):
    """Norms after the sum keep the stream's size, before the branches let it grow. Gradients rise towards lower layers,
    steeply so with norms on the branch alone, where nothing tames what it reads. A norm on a branch's output adds 1
    to the mean square, twice a layer.
    """
    sizes, gradients = {}, {}
    for placement in ("pre", "post", "inner", "sandwich", "peri"):
        sizes[placement], gradients[placement] = by_depth(placement)
    growth = {placement: (size[-1] / size[0]).item() for placement, size in sizes.items()}
    steep = {placement: (found[:2].mean() / found[-2:].mean()).item() for placement, found in gradients.items()}
    assert growth["post"] < 1.05 < 2.5 < growth["pre"], growth
    assert steep["inner"] > 1.5 * max(steep[other] for other in ("pre", "post", "sandwich", "peri")) > 2, steep
    branches = 2 * torch.arange(1, 13)
    for placement, entry in (("inner", 0), ("sandwich", 0), ("peri", 1)):
        assert ((sizes[placement].square() / (branches + entry) - 1).abs() < 0.4).all(), placement
    close(sizes["post"], torch.ones(12), 1e-3)
    assert ((sizes["pre"].square() / branches - 1).abs() > 0.4).any()


def test_peri_does_not_depend_on_the_size_of_embeddings(pick):
    """The norm at the entry is what sandwich lacks."""
    for placement, same in (("peri", True), ("sandwich", False)):
        decoder = models.build("decoder", block=f"norm_placement(placement={placement})")
        ids = contract.tokens(decoder, 2, 9, 0)
        with torch.no_grad():
            small = decoder.logits(ids)[0]
            decoder.embedding.weight.mul_(100)
            large = decoder.logits(ids)[0]
        assert (((large - small).abs().max() / small.abs().max()) < 1e-2) == same


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_placement_is_its_equation(pick, placement):
    weights = "alpha=[0.7,1.1],beta=[1.3,0.4]" if placement == "first" else ""
    stack = Stack("gqa", "swiglu", f"norm_placement(placement={placement},{weights})".replace(",)", ")"), 32, 2)
    for name, parameter in stack.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    x, span = torch.randn(2, 7, 32), at(2, 7)
    expected = x
    for block in stack:
        f, g = ((lambda h, part=part: part(h, span)[0]) for part in (block.mixer, block.ffn))
        before = [getattr(block, f"{name}_norm", None) for name in ("mixer", "ffn")]
        after = [getattr(block, f"{name}_out_norm", None) for name in ("mixer", "ffn")]
        h = expected
        if placement == "peri" and block is stack[0]:
            h = block.entry_norm(h)
        if placement == "parallel":
            h = h + f(before[0](h)) + g(before[0](h))
        elif placement == "two_hop":
            h = h + g(before[1](h + f(before[0](h))))
        else:
            for i, branch in enumerate((f, g)):
                if placement == "pre":
                    h = h + branch(before[i](h))
                elif placement == "post":
                    h = after[i](h + branch(h))
                elif placement == "inner":
                    h = h + after[i](branch(h))
                elif placement in ("sandwich", "peri"):
                    h = h + after[i](branch(before[i](h)))
                else:
                    u = before[i](h)
                    h = (0.7, 1.1)[i] * u + (1.3, 0.4)[i] * branch(u)
        expected = h
    close(stack(x, span)[0], expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_keeps_the_contract(pick, placement):
    decoder = models.build("decoder", block=f"norm_placement(placement={placement})").eval()
    with torch.no_grad():
        contract.split_anywhere(decoder, pick.randrange(1 << 30))
    contract.every_parameter_learns(decoder, pick.randrange(1 << 30))
