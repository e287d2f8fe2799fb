"""ViT is transformers' ViT: its random weights in ours, the same logits and gradients. And it learns what it is for."""

import random

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import models
from models.vision.vit import ViT, shifted


def close(ours, theirs, tolerance=1e-5):
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
    assert error < tolerance, f"relative error {error:.2e}"


def names(layers):
    """name of ours -> names of theirs, concatenated in this order."""
    found = {
        "class_token": ["vit.embeddings.cls_token"],
        "positions": ["vit.embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        found[f"patches.{kind}"] = [f"vit.embeddings.patch_embeddings.projection.{kind}"]
        found[f"norm.{kind}"] = [f"vit.layernorm.{kind}"]
        found[f"head.{kind}"] = [f"classifier.{kind}"]
        for layer in range(layers):
            there, here = f"vit.layers.{layer}", f"layers.{layer}"
            found[f"{here}.mixer_norm.{kind}"] = [f"{there}.layernorm_before.{kind}"]
            found[f"{here}.mlp_norm.{kind}"] = [f"{there}.layernorm_after.{kind}"]
            found[f"{here}.mixer.wqkv.{kind}"] = [f"{there}.attention.{part}_proj.{kind}" for part in "qkv"]
            found[f"{here}.mixer.wo.{kind}"] = [f"{there}.attention.o_proj.{kind}"]
            found[f"{here}.wi.{kind}"] = [f"{there}.mlp.fc1.{kind}"]
            found[f"{here}.wo.{kind}"] = [f"{there}.mlp.fc2.{kind}"]
    return found


@pytest.mark.parametrize("trial", range(4))
def test_logits_and_gradients_are_those_of_transformers(trial):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    pick = random.Random(seed)
    heads, head_dim, layers = pick.choice([1, 2, 3]), pick.choice([8, 12]), pick.choice([1, 3])
    patch, side, channels = pick.choice([2, 3]), pick.choice([2, 5]), pick.choice([1, 3])
    hidden, classes, rows = pick.choice([24, 50]), pick.choice([2, 7]), pick.choice([1, 4])
    theirs = ViTForImageClassification(
        ViTConfig(
            hidden_size=heads * head_dim, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=hidden, image_size=patch * side, patch_size=patch, num_channels=channels,
            num_labels=classes, attn_implementation="eager",
        )
    )  # fmt: skip
    for parameter in theirs.parameters():  # zeros and ones would hide biases and norms
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1) / 2, std=0.3)
    mixer = f"gqa(heads={heads},kv_heads={heads},positions=nope,mask=full,bias=True,out_bias=True)"
    ours = ViT(
        ViT.Config(
            patch * side,
            patch,
            channels,
            classes,
            heads * head_dim,
            layers,
            mixer,
            hidden,
            theirs.config.layer_norm_eps,
        )
    )
    mapping, weights = names(layers), theirs.state_dict()
    ours.load_state_dict({name: torch.cat([weights[part] for part in parts]) for name, parts in mapping.items()})
    pixels = torch.randn(rows, channels, patch * side, patch * side)
    labels = torch.randint(classes, (rows,))
    expected = theirs(pixels, labels=labels)
    loss, metrics = ours({"pixels_BCHW": pixels, "labels_B": labels})
    close(ours.logits(pixels), expected.logits)
    close(loss, expected.loss)
    assert metrics["accuracy"] == (expected.logits.argmax(1) == labels).float().mean()
    expected.loss.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        reference = torch.cat([gradients[part] for part in mapping[name]])
        if name.endswith("wqkv.bias"):  # the bias of k has no effect: its gradient is rounding
            assert parameter.grad.isfinite().all()
        close(parameter.grad, reference)


def test_example_is_learnt_and_predicted():
    torch.manual_seed(0)
    model = models.build("vit", scale=0.5)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(60):
        loss, _ = model(model.example(32, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    batch = model.eval().example(64, 999)
    predicted = model.predict(batch)
    assert (predicted["labels_B"] == batch["labels_B"]).float().mean() > 0.8
    assert predicted["logits_BC"].shape == (64, 10)


def test_weight_counts_images_whatever_comes_first():
    model = models.build("vit")
    batch = model.example(5)
    assert model.weight(batch) == 5 and model.weight(batch).dim() == 0


def test_order_of_patches_is_known_by_positions_alone():
    """Without positions the class token sees the same patches in any order; with them it sees the order."""
    torch.manual_seed(1)
    model = models.build("vit").eval()
    pixels = torch.randn(2, 1, 8, 8)
    shuffled = pixels.roll(2, -1)  # whole patches
    assert (model.logits(pixels) - model.logits(shuffled)).abs().max() > 1e-3
    torch.nn.init.zeros_(model.positions)
    torch.testing.assert_close(model.logits(pixels), model.logits(shuffled))


def test_shift_moves_whole_images_by_at_most_so_much():
    torch.manual_seed(2)
    images = torch.zeros(400, 2, 7, 7)
    images[:, 0, 3, 3], images[:, 1, 3, 3] = 1, 2
    moved = shifted(images, 2)
    assert moved.shape == images.shape and moved.sum((2, 3)).tolist() == [[1, 2]] * 400
    assert torch.equal(moved[:, 0] * 2, moved[:, 1])
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in range(1, 6) for x in range(1, 6)}


def test_every_option_is_live():
    torch.manual_seed(0)
    base = models.build("vit")
    base_shapes = {name: p.shape for name, p in base.named_parameters()}
    options = {"size": 4, "patch": 4, "channels": 2, "classes": 3, "dim": 16, "layers": 1, "hidden": 5}
    for name, value in options.items():
        changed = models.build("vit", **{name: value})
        assert {name: p.shape for name, p in changed.named_parameters()} != base_shapes, name
    pixels = torch.randn(2, 1, 8, 8)
    mixer = "gqa(heads=2,kv_heads=2,positions=nope,mask=full,bias=True,out_bias=True)"
    for name, value in {"eps": 1.0, "scale": 3.0, "mixer": mixer}.items():
        changed = models.build("vit", **{name: value})
        changed.load_state_dict(base.state_dict())
        assert (changed.logits(pixels) - base.logits(pixels)).abs().max() > 1e-5, name


@pytest.mark.parametrize(
    "options,words",
    [
        ({"patch": 3}, ["size=8", "multiple of patch=3"]),
        ({"layers": 0}, ["layers=0", "at least 1"]),
        ({"shift": 8}, ["shift=8", "below size=8"]),
        ({"mixer": "gqa"}, ["earlier patches", "mask=full"]),
        ({"mixer": "swiglu"}, ["swiglu", "not a mixer"]),
    ],
)
def test_a_mistake_gets_one_clear_line(options, words):
    with pytest.raises(ValueError) as error:
        models.build("vit", **options)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_pixels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="pixels_BCHW: expected .rows, 1, 8, 8."):
        models.build("vit").logits(torch.zeros(2, 1, 9, 8))
