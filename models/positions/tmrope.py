"""TMRoPE: time-aligned rotary positions. A token stands on three axes, and each axis turns its own pairs of channels.

    pair i turns by theta^(-2i/K) p[axis of i],   p = (time, height, width)

arXiv 2503.20215 (Qwen2.5-Omni). Text and audio stand at (n, n, n), one step of audio being 40 ms; the patches of a
frame at (time of the frame, row, column); what follows begins after the largest number so far. Text alone is plain
RoPE. Film and sound of one recording alternate in pieces of two seconds, so what was heard stands where it was seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import rope_angles
from models.layers.rotary import Rotary
from models.stateful import Place

STEPS = 25  # a second
PIECE = 2 * STEPS  # of a recording, its film before its sound


class TMRoPE(Rotary):
    axes = 3

    @dataclass(frozen=True)
    class Config(Rotary.Config):
        """shares: of the pairs that turn with time, height and width, in this order."""

        shares: tuple[int, ...] = (2, 3, 3)

        @classmethod
        def tiny(cls) -> "TMRoPE.Config":
            return cls(shares=(1, 1, 2))

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__(config, dim, heads, place)
        pairs, whole = self.turned // 2, sum(config.shares)
        if len(config.shares) != 3 or not whole or pairs % whole:
            raise ValueError(
                f"tmrope.shares={config.shares}: three numbers whose sum divides the {pairs} pairs of a head"
            )
        counts = torch.tensor(config.shares) * (pairs // whole)
        self.register_buffer("axes_K", torch.arange(3).repeat_interleave(counts), persistent=False)

    def angles(self, places: Tensor) -> Tensor:
        if places.dim() == 2:
            return super().angles(places)
        angle_ABTR = torch.stack([rope_angles(axis_BT, self.frequency(axis_BT)) for axis_BT in places.unbind(-1)])
        return angle_ABTR.gather(0, self.axes_K.expand(1, *angle_ABTR.shape[1:]))[0]


@dataclass(frozen=True)
class Text:
    """Tokens of text, marks of the beginning and end of other parts among them."""

    tokens: int


@dataclass(frozen=True)
class Audio:
    """Tokens of sound, 40 ms each."""

    tokens: int


@dataclass(frozen=True)
class Vision:
    """An image, or a film of several frames `seconds` apart; height and width in tokens."""

    height: int
    width: int
    frames: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Recording:
    """A film with its sound. It is opened and closed by two marks each (of the film, of the sound) at one place."""

    film: Vision
    sound: Audio


def places(parts: list[Text | Audio | Vision | Recording]) -> Tensor:
    """Where the tokens of a sequence stand, (T, 3) int64: time, height, width; `Decoder.logits` takes rows of them."""
    found, start = [torch.empty(0, 3, dtype=torch.int64)], 0
    for part in parts:
        for piece in _pieces(part, start):
            found.append(piece)
            start = max(start, int(piece.max()) + 1) if len(piece) else start
    return torch.cat(found)


def _pieces(part: Text | Audio | Vision | Recording, start: int) -> list[Tensor]:
    if isinstance(part, Text | Audio):
        return [_line(start, part.tokens)]
    if isinstance(part, Vision):
        return [_grid(start, part)]
    mark = _line(start, 1)
    film, sound = _grid(start + 1, part.film), _line(start + 1, part.sound.tokens)
    pieces = [(tokens[:, 0] - start - 1) // PIECE for tokens in (film, sound)]
    alternating = [
        tokens[piece == number]
        for number in range(int(torch.cat(pieces).max()) + 1)
        for tokens, piece in zip((film, sound), pieces)
    ]
    end = _line(int(torch.cat([film, sound]).max()) + 1, 1)
    return [mark, mark, *alternating, end, end]


def _line(start: int, tokens: int) -> Tensor:
    return torch.arange(start, start + tokens)[:, None].expand(-1, 3)


def _grid(start: int, film: Vision) -> Tensor:
    time = (torch.arange(film.frames) * torch.tensor(film.seconds) * STEPS).long()
    axes = torch.meshgrid(time, torch.arange(film.height), torch.arange(film.width), indexing="ij")
    return torch.stack(axes, -1).flatten(0, 2) + start
