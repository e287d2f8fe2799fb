"""GAN: losses and the penalty against closed forms, phases that leave each other alone, samples that fit the data."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import models
from models.generative.gan import discriminator_loss, generator_loss, gradient_penalty

LOSSES = ("non_saturating", "wgan_gp")


def test_losses_are_the_papers():
    real, fake = torch.tensor([1.5, -0.5]), torch.tensor([0.25, 2.0])
    sigmoid = torch.sigmoid
    expected = -(sigmoid(real).log().mean() + (1 - sigmoid(fake)).log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating"), expected)
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), -sigmoid(fake).log().mean())
    assert discriminator_loss(real, fake, "wgan_gp").item() == pytest.approx(1.125 - 0.5)
    assert generator_loss(fake, "wgan_gp").item() == pytest.approx(-1.125)


@pytest.mark.parametrize("bias", (0.0, 1.7))
def test_a_discriminator_that_cannot_tell_gives_the_closed_forms(bias):
    model = models.build("gan")
    nn.init.zeros_(model.discriminator[-2].weight)
    nn.init.constant_(model.discriminator[-2].bias, bias)
    batch = model.example(6)
    loss, metrics = model(batch, "discriminator")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-bias)) + math.log1p(math.exp(bias)), rel=1e-5)
    assert metrics["real"].item() == pytest.approx(bias) and metrics["fake"].item() == pytest.approx(bias)
    assert model(batch, "generator")[0].item() == pytest.approx(math.log1p(math.exp(-bias)), rel=1e-5)
    loss.backward()  # d/dbias of both softplus
    expected = torch.sigmoid(torch.tensor(bias)) - torch.sigmoid(torch.tensor(-bias))
    torch.testing.assert_close(model.discriminator[-2].bias.grad, expected[None], rtol=1e-5, atol=1e-6)


def test_the_penalty_of_a_linear_score_is_that_of_its_weight():
    weight = torch.randn(2 * 3 * 3, requires_grad=True)
    real, fake, between = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.rand(5)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ weight, real, fake, between)
    norm = weight.detach().norm()
    torch.testing.assert_close(penalty, (norm - 1) ** 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * (norm - 1) * weight.detach() / norm)


def test_the_penalty_of_a_quadratic_score_is_taken_between_and_differentiates_twice():
    real, fake, between = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2), torch.rand(5)
    middle = between[:, None, None, None] * real + (1 - between[:, None, None, None]) * fake
    radius, scale = middle.flatten(1).norm(dim=1), torch.tensor(1.5, requires_grad=True)
    penalty = gradient_penalty(lambda x: scale * x.square().flatten(1).sum(1) / 2, real, fake, between)
    torch.testing.assert_close(penalty, ((1.5 * radius - 1) ** 2).mean())
    penalty.backward()
    torch.testing.assert_close(scale.grad, (2 * (1.5 * radius - 1) * radius).mean())


def test_wgan_gp_adds_the_penalty_in_training_alone():
    torch.manual_seed(0)
    model = models.build("gan", loss="wgan_gp", penalty=3.0)
    batch = model.example(4)
    loss, metrics = model(batch, "discriminator")
    expected = metrics["fake"] - metrics["real"] + 3.0 * metrics["penalty"]
    torch.testing.assert_close(loss.detach(), expected)
    assert metrics["penalty"] > 0
    with torch.no_grad():
        loss, metrics = model.eval()(batch, "discriminator")
    assert "penalty" not in metrics
    torch.testing.assert_close(loss, metrics["fake"] - metrics["real"])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_parameter_is_trained_in_the_phase_of_its_name(loss):
    model = models.build("gan", loss=loss)
    for phase, other in (("discriminator", "generator"), ("generator", "discriminator")):
        model.zero_grad()
        model(model.example(4), phase)[0].backward()
        for name, parameter in model.named_parameters():
            if name.startswith(phase + "."):
                reached = parameter.grad is not None and (parameter.grad.any() or name.endswith("bias"))
                assert reached, f"{phase} gives {name} no gradient"
            if phase == "discriminator" and name.startswith(other + "."):
                assert parameter.grad is None, "the discriminator's loss must not reach the generator"
            if name.startswith("averaged."):
                assert parameter.grad is None and not parameter.requires_grad


def test_the_average_follows_the_generator():
    model = models.build("gan", average=0.75)
    before = model.averaged[0].weight.clone()
    with torch.no_grad():
        model.generator[0].weight += 1
    model.after_step()
    torch.testing.assert_close(model.averaged[0].weight, before + 0.25)
    latents = torch.randn(3, model.config.latent)
    samples = model.predict({"latents_BZ": latents})["pixels_BCHW"]
    torch.testing.assert_close(samples, model.averaged(latents))
    assert samples.shape == (3, 1, 8, 8) and samples.min() >= 0 and samples.max() <= 1


def statistics(pixels):
    flat = pixels.flatten(1)
    return flat.mean(0), flat.T.cov()


@pytest.mark.parametrize("loss,critic", zip(LOSSES, (1, 2)))
def test_samples_come_to_have_the_mean_and_covariance_of_the_data(loss, critic):
    """Digits: the mean comes 4 times as near to that of held-out ones, the covariance 1.15 or 1.4 times."""
    torch.manual_seed(0)
    pixels = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    train, held_out = pixels[:1437], pixels[1437:]
    model = models.build("gan", loss=loss, critic=critic, scale=1 / 16, latent=16, average=0.98)
    sides = {phase: torch.optim.Adam(getattr(model, phase).parameters(), 2e-3, (0.5 if critic == 1 else 0.0, 0.95))
             for phase in ("discriminator", "generator")}  # fmt: skip

    def distance():
        with torch.no_grad():
            samples = model.predict({"latents_BZ": torch.randn(1000, 16)})["pixels_BCHW"]
        (mean, covariance), (truth, spread) = statistics(samples / 16), statistics(held_out / 16)
        return (mean - truth).norm().item(), (covariance - spread).norm().item()

    first = distance()
    for _ in range(300):
        batch = {"pixels_BCHW": train[torch.randint(len(train), (64,))]}
        for phase in model.phases():
            sides[phase].zero_grad()
            model(batch, phase)[0].backward()
            sides[phase].step()
        model.after_step()
    last = distance()
    print(first, last)
    assert last[0] < first[0] / 4
    assert last[1] < first[1] / (1.4 if loss == "wgan_gp" else 1.15)


def test_example_is_squares():
    batch = models.build("gan", channels=2, size=16, scale=0.5).example(5, seed=3)["pixels_BCHW"]
    assert batch.shape == (5, 2, 16, 16) and set(batch.unique().tolist()) == {0.0, 2.0}
    assert (batch > 0).sum((2, 3)).tolist() == [[16, 16]] * 5


def test_every_option_is_live():
    def shapes(model):
        return {name: p.shape for name, p in model.named_parameters()}

    base = models.build("gan")
    for name, value in {"size": 16, "channels": 3, "width": 4, "latent": 3}.items():
        assert shapes(models.build("gan", **{name: value})) != shapes(base), name
    assert models.build("gan", critic=3).phases() == ("discriminator",) * 3 + ("generator",)
    found = []
    for options in ({}, {"loss": "wgan_gp"}, {"loss": "wgan_gp", "penalty": 1.0}, {"scale": 0.5}):
        model = models.build("gan", **options)
        model.load_state_dict(base.state_dict())
        torch.manual_seed(0)
        found.append(model({"pixels_BCHW": torch.full((2, 1, 8, 8), 0.5)}, "discriminator")[0].item())
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"size": 12}, ["size=12", "power of 2"]),
        ({"latent": 0}, ["latent=0", "at least 1"]),
        ({"loss": "hinge"}, ["hinge", "non_saturating", "wgan_gp"]),
        ({"average": 1.0}, ["average=1.0", "below 1"]),
        ({"penalty": -1.0}, ["penalty=-1.0"]),
    ],
)
def test_a_mistake_gets_one_clear_line(options, words):
    with pytest.raises(ValueError) as error:
        models.build("gan", **options)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_wrong_inputs_are_refused():
    model = models.build("gan")
    with pytest.raises(ValueError, match="pixels_BCHW: expected .rows, 1, 8, 8."):
        model({"pixels_BCHW": torch.zeros(2, 1, 4, 8)}, "generator")
    with pytest.raises(ValueError, match="phase='main'"):
        model(model.example(2), "main")
