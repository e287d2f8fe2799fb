"""What speculation brings on trained models: `python -m jobs.speculation [--record FILE]`.

Trains a decoder with Medusa heads and a small one that drafts for it on a part of Python's standard library that is
small enough to be learnt well in minutes; then goes on from code of it, and from code that was held out, at 1, 8 and 32
streams with each drafter. Completions differ in length, and when one of a stream ends its next begins, as in serving.
Each drafter is timed right beside plain decoding, several times, and its tokens are compared with those of plain
decoding first. Runs stay in EDIFICE_HOME: what was interrupted goes on.
"""

import argparse
import platform
import statistics
import time
from dataclasses import dataclass, replace
from itertools import product

import torch

from jobs import table
from jobs.config import Job
from jobs.data import Data, index_of, prepare
from jobs.optim import Optim
from jobs.pretrain import pretrain, run_folder
from models.decoder import Decoder
from serve.engine import Engine
from serve.load import load
from serve.sampler import Sampling

STREAMS = (1, 8, 32)
EACH = 3  # completions of a stream in a run
WARM = 8  # runs before those that are timed, at most
SPLITS = {"train": "learnt", "val": "held out"}
COLUMNS = ("drafter", "code", "streams", "tokens/s", "over plain", "tokens per call", "accepted")


@dataclass(frozen=True)
class Row:
    """speed: tokens a second. ratio: over plain decoding timed beside it. per_call: tokens of a row in a call.

    accepted: part of the drafted tokens that held.
    """

    drafter: str
    code: str
    streams: int
    speed: float
    ratio: float
    per_call: float
    accepted: float

    def cells(self) -> list[str]:
        numbers = [f"{self.speed:,.0f}", f"{self.ratio:.2f}x", f"{self.per_call:.2f}", f"{self.accepted:.0%}"]
        return [self.drafter, self.code, str(self.streams), *numbers]


def jobs(given: argparse.Namespace) -> tuple[Job, Job]:
    """The decoder's run and that of the model that drafts for it."""
    common = {
        "data": Data(vocab=2048, limit_bytes=80_000, val_fraction=0.3),
        "steps": given.steps,
        "batch": 8,
        "length": 256,
        "workers": 0,
        "threads": given.threads,
        "precision": "bf16",
        "eval_every": 60,
        "eval_rows": 16,
        "save_every": 60,
    }
    base = Decoder.Config(vocab=2048, dim=768, layers=4, pattern=given.pattern, head="medusa(heads=4,weight=0.5)")
    small = Decoder.Config(vocab=2048, dim=128, layers=2, pattern="gqa(heads=4,kv_heads=2)")
    decay = Optim(warmup=20, schedule="linear", floor=0.0)
    return (
        Job(name=f"{given.name}-base", model=base, optim=replace(decay, lr=1.5e-3), **common),
        Job(name=f"{given.name}-draft", model=small, optim=replace(decay, lr=4e-3), **common),
    )


def measure(given: argparse.Namespace) -> list[Row]:
    """Train what is not there yet, then time each drafter beside plain decoding."""
    base, small = jobs(given)
    for job in (base, small):
        pretrain(job)
    drafters = {"n-gram": "ngram", "draft model": str(run_folder(small.name)), "medusa tree": "medusa"}
    rows = []
    for streams, split, name in product(STREAMS, SPLITS, drafters):
        rows.append(beside(base, name, drafters[name], split, streams, given))
        print(" | ".join(rows[-1].cells()), flush=True)
    return rows


def beside(base: Job, name: str, drafter: str, split: str, streams: int, given: argparse.Namespace) -> Row:
    """One drafter and plain decoding of the same model, turn by turn. RuntimeError when their tokens differ."""
    options = {"max_rows": streams, "max_len": 512, "dtype": given.dtype, "weights": given.weights}
    plain, drafting = (load(str(run_folder(base.name)), draft=draft, **options) for draft in ("off", drafter))
    prompts = beginnings(base, split, EACH * streams)
    lengths = [given.tokens // 2 + 67 * number % (given.tokens + 1) for number in range(len(prompts))]
    samplings = [Sampling(max_tokens=length, temperature=0.0, ignore_eos=True) for length in lengths]
    told = [settled(engine, prompts, samplings) for engine in (plain, drafting)]
    if told[0] != told[1] and given.dtype == "fp32":
        raise RuntimeError(f"{name} at {streams} streams: its tokens are not those of plain decoding")
    before, seconds = drafting.stats(), [[], []]
    for _ in range(given.times):
        for engine, times in zip((plain, drafting), seconds):
            began = time.perf_counter()
            engine.generate(prompts, samplings)
            times.append(time.perf_counter() - began)
    after = drafting.stats()
    drafted, accepted = (after[key] - before[key] for key in ("drafted", "accepted"))
    made = sum(lengths)
    ratio = statistics.median(a / b for a, b in zip(*seconds))
    calls = given.times * made - accepted
    speed = made / statistics.median(seconds[1])
    return Row(
        name, SPLITS[split], streams, speed, ratio, given.times * made / calls, accepted / drafted if drafted else 0.0
    )


def settled(engine: Engine, prompts: list[list[int]], samplings: list[Sampling]) -> list[list[int]]:
    """The tokens of completions, told again while calls came for the first time and were recorded for later: that is
    done once in the life of an engine, and takes longer than such a run."""
    engine.warm()
    for _ in range(WARM):
        recorded = len(engine.call.replay.tapes)
        told = [result.tokens for result in engine.generate(prompts, samplings)]
        if len(engine.call.replay.tapes) == recorded:
            break
    return told


def beginnings(job: Job, split: str, count: int, length: int = 128) -> list[list[int]]:
    """Code of the decoder's corpus to go on from."""
    index = index_of(prepare(job.data), split, length)
    rows = [index.rows(number, 1)["ids_BT"][0].tolist() for number in range(min(count, index.samples_per_epoch))]
    return [rows[number % len(rows)] for number in range(count)]


def markdown(rows: list[Row], given: argparse.Namespace) -> str:
    """The table, and what it was made with."""
    about = (
        f"Greedy, {EACH} completions of each stream, of {given.tokens // 2} to {given.tokens * 3 // 2} tokens after "
        f"128 of code, {given.dtype}, {given.weights} weights, {given.threads} thread(s) of a {platform.machine()} "
        f"CPU, torch {torch.__version__}; the median of {given.times} runs, each beside one of plain decoding.\n\n"
        f"`python -m jobs.speculation --steps {given.steps} --tokens {given.tokens}`"
    )
    return table.page("Speculation on trained models", about, COLUMNS, [row.cells() for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.speculation", description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="speculation", help="of the runs")
    parser.add_argument("--pattern", default="gqa(heads=12,kv_heads=4)", help="mixers of the decoder")
    for name, default in (("steps", 400), ("tokens", 200), ("times", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bf16", help="of the served weights")
    parser.add_argument("--weights", default="bf16", help="how linear weights are held: fp32, bf16, int8 or int4")
    table.record_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table.tell(lambda: markdown(measure(given), given), given.record)


if __name__ == "__main__":
    main()
