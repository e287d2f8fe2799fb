"""Reading further than a model was trained: `python -m jobs.extend RUN [--factor 8]`.

Its weights are run on held-out documents `factor` times the trained length, with the positions as they are, with YaRN
and with dual chunk attention, none of them trained any further. Printed and drawn (context.png in the run's folder, or
--plot FILE) is the perplexity at each distance from the beginning of a document.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from jobs import cli, given
from jobs.config import from_json
from jobs.data import index_of, prepare
from jobs.pretrain import run_folder
from models import hub, registry
from models.config import make_config, parse_part, parse_pattern, to_text
from models.decoder import Decoder
from models.mixers.dual_chunk_attention import DualChunkAttention
from models.mixers.gqa import GQA
from models.positions.rope import RoPE
from models.positions.yarn import YaRN

BATCH = 4


def extended(config: Decoder.Config, trained: int, factor: int) -> dict[str, Decoder.Config]:
    """The same weights under other positions, by name. ValueError when no layer attends with plain rotary positions."""
    parts = parse_pattern(config.pattern, "mixer")
    if not any(_rotary(cls, part) for cls, part in parts):
        raise ValueError(f"pattern {config.pattern!r} has no gqa over its whole context with rope positions")

    def changed(change) -> Decoder.Config:
        texts = [to_text(change(part) if _rotary(cls, part) else part) for cls, part in parts]
        return dataclasses.replace(config, pattern=" ".join(texts))

    def yarn(part: GQA.Config) -> GQA.Config:
        rope = parse_part(part.positions, "position")[1]
        scheme = YaRN.Config(theta=rope.theta, fraction=rope.fraction, factor=float(factor), original=trained)
        return dataclasses.replace(part, positions=to_text(scheme))

    def chunks(part: GQA.Config) -> DualChunkAttention.Config:
        shared = {
            name: value for name, value in vars(part).items() if name in DualChunkAttention.Config.__dataclass_fields__
        }
        return make_config(DualChunkAttention, {**shared, "chunk": trained * 3 // 4, "local": trained // 8})

    return {"rope": config, f"yarn, factor {factor}": changed(yarn), "dual chunks": changed(chunks)}


def _rotary(cls: type, part) -> bool:
    return cls is GQA and not part.window and parse_part(part.positions, "position")[0] is RoPE


def long_rows(prepared, length: int, count: int) -> Tensor:
    """Held-out rows of one document each, (count, length + 1) int64. ValueError when there are none so long."""
    index, found = index_of(prepared, "val", length), []
    for start in range(index.samples_per_epoch):
        batch = index.rows(start, 1)
        if (batch["segments_BT"] == 0).all() and (batch["targets_BT"] >= 0).all():
            found.append(torch.cat([batch["ids_BT"], batch["targets_BT"][:, -1:]], 1))
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"no held-out document has {length} tokens: lower --factor, or train on longer documents")
    return torch.cat(found)


@torch.inference_mode()
def losses(model: Decoder, rows_BT: Tensor) -> Tensor:
    """Mean loss in nats of each position, (T) float64."""
    total = torch.zeros(rows_BT.shape[1] - 1, dtype=torch.float64)
    for rows in rows_BT.split(BATCH):
        x_BTD, at, _ = model.hidden(rows[:, :-1].contiguous())
        total += model.head(x_BTD, at, targets_BT=rows[:, 1:].contiguous())[0].double().sum(0)
    return total / len(rows_BT)


def draw(curves: dict[str, list[float]], edges: list[int], trained: int, file: Path) -> None:
    """Perplexity against the distance from the document's beginning; a line marks the trained length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="tokens from the beginning of the document", ylabel="perplexity", yscale="log")
    for name, values in curves.items():
        axes.plot(edges, values, marker="o", markersize=3, label=name)
    axes.axvline(trained, color="gray", linestyle="--", linewidth=1, label="trained length")
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def extend(name: str, factor: int, count: int) -> tuple[dict[str, list[float]], list[int], int]:
    """Perplexities in eighths of the trained length and then in doublings: curves by name, edges, trained length."""
    found = given.find(name)
    if found.job is None:
        raise ValueError(f"{name}: give a run; a model folder does not say how long its rows were")
    job = from_json(found.job)
    if not isinstance(job.model, Decoder.Config):
        raise ValueError(f"{name} is no decoder")
    trained = job.length
    rows_BT = long_rows(prepare(job.data), trained * factor, count)
    edges = [trained // 4, trained // 2] + [trained * n for n in range(1, factor + 1)]
    curves, weights = {}, hub.weights(given.load(found))
    for label, config in extended(job.model, trained, factor).items():
        model = registry.owner(config)(config).eval()
        hub.set_weights(model, weights, label)
        nats = losses(model, rows_BT)
        bounds = zip([0, *edges], edges)
        curves[label] = [math.exp(min(nats[low:high].mean().item(), 50)) for low, high in bounds]
        print(f"{label}: {len(rows_BT)} documents of {trained * factor} tokens", flush=True)
    return curves, edges, trained


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.extend", description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a run, or its name")
    parser.add_argument("--factor", type=int, default=8, help="how many times the trained length")
    parser.add_argument("--rows", type=int, default=16, help="long documents to read")
    parser.add_argument("--plot", type=Path, help="file of the plot; without it context.png in the run's folder")
    arguments = parser.parse_args()
    try:
        if arguments.factor < 2 or arguments.rows < 1:
            raise ValueError("--factor must be at least 2 and --rows at least 1")
        curves, edges, trained = extend(arguments.run, arguments.factor, arguments.rows)
        file = arguments.plot or run_folder(Path(arguments.run).name) / "context.png"
        draw(curves, edges, trained, file)
    except (ValueError, OSError) as error:
        cli.fail(error)
    print(f"{'tokens up to':>16}" + "".join(f"{edge:>9}" for edge in edges))
    for label, values in curves.items():
        print(f"{label:>16}" + "".join(f"{value:9.1f}" for value in values))
    print(file)


if __name__ == "__main__":
    main()
