"""GAN: a generator turns noise into images, a discriminator tells them from real ones; each learns against the other.

    non_saturating:  L_D = E softplus(-D(x)) + E softplus(D(G(z))),   L_G = E softplus(-D(G(z)))
    wgan_gp:         L_D = E D(G(z)) - E D(x) + penalty E (|dD/dx^|_2 - 1)^2,   L_G = -E D(G(z))

x^ lies at a random place between a real and a generated image. arXiv 1406.2661 (GAN), 1704.00028 (WGAN-GP), 1802.05957
(convolutions). The phases of a step are named after the submodules that they train. Differs from the papers: no batch
norm, group norm in the generator; samples come from an average of the generator's weights (1806.04498).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.model import Batch, Input, Model


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, convolution, norm."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(1, outside)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))))


class Generator(nn.Sequential):
    """Noise (B, Z) to images (B, channels, size, size) between 0 and 1."""

    def __init__(self, latent: int, width: int, channels: int, size: int) -> None:
        doublings = (size // 4).bit_length() - 1
        widths = [width << (doublings - n) for n in range(doublings + 1)]
        super().__init__(
            nn.Linear(latent, widths[0] * 16),
            nn.Unflatten(1, (widths[0], 4, 4)),
            nn.GroupNorm(1, widths[0]),
            nn.ReLU(),
            *(Upsample(widths[n], widths[n + 1]) for n in range(doublings)),
            nn.Conv2d(widths[-1], channels, 3, padding=1),
            nn.Sigmoid(),
        )


class Discriminator(nn.Sequential):
    """Images to a score (B): high for real ones. No norm: the gradient penalty is of each image alone."""

    def __init__(self, width: int, channels: int, size: int) -> None:
        halvings = (size // 4).bit_length() - 1
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for n in range(halvings):
            layers += [nn.Conv2d(width << n, width << (n + 1), 4, 2, 1), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear((width << halvings) * 16, 1), nn.Flatten(0))


class GAN(Model):
    family = "generative"

    @dataclass(frozen=True)
    class Config:
        """size: of the square images, 4 times a power of 2. width: channels of a convolution at full size.

        latent: numbers of noise. critic: discriminator updates in a step. penalty: of the gradient, for wgan_gp.
        scale: pixels times it lie in 0..1. average: share of the old in the running mean of the generator's weights.
        """

        size: int = 32
        channels: int = 3
        width: int = 64
        latent: int = 64
        loss: Literal["non_saturating", "wgan_gp"] = "non_saturating"
        critic: int = 1
        penalty: float = 10.0
        scale: float = 1.0
        average: float = 0.999

        @classmethod
        def tiny(cls) -> "GAN.Config":
            return cls(size=8, channels=1, width=8, latent=8, average=0.9)

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        for name in ("channels", "width", "latent", "critic"):
            if getattr(c, name) < 1:
                raise ValueError(f"gan.{name}={getattr(c, name)}: must be at least 1")
        if c.size < 4 or c.size % 4 or c.size & (c.size - 1):
            raise ValueError(f"gan.size={c.size}: must be 4, 8, 16, 32 or another power of 2")
        if c.penalty < 0:
            raise ValueError(f"gan.penalty={c.penalty}: must be at least 0")
        if not 0 <= c.average < 1:
            raise ValueError(f"gan.average={c.average}: must be at least 0 and below 1")
        self.config = c
        self.generator = Generator(c.latent, c.width, c.channels, c.size)
        self.discriminator = Discriminator(c.width, c.channels, c.size)
        self._init_weights()
        self.averaged = Generator(c.latent, c.width, c.channels, c.size).requires_grad_(False)
        self.averaged.load_state_dict(self.generator.state_dict())

    @torch.no_grad()
    def _init_weights(self) -> None:
        """N(0, 2/fan_in), which keeps the size of what relus pass on; the score starts near zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.discriminator[-2].weight, std=0.02)

    def phases(self) -> tuple[str, ...]:
        return ("discriminator",) * self.config.critic + ("generator",)

    def forward(self, batch: Batch, phase: str = "discriminator") -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one side on `pixels_BCHW`, of any real dtype, and fresh noise. ValueError for another phase.

        The penalty needs gradients; an evaluation leaves it out, and what remains under wgan_gp is minus the estimated
        distance between data and samples.
        """
        if phase not in ("discriminator", "generator"):
            raise ValueError(f"phase={phase!r}: a gan has discriminator and generator")
        real_BCHW = self.pixels(batch["pixels_BCHW"])
        fake_BCHW = self.generator(self.noise(len(real_BCHW)))
        if phase == "generator":
            loss = generator_loss(self.discriminator(fake_BCHW).float(), self.config.loss)
            return loss, {"loss": loss.detach()}
        fake_BCHW = fake_BCHW.detach()
        real_B, fake_B = self.discriminator(torch.cat([real_BCHW, fake_BCHW])).float().chunk(2)
        loss = discriminator_loss(real_B, fake_B, self.config.loss)
        metrics = {"loss": loss.detach(), "real": real_B.detach().mean(), "fake": fake_B.detach().mean()}
        if self.config.loss == "wgan_gp" and self.training:
            penalty = gradient_penalty(self.discriminator, real_BCHW, fake_BCHW, self.places(len(real_BCHW)))
            loss, metrics["penalty"] = loss + self.config.penalty * penalty, penalty.detach()
        return loss, metrics

    def pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """Images as the discriminator takes them."""
        shape = (self.config.channels, self.config.size, self.config.size)
        if tuple(pixels_BCHW.shape[1:]) != shape:
            raise ValueError(
                f"pixels_BCHW: expected (rows, {', '.join(map(str, shape))}), got {tuple(pixels_BCHW.shape)}"
            )
        return (pixels_BCHW.float() * self.config.scale).to(self.generator[0].weight.dtype)

    def noise(self, rows: int) -> Tensor:
        """Latents (rows, Z), normal, from torch's own generator."""
        weight = self.generator[0].weight
        return torch.randn(rows, self.config.latent, device=weight.device, dtype=weight.dtype)

    def places(self, rows: int) -> Tensor:
        """Where between a generated image (0) and a real one (1) the slope is taken: (rows), uniform."""
        weight = self.generator[0].weight
        return torch.rand(rows, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the averaged generator towards the present one."""
        for mean, value in zip(self.averaged.parameters(), self.generator.parameters(), strict=True):
            mean.lerp_(value.to(mean.dtype), 1 - self.config.average)

    def predict(self, inputs: Batch) -> Batch:
        """Images, at the data's own scale, of the given `latents_BZ`, by the averaged generator."""
        return {"pixels_BCHW": self.averaged(inputs["latents_BZ"]) / self.config.scale}

    def takes(self) -> dict[str, Input]:
        return {"latents_BZ": Input(torch.float32, (self.config.latent,))}

    def example(self, n: int, seed: int = 0) -> Batch:
        """A bright square, a quarter of the image wide, somewhere on a dark one."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        wide = max(c.size // 4, 1)
        corner_BA1 = torch.randint(c.size - wide + 1, (n, 2, 1), generator=generator)
        inside_BAS = (torch.arange(c.size) >= corner_BA1) & (torch.arange(c.size) < corner_BA1 + wide)
        square_BSS = inside_BAS[:, 0, :, None] & inside_BAS[:, 1, None, :]
        return {"pixels_BCHW": (square_BSS[:, None].float() / c.scale).repeat(1, c.channels, 1, 1)}


def discriminator_loss(real_B: Tensor, fake_B: Tensor, loss: str) -> Tensor:
    """Of the scores of real and of generated images, without the penalty."""
    if loss == "wgan_gp":
        return fake_B.mean() - real_B.mean()
    return F.softplus(-real_B).mean() + F.softplus(fake_B).mean()


def generator_loss(fake_B: Tensor, loss: str) -> Tensor:
    """Of the scores of generated images."""
    return -fake_B.mean() if loss == "wgan_gp" else F.softplus(-fake_B).mean()


def gradient_penalty(
    score: Callable[[Tensor], Tensor], real_BCHW: Tensor, fake_BCHW: Tensor, between_B: Tensor
) -> Tensor:
    """Mean squared deviation from 1 of the score's slope, `between_B` of the way from fake to real; differentiable."""
    between_B111 = between_B[:, None, None, None]
    middle_BCHW = torch.lerp(fake_BCHW.detach(), real_BCHW, between_B111).requires_grad_()
    slope_BCHW = torch.autograd.grad(score(middle_BCHW).sum(), middle_BCHW, create_graph=True)[0]
    return (slope_BCHW.float().flatten(1).norm(dim=1) - 1).square().mean()
