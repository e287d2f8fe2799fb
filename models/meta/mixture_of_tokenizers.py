"""Mixture of tokenizers: experts read one text, each in tokens of its own; a gate says at each byte whom to ask.

    h_e = N(stack_e(tokens_e)),   u_te = h_e[last token that has ended by t] + F_e[what is read of the next one]
    g_t = softmax_e(W_g [u_t1 .. u_tE]),   logits_t = W_o sum_e g_te u_te

No paper of this name was found; a gate that mixes is 1701.06538's, one text read at two grains is 2412.09871's (BLT).
A tokenisation must not look ahead, as BPE and longest match do: here a dictionary is a tree in which a token that has
children is never whole (Tunstall's code), so its last byte tells that a token ends. Streams are as short as their
tokens are long, and meet again at bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.config import at_least, parse_part
from models.layers import norm
from models.layers.norm import Norm
from models.model import Batch, Input, Model
from models.span import Span, localize
from models.stack import Stack, draw_linears
from models.stateful import Place


class Dictionary(nn.Module):
    """Strings of bytes as tokens: ids 0 .. vocab - 1 are the bytes, and every id of `opened` is a beginning.

    The j-th opened one is continued by byte x in token vocab (j + 1) + x, which may be opened by a later entry.
    text: "bytes" opens none, "pairs" all bytes; else the opened ids, as "3 17 290". ValueError where one is no token.
    """

    def __init__(self, text: str, vocab: int) -> None:
        super().__init__()
        named = {"bytes": (), "pairs": tuple(range(vocab))}
        words = text.split() or [text]
        opened = named[text] if text in named else tuple(int(word) if word.isdigit() else -1 for word in words)
        for j, token in enumerate(opened):
            if not 0 <= token < vocab * (j + 1) or token in opened[:j]:
                raise ValueError(
                    f"mixture_of_tokenizers.experts={text!r}: write bytes, pairs, or the ids of tokens in the order in "
                    f"which they are opened, each known by then and only once (vocab={vocab})"
                )
        self.opened, self.count = opened, vocab * (len(opened) + 1)
        token_SV = torch.arange(self.count).view(-1, vocab)  # by what has been read of a token, 0 for nothing
        after = torch.zeros(self.count, dtype=torch.int64)
        after[list(opened)] = torch.arange(1, len(opened) + 1)
        self.register_buffer("after_SV", after[token_SV], persistent=False)
        self.register_buffer("token_SV", torch.where(after[token_SV] > 0, -1, token_SV), persistent=False)

    def forward(self, ids_BT: Tensor, local_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The token that ends at each byte, -1 for none, and what has then been read of the next, 0 for nothing.

        Both (B, T) int64. local, positions: of `localize`; a document begins with a token.
        """
        real_BT1, begins_BT1 = (local_BT >= 0)[..., None], (positions_BT == 0)[..., None]
        step_BTS = self.after_SV.T[ids_BT]  # what a byte makes of each beginning
        step_BTS = torch.where(begins_BT1, step_BTS[..., :1], step_BTS)
        step_BTS = torch.where(real_BT1, step_BTS, torch.arange(step_BTS.shape[-1], device=ids_BT.device))
        reach = 1
        while reach < ids_BT.shape[1]:  # of the last 2, 4, 8 .. bytes together: no walk from byte to byte
            step_BTS = torch.cat([step_BTS[:, :reach], step_BTS[:, reach:].gather(2, step_BTS[:, :-reach])], 1)
            reach *= 2
        inside_BT = step_BTS[..., 0]
        before_BT = torch.cat([torch.zeros_like(inside_BT[:, :1]), inside_BT[:, :-1]], 1)
        before_BT = torch.where(begins_BT1[..., 0], 0, before_BT)
        return torch.where(real_BT1[..., 0], self.token_SV[before_BT, ids_BT], -1), inside_BT


def learn(ids_N: Tensor, vocab: int, count: int) -> str:
    """A dictionary for a text (N,) int64: `count` times its most frequent token is opened. For `Config.experts`."""
    opened: list[int] = []
    local_1N, positions_1N = torch.zeros_like(ids_N)[None], torch.arange(len(ids_N))[None]
    for _ in range(count):
        dictionary = Dictionary(" ".join(map(str, opened)) or "bytes", vocab)
        token_N = dictionary(ids_N[None], local_1N, positions_1N)[0][0]
        opened.append(int(token_N[token_N >= 0].bincount().argmax()))
    return " ".join(map(str, opened)) or "bytes"


class Expert(nn.Module):
    """A stack over the tokens of one dictionary, heard at bytes."""

    def __init__(self, config: "MixtureOfTokenizers.Config", text: str) -> None:
        super().__init__()
        c = config
        self.dictionary = Dictionary(text, c.vocab)
        self.embedding = nn.Embedding(self.dictionary.count, c.dim)
        self.begun = nn.Embedding(len(self.dictionary.opened), c.dim) if self.dictionary.opened else None
        self.blocks = Stack(c.pattern, c.ffn, c.block, c.dim, c.layers, self.dictionary.count, norm=c.norm, eps=c.eps)
        self.norm = norm.make(c.norm, c.dim, c.eps)
        nn.init.normal_(self.embedding.weight, std=c.dim**-0.5)
        if self.begun is not None:
            nn.init.normal_(self.begun.weight, std=1.0)  # as what it is added to

    def forward(self, ids_BT: Tensor, local_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Span]:
        """What it knows at each byte (B, T, D), and the span of its tokens, for their losses and metrics."""
        token_BT, inside_BT = self.dictionary(ids_BT, local_BT, positions_BT)
        ends_BT = token_BT >= 0
        ended_BT = ends_BT.long().cumsum(1)
        most = ids_BT.shape[1]
        if not torch.compiler.is_compiling():
            most = max(1, int(ended_BT[:, -1].max()))
        column_BN = torch.sort((~ends_BT).long(), dim=1, stable=True).indices[:, :most]
        segments_BN = torch.where(ends_BT.gather(1, column_BN), local_BT.gather(1, column_BN), -1)
        own_BN, places_BN = localize(segments_BN)
        token_BN = token_BT.gather(1, column_BN).clamp(min=0)
        alone = not torch.compiler.is_compiling() and bool((own_BN == 1).all())  # kernels are fastest with no numbers
        at = Span(places_BN, token_BN, None if alone else own_BN)
        x_BND = self.embedding(token_BN)
        at.shared["embedding"] = x_BND
        h_BND = self.norm(self.blocks(x_BND, at)[0])
        # A document has heard of no token but its own.
        begins_BT = (positions_BT == 0) & (local_BT >= 0)
        before_BT = torch.where(begins_BT, ended_BT - ends_BT.long(), 0).cummax(1).values
        index_BT1 = (ended_BT - 1).clamp(min=0)[..., None]
        h_BTD = h_BND.gather(1, index_BT1.expand(-1, -1, h_BND.shape[-1]))
        u_BTD = torch.where((ended_BT > before_BT)[..., None], h_BTD, 0)
        if self.begun is not None:
            u_BTD = u_BTD + torch.where((inside_BT > 0)[..., None], self.begun((inside_BT - 1).clamp(min=0)), 0)
        return u_BTD, at


class MixtureOfTokenizers(Model):
    family = "meta"

    @dataclass(frozen=True)
    class Config:
        """vocab: classes of a byte. experts: a dictionary for each, "bytes", "pairs" or what `learn` returns.

        pattern, ffn, block: mixers, ffns and residual schemes of every expert, tiled over `layers`. norm, eps: of all
        norms.
        """

        vocab: int = 256
        dim: int = 256
        layers: int = 4
        experts: tuple[str, ...] = ("bytes", "pairs")
        pattern: str = "gqa"
        ffn: str = "swiglu"
        block: str = "norm_placement"
        norm: Norm = "rms"
        eps: float = 1e-6

        @classmethod
        def tiny(cls) -> "MixtureOfTokenizers.Config":
            return cls(vocab=16, dim=32, layers=1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        at_least(config, vocab=1, dim=1, layers=1)
        if not config.experts:
            raise ValueError("mixture_of_tokenizers.experts=(): name at least one dictionary, as ['bytes','pairs']")
        self.config = c = config
        self.experts = nn.ModuleList(Expert(c, text) for text in c.experts)
        self.gate = nn.Linear(len(c.experts) * c.dim, len(c.experts), bias=False)
        head, head_config = parse_part("lm", "head")
        self.head = head(head_config, Place(c.dim, c.layers, c.layers, c.vocab, c.norm, c.eps))
        if not all(expert.blocks.causal for expert in self.experts):
            raise ValueError(
                f"mixture_of_tokenizers.pattern={c.pattern!r}: sees later tokens, which are to be predicted"
            )
        draw_linears(self, c.layers)

    def hidden(self, ids_BT: Tensor, segments_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Span]:
        """The mixture (B, T, D), the gate (B, T, E), and the span of the bytes with all experts' losses and metrics."""
        if ids_BT.dim() != 2 or ids_BT.dtype != torch.int64 or not ids_BT.numel():
            raise ValueError(f"ids_BT: expected int64 (rows, bytes), got {ids_BT.dtype} {tuple(ids_BT.shape)}")
        local_BT, positions_BT = localize(torch.zeros_like(ids_BT) if segments_BT is None else segments_BT)
        at = Span(positions_BT, ids_BT, None if segments_BT is None else local_BT)
        heard = []
        for expert in self.experts:
            u_BTD, own = expert(ids_BT, local_BT, positions_BT)
            heard.append(u_BTD)
            at.losses.extend(own.losses)
            at.log(**{name: torch.stack(values).mean() for name, values in own.metrics.items()})
        gate_BTE = self.gate(torch.cat(heard, -1)).float().softmax(-1)
        x_BTD = (gate_BTE.to(heard[0].dtype)[..., None, :] @ torch.stack(heard, -2))[..., 0, :]
        return x_BTD, gate_BTE, at

    def forward(self, batch: Batch, phase: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the next byte in nats over the targets (-100: none), `segments_BT` may be missing; as `Decoder`.

        The metrics tell the share of the gate that each expert has.
        """
        x_BTD, gate_BTE, at = self.hidden(batch["ids_BT"], batch.get("segments_BT"))
        losses_BT, _ = self.head(x_BTD, at, targets_BT=batch["targets_BT"])
        loss = losses_BT.sum() / self.weight(batch).clamp(min=1)
        told_BT1 = (batch["targets_BT"] != -100)[..., None]
        share_E = (gate_BTE * told_BT1).sum((0, 1)) / told_BT1.sum().clamp(min=1)
        at.log(**{f"expert_{e}": share for e, share in enumerate(share_E)})
        metrics = {name: torch.stack(values).mean() for name, values in at.metrics.items()}
        total = loss + torch.stack(at.losses).sum() if self.training and at.losses else loss
        return total, {"loss": loss.detach()} | metrics

    def weight(self, batch: Batch) -> Tensor:
        return (batch["targets_BT"] != -100).sum()

    def predict(self, inputs: Batch) -> Batch:
        """Logits of the byte after each of `ids_BT`, and the experts' shares in them."""
        x_BTD, gate_BTE, at = self.hidden(inputs["ids_BT"], inputs.get("segments_BT"))
        return {"logits_BTC": self.head(x_BTD, at)[0], "gate_BTE": gate_BTE}

    def takes(self) -> dict[str, Input]:
        return {
            "ids_BT": Input(torch.int64, (None,), 0, self.config.vocab - 1),
            "segments_BT": Input(torch.int64, (None,), -1, like="ids_BT", optional=True),
        }

    def example(self, n: int, seed: int = 0) -> Batch:
        """Rows of 32 bytes in words of two: each word, not its last byte alone, tells the next."""
        letters = min(4, self.config.vocab)
        count = letters * letters
        word_B = torch.randint(count, (n,), generator=torch.Generator().manual_seed(seed))
        follows = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        order = torch.empty_like(follows)
        order[follows] = follows.roll(1)  # one cycle through all words
        words = [word_B]
        for _ in range(16):
            words.append(order[words[-1]])
        word_BW = torch.stack(words, 1)
        row_BT = torch.stack([word_BW // letters, word_BW % letters], -1).flatten(1)[:, :33]
        return {"ids_BT": row_BT[:, :-1].contiguous(), "targets_BT": row_BT[:, 1:].contiguous()}
