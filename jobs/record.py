"""What a run writes down: metrics.jsonl (one line per step or evaluation), TensorBoard, loss.png, the progress line.

metrics.jsonl is the truth, the others are views of it. When a run goes on from a checkpoint, lines after the
checkpoint's step are cut off: those steps are made again, and the curve has every step once.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
# What a run is judged by, the first that it has: name in an evaluation -> how it is called.
HEADLINES = {"val_bits_per_byte": "bits/byte", "val_accuracy": "accuracy", "val_loss": "loss"}


def read(run: Path) -> list[dict[str, Any]]:
    """Records of a run, in order. The line a kill has torn is left out."""
    path, records = run / METRICS, []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class Recorder:
    """Writes the records of one rank, going on after `step`. Closing draws the plot."""

    def __init__(self, run: Path, step: int, steps: int, say: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [record for record in read(run) if record["step"] <= step] if step else []
        run.mkdir(parents=True, exist_ok=True)
        part = run / (METRICS + ".part")
        part.write_text("".join(json.dumps(record) + "\n" for record in kept))
        part.replace(run / METRICS)  # at once: a kill here must not lose the curve
        self.run, self.steps, self.say = run, steps, say
        self.file = (run / METRICS).open("a")
        self.board = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else 0)
        self.began, self.first = time.monotonic(), step
        self.shown = 0.0

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        group = "validation" if "val_loss" in record else "training"
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(f"{group}/{name}", value, record["step"])

    def progress(self, record: dict[str, Any]) -> None:
        """The line a person watches, every two seconds at most; the first and the last step always."""
        now, step = time.monotonic(), record["step"]
        if step not in (self.first + 1, self.steps) and now - self.shown < 2:
            return
        self.shown = now
        left = (now - self.began) / (step - self.first) * (self.steps - step)
        shown = {"bits_per_byte": "bits/byte", "accuracy": "accuracy"} | {n: n for n in record if n.endswith(".loss")}
        more = "".join(f"  {title} {record[name]:.3f}" for name, title in shown.items() if name in record)
        unit = "tokens" if "tokens_per_s" in record else "rows"
        mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
        speed = f"{record[unit + '_per_s']:,.0f} {unit}/s{mfu}  ETA {int(left) // 60}:{int(left) % 60:02d}"
        self.say(
            f"step {step}/{self.steps}  loss {record['loss']:.4f}{more}  norm {record['grad_norm']:.2f}"
            f"  lr {record['lr']:.2e}  {speed}"
        )

    def evaluation(self, record: dict[str, Any]) -> None:
        self.write(record)
        titles = {name: HEADLINES.get(name, name.removeprefix("val_")) for name in record if name != "step"}
        values = "  ".join(f"{title} {record[name]:.4f}" for name, title in titles.items())
        self.say(f"step {record['step']}/{self.steps}  validation {values}")

    def close(self) -> None:
        self.file.close()
        self.board.close()
        plot(self.run)


def plot(run: Path) -> None:
    """Draws loss.png from metrics.jsonl: training and validation loss, and bits per byte, accuracy or other losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read(run)
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "val_loss" in record]
    titles = {"loss": "loss", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}
    known = {name for record in records for name in record}
    titles |= {name: name for name in sorted(known) if name.endswith(".loss") and not name.startswith("val_")}
    if "bits_per_byte" in known:
        titles["loss"] = "loss (nats per token)"
    drawn = {name: title for name, title in titles.items() if name == "loss" or name in known}
    figure = Figure(figsize=(4.5 * len(drawn), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        steps = [record["step"] for record in training]
        axes.plot(steps, [record[name] for record in training], lw=0.8, alpha=0.6, label="training")
        steps = [record["step"] for record in validation]
        axes.plot(steps, [record["val_" + name] for record in validation], "o-", ms=3, label="validation")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(run.name)
    figure.savefig(run / "loss.png", dpi=110)
