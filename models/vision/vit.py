"""ViT: an image is a sequence of patches, read by a transformer that sees all of them; a class token tells the class.

    x = [class; E p_1; ...; E p_N] + positions
    x = x + mixer(norm(x));  x = x + W_o gelu(W_i norm(x))
    y = W norm(x)_class

arXiv 2010.11929: LayerNorm before each branch, biases everywhere, learned positions. The mixer is any part that sees
both ways. C is the number of classes in `logits_BC`, of channels in `pixels_BCHW`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import parse_part
from models.model import Batch, Input, Model
from models.span import Span
from models.stateful import Place


class Layer(nn.Module):
    """A pre-norm encoder layer with LayerNorm and a GELU MLP."""

    def __init__(self, mixer: nn.Module, dim: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.LayerNorm(dim, eps), mixer
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.wi, self.wo = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_BTD: Tensor, at: Span) -> Tensor:
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), at)[0]
        return x_BTD + self.wo(F.gelu(self.wi(self.mlp_norm(x_BTD))))


class ViT(Model):
    family = "vision"

    @dataclass(frozen=True)
    class Config:
        """size: height and width of an image, a multiple of patch. hidden: units of the MLP, 0 means 4 dim.

        mixer: a part that sees both ways. scale: pixels are multiplied by it (1/16 where they go to 16). shift: images
        are moved by up to so many pixels in training, what leaves is lost and zeros come in.
        """

        size: int = 224
        patch: int = 16
        channels: int = 3
        classes: int = 1000
        dim: int = 768
        layers: int = 12
        mixer: str = "gqa(heads=12,kv_heads=12,positions=nope,mask=full,bias=True,out_bias=True)"
        hidden: int = 0
        eps: float = 1e-12
        scale: float = 1.0
        shift: int = 0

        @classmethod
        def tiny(cls) -> "ViT.Config":
            mixer = "gqa(heads=4,kv_heads=4,positions=nope,mask=full,bias=True,out_bias=True)"
            return cls(size=8, patch=2, channels=1, classes=10, dim=32, layers=2, mixer=mixer)

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        for name in ("size", "patch", "channels", "classes", "dim", "layers"):
            if getattr(c, name) < 1:
                raise ValueError(f"vit.{name}={getattr(c, name)}: must be at least 1")
        if c.size % c.patch:
            raise ValueError(f"vit: size={c.size} must be a multiple of patch={c.patch}")
        if not 0 <= c.shift < c.size:
            raise ValueError(f"vit.shift={c.shift}: must be at least 0 and below size={c.size}")
        mixer, mixer_config = parse_part(c.mixer, "mixer")
        self.config, tokens = c, (c.size // c.patch) ** 2 + 1
        self.patches = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, c.dim))
        self.positions = nn.Parameter(torch.empty(1, tokens, c.dim))
        self.layers = nn.ModuleList(
            Layer(mixer(mixer_config, Place(c.dim, layer, c.layers)), c.dim, c.hidden or 4 * c.dim, c.eps)
            for layer in range(c.layers)
        )
        if any(layer.mixer.causal for layer in self.layers):
            raise ValueError(f"vit.mixer={c.mixer!r}: sees only earlier patches; gqa(mask=full) sees all")
        self.norm, self.head = nn.LayerNorm(c.dim, c.eps), nn.Linear(c.dim, c.classes)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Matrices N(0, 1/fan_in), less where they write to the stream. Positions are large enough to be seen beside
        the patches from the first step: with the usual 0.02, digits are learnt more slowly.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                std = module.weight[0].numel() ** -0.5
                branches = 2 * self.config.layers if name.endswith("wo") else 1
                nn.init.normal_(module.weight, std=std / branches**0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_token, std=0.3)
        nn.init.normal_(self.positions, std=0.3)

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """Class logits (B, C) of images of any real dtype. ValueError for another shape than the config's."""
        shape = (self.config.channels, self.config.size, self.config.size)
        if tuple(pixels_BCHW.shape[1:]) != shape:
            raise ValueError(
                f"pixels_BCHW: expected (rows, {', '.join(map(str, shape))}), got {tuple(pixels_BCHW.shape)}"
            )
        x_BCHW = (pixels_BCHW.float() * self.config.scale).to(self.positions.dtype)
        x_BTD = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        x_BTD = torch.cat([self.class_token.expand(len(x_BTD), -1, -1), x_BTD], 1) + self.positions
        at = Span(torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[:2]))
        for layer in self.layers:
            x_BTD = layer(x_BTD, at)
        return self.head(self.norm(x_BTD[:, 0]))

    def forward(self, batch: Batch, phase: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats and accuracy; batch: pixels_BCHW, labels_B (int64)."""
        pixels_BCHW = batch["pixels_BCHW"]
        if self.training and self.config.shift:
            pixels_BCHW = shifted(pixels_BCHW, self.config.shift)
        logits_BC, labels_B = self.logits(pixels_BCHW).float(), batch["labels_B"]
        loss = F.cross_entropy(logits_BC, labels_B)
        accuracy = (logits_BC.argmax(1) == labels_B).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy}

    def predict(self, inputs: Batch) -> Batch:
        """The logits and the likeliest class of each of `pixels_BCHW`."""
        logits_BC = self.logits(inputs["pixels_BCHW"])
        return {"logits_BC": logits_BC, "labels_B": logits_BC.argmax(1)}

    def takes(self) -> dict[str, Input]:
        return {"pixels_BCHW": Input(torch.float32, (self.config.channels, self.config.size, self.config.size))}

    def example(self, n: int, seed: int = 0) -> Batch:
        """A picture of each class, fixed, under noise."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        pictures = torch.randn(c.classes, c.channels, c.size, c.size, generator=torch.Generator().manual_seed(0))
        labels_B = torch.randint(c.classes, (n,), generator=generator)
        noise_BCHW = torch.randn(n, c.channels, c.size, c.size, generator=generator)
        return {"pixels_BCHW": (pictures[labels_B] + 0.5 * noise_BCHW) / c.scale, "labels_B": labels_B}


def shifted(pixels_BCHW: Tensor, most: int) -> Tensor:
    """Each image moved by its own random offset of up to `most` pixels each way."""
    rows, _, height, width = pixels_BCHW.shape
    padded = F.pad(pixels_BCHW, (most,) * 4)
    down_B, right_B = torch.randint(2 * most + 1, (2, rows), device=pixels_BCHW.device)
    y_BHW = (down_B[:, None] + torch.arange(height, device=down_B.device))[:, :, None]
    x_BHW = (right_B[:, None] + torch.arange(width, device=down_B.device))[:, None, :]
    row_BHW = torch.arange(rows, device=down_B.device)[:, None, None]
    return padded[row_BHW, :, y_BHW, x_BHW].movedim(-1, 1)
