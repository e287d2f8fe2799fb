"""Sequence architectures side by side on one small budget: `python -m jobs.compare [NAME ...] [--record FILE]`.

Each is trained as `tiny:NAME` on the same tokens in the same order, then decodes through the serving engine. One line
for each: parameters, bits per byte of held-out text, tokens a second of training and of decoding, bytes of decode state
at 1,024 and 32,768 tokens. Without names, all there are. Runs stay in EDIFICE_HOME: what was interrupted goes on.
"""

import argparse
import dataclasses
import io
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import redirect_stdout

import torch

import models
from jobs import cli, table
from jobs.config import Job
from jobs.data import Data
from jobs.pretrain import pretrain, run_folder
from jobs.record import read
from models import hub, registry
from models.decoder import Decoder
from models.state import bytes_per_row
from serve.engine import Engine
from serve.sampler import Sampling

LENGTHS = (1024, 32768)
COLUMNS = (
    "architecture",
    "family",
    "parameters",
    "bits/byte",
    "train tok/s",
    "decode tok/s",
    *(f"bytes at {n:,}" for n in LENGTHS),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture; bits per byte of held-out text, tokens per second, bytes of state at LENGTHS."""

    name: str
    family: str
    parameters: int
    bits: float
    training: float
    decoding: float
    state: tuple[int, ...]

    def cells(self) -> list[str]:
        """As the table's columns."""
        numbers = [f"{self.parameters:,}", f"{self.bits:.3f}", f"{self.training:,.0f}", f"{self.decoding:,.0f}"]
        return [self.name, self.family, *numbers, *(f"{size:,}" for size in self.state)]


def names() -> list[str]:
    """Every mixer and pattern that is a language model."""
    found = models.names(kind="mixer") + models.names(kind="pattern")
    return [name for name in found if _serves(name)]


def _serves(name: str) -> bool:
    return "serve" in registry.supports(models.build(name))


def job_of(name: str, given: argparse.Namespace) -> Job:
    """The run that trains it."""
    job = cli.load(f"tiny:{name}")
    sizes = {"dim": given.dim, "layers": given.layers}
    return dataclasses.replace(
        job,
        name=f"compare-{name}-{given.dim}x{given.layers}-{given.steps}x{given.batch}x{given.length}-{given.lr:g}",
        model=dataclasses.replace(job.model, **sizes),
        data=Data(vocab=job.model.vocab, limit_bytes=4_000_000),
        optim=dataclasses.replace(job.optim, lr=given.lr, warmup=given.steps // 10),
        steps=given.steps,
        batch=given.batch,
        length=given.length,
        workers=0,
        threads=given.threads,
        eval_every=0,
        eval_rows=32,
        save_every=0,
    )


def measure(name: str, given: argparse.Namespace) -> Row:
    """Train one and measure it. ValueError, one line, as in `pretrain`."""
    job = job_of(name, given)
    with redirect_stdout(io.StringIO()):  # its own progress would bury the table
        pretrain(job)
    records = read(run_folder(job.name))
    speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    bits = next(record["val_bits_per_byte"] for record in reversed(records) if "val_bits_per_byte" in record)
    model = hub.load(str(run_folder(job.name)))
    sizes = tuple(bytes_per_row(model.state_spec(length), length) for length in LENGTHS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Row(name, models.card(name)["family"], parameters, bits, statistics.median(speeds), decoding(model), sizes)


def decoding(model: Decoder, tokens: int = 48, times: int = 3) -> float:
    """Tokens per second of one greedy stream through the engine after a prompt of 16, the median of several."""
    engine = Engine(model, max_rows=1, max_len=128)
    speeds = []
    for _ in range(times + 1):  # the first warms up
        began = time.perf_counter()
        engine.generate([list(range(16))], [Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)])
        speeds.append(tokens / (time.perf_counter() - began))
    return statistics.median(speeds[1:])


def rows(given: argparse.Namespace) -> Iterator[Row]:
    """One after the other, with a line of progress for each."""
    chosen = given.names or names()
    for number, name in enumerate(chosen, 1):
        began = time.perf_counter()
        row = measure(name, given)
        seconds = time.perf_counter() - began
        print(f"[{number}/{len(chosen)}] {name}: {row.bits:.3f} bits/byte, {seconds:.0f} s", flush=True)
        yield row


def markdown(found: list[Row], given: argparse.Namespace) -> str:
    """The table, best first, and what it was made with."""
    tokens = given.steps * given.batch * given.length
    about = (
        f"{given.layers} layers of width {given.dim}, {tokens:,} tokens of Python's standard library "
        f"({given.steps} steps of {given.batch} x {given.length}), fp32, {given.threads} thread(s) of a "
        f"{platform.machine()} CPU, torch {torch.__version__}.\n\n"
        f"`python -m jobs.compare --dim {given.dim} --layers {given.layers} --steps {given.steps}`"
    )
    cells = [row.cells() for row in sorted(found, key=lambda row: row.bits)]
    return table.page("Sequence architectures on one budget", about, COLUMNS, cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.compare", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", help="architectures; none: all mixers and patterns that are language models"
    )
    for name, default in (("dim", 64), ("layers", 4), ("steps", 100), ("batch", 8), ("length", 256), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of all of them")
    table.record_option(parser)
    given = parser.parse_args()

    def compared() -> str:
        unknown = set(given.names) - set(models.names())
        if unknown:
            raise ValueError(f"no architecture is called {sorted(unknown)[0]!r}; `python -m models` lists them")
        for name in given.names:
            if not _serves(name):
                raise ValueError(f"{name} does not go on from a prompt, as all that is compared here does")
        return markdown(list(rows(given)), given)

    table.tell(compared, given.record)


if __name__ == "__main__":
    main()
