"""Packed weights: layers do not know of them, and a model says what it said."""

from copy import deepcopy

import pytest
import torch

import models
from models import quant
from models.quant import PackedWeight

OPTIONS = {"vocab": 128, "dim": 64, "layers": 2}
CLOSE = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.03, "int4": 0.03}


def decoder(name="decoder", **more):
    torch.manual_seed(0)
    return models.build(name, **OPTIONS, **more).eval()


def said(model, ids_BT):
    with torch.inference_mode():
        return model.logits(ids_BT)[0].float()


def unpacked(model):
    """The same model with plain weights that are those held: what is left is the rounding of activations."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, PackedWeight):
            module.weight = torch.nn.Parameter(weight * 1, requires_grad=False)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", CLOSE)
def test_a_packed_model_says_what_its_weights_say(weights, tied):
    packed = quant.pack(decoder(tied=tied), weights)
    assert (packed.head.weight is packed.embedding.weight) == tied
    assert sum(isinstance(parameter, PackedWeight) for parameter in packed.parameters()) == 2 * 4 + 1
    ids_BT = torch.randint(128, (3, 17))
    found, plain = said(packed, ids_BT), said(decoder(tied=tied), ids_BT)
    want = said(unpacked(packed), ids_BT)
    assert (found - want).norm() <= CLOSE[weights] * want.norm()
    rounded = (want - plain).norm() / plain.norm()
    assert rounded == 0 if weights == "fp32" else 1e-3 < rounded < {"bf16": 0.03, "int8": 0.05, "int4": 0.5}[weights]


def test_it_takes_as_little_memory_as_it_says():
    for weights, bits in (("fp32", 32), ("bf16", 16), ("int8", 8.25), ("int4", 4.25)):
        model = quant.pack(decoder(tied=True, ffn="swiglu(hidden=128)"), weights)
        for parameter in model.parameters():
            if isinstance(parameter, PackedWeight):
                assert parameter.bytes == parameter.numel() * bits / 8


def test_what_is_not_a_product_sees_the_weight():
    model = quant.pack(decoder(), "fp32")
    plain, weight = decoder().blocks[0].mixer.wo.weight, model.blocks[0].mixer.wo.weight
    assert weight.shape == plain.shape and weight.dtype == torch.float32
    assert torch.equal(weight * 1, plain) and torch.equal(weight[3], plain[3])
    assert torch.equal(torch.nn.functional.linear(plain, weight.t().to(torch.float64).t().float()), plain @ plain.T)


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_is_the_same_model_in_memory_of_its_own(tied):
    model = quant.pack(decoder(tied=tied), "int4")
    copy = deepcopy(model)
    assert (copy.head.weight is copy.embedding.weight) == tied and isinstance(copy.head.weight, torch.nn.Parameter)
    ids_BT = torch.randint(128, (2, 5))
    assert torch.equal(said(copy, ids_BT), said(model, ids_BT))
    model.head.weight.packed.weight.zero_()
    assert not torch.equal(said(copy, ids_BT), said(model, ids_BT))


@pytest.mark.parametrize("name", ["rwkv7", "gated_deltanet", "moe", "mla", "medusa"])
def test_any_architecture_is_packed(name):
    ids_BT = torch.randint(128, (2, 9))
    want, found = said(decoder(name), ids_BT), said(quant.pack(decoder(name), "fp32"), ids_BT)
    assert (found - want).norm() <= 1e-4 * want.norm()


def test_dtype_and_weights_of_a_served_model():
    held = quant.held(decoder(), "bf16", "")
    assert held.blocks[0].mixer.wo.weight.packed.bits == 16 and held.norm.weight.dtype == torch.bfloat16
    held = quant.held(decoder(), "", "int4")
    assert held.blocks[0].mixer.wo.weight.packed.bits == 4 and held.norm.weight.dtype == torch.float32
    assert not isinstance(quant.held(decoder(), "fp32", "").head.weight, PackedWeight)
    for given, message in (
        (("fp16", ""), "dtype='fp16'"),
        (("", "int3"), "weights='int3'"),
        (("fp32", "bf16"), "dtype"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            quant.held(decoder(), *given)
        assert "\n" not in str(caught.value)
