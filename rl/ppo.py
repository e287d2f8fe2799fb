"""PPO as RLlib has it, over any registered backbone: `python -m rl.ppo CartPole-v1 --pattern gated_deltanet`.

Each iteration prints the mean return of its episodes and the environment steps per second, learning included. With
--name the run is stored and the same command goes on from its newest checkpoint. With --compare RLlib's own default
module learns beside it, iteration by iteration with the same settings, and both speeds are printed.
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterator

from cluster import session, storage
from jobs.cli import fail

session.environment()  # before anything imports ray

import torch  # noqa: E402
from ray.rllib.algorithms.algorithm import Algorithm  # noqa: E402

from rl import checkpoint, envs  # noqa: E402
from rl.config import Run, configure, to_json  # noqa: E402

EPISODES = 20  # that a mean return is over


@dataclasses.dataclass(frozen=True)
class Command(Run):
    """A run and what is done with it.

    name:    of the stored run; none: nothing is stored. every: iterations between checkpoints.
    compare: train RLlib's default module beside it. threads: of the learner, 0: torch decides; small models want 1.
    """

    name: str = ""
    every: int = 10
    compare: bool = False
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class Progress:
    """One iteration: its number, environment steps so far and per second, mean return of the last episodes.

    RLlib's own mean is that of the few episodes, or none, which an iteration has finished; this is over iterations that
    hold at least EPISODES of them (all there are before that; nan before the first).
    """

    iteration: int
    steps: int
    episode_return: float
    steps_per_s: float


def iterate(algo: Algorithm, steps: int) -> Iterator[Progress]:
    """Trains until `steps` environment steps have been made."""
    before, ended = checkpoint.steps(algo), deque()
    while before < steps:
        began = time.perf_counter()
        result = algo.train()
        seconds, after = time.perf_counter() - began, checkpoint.steps(algo)
        count = int(result["env_runners"].get("num_episodes", 0))
        if count:
            ended.append((count, count * float(result["env_runners"]["episode_return_mean"])))
        while sum(number for number, _ in ended) - (ended[0][0] if ended else 0) >= EPISODES:
            ended.popleft()
        number = sum(number for number, _ in ended)
        mean = sum(total for _, total in ended) / number if number else math.nan
        yield Progress(algo.iteration, after, mean, (after - before) / seconds)
        before = after


def train(command: Command) -> dict[str, list[Progress]]:
    """Runs the command; returns its progress by module: "edifice", and with --compare "rllib".

    ValueError, one line, for what a user can mend.
    """
    envs.find(command.env)
    run = Run(**{field.name: getattr(command, field.name) for field in dataclasses.fields(Run)})
    parent = storage.join(storage.home(), "runs", command.name, "checkpoints") if command.name else ""
    algos = {"edifice": _algorithm(run, parent)}
    try:
        if command.compare:
            algos["rllib"] = configure(run, ours=False).build_algo()
        return _loop(algos, run, parent, command.every)
    finally:
        for algo in algos.values():
            algo.stop()


def _algorithm(run: Run, parent: str) -> Algorithm:
    newest = checkpoint.latest(parent) if parent else None
    if newest is None:
        return configure(run).build_algo()
    stored, asked = to_json(checkpoint.run_of(newest)), to_json(run)
    differ = [f"{key}: {stored[key]} was, {asked[key]} is" for key in asked if stored[key] != asked[key]]
    if [line for line in differ if not line.startswith("steps:")]:
        raise ValueError(f"the run at {parent} has other settings ({'; '.join(differ)}); give those, or another --name")
    return checkpoint.load(newest, run)


def _loop(algos: dict[str, Algorithm], run: Run, parent: str, every: int) -> dict[str, list[Progress]]:
    seen: dict[str, list[Progress]] = {name: [] for name in algos}
    turns = {name: iterate(algo, run.steps) for name, algo in algos.items()}
    while turns:
        for name in list(turns):
            one = next(turns[name], None)
            if one is None:
                del turns[name]
                continue
            seen[name].append(one)
            label = f"{name:8}" if len(algos) > 1 else ""
            print(
                f"{label}step {one.steps}/{run.steps}  return {one.episode_return:.1f}  {one.steps_per_s:,.0f} steps/s",
                flush=True,
            )
            if parent and name == "edifice" and (one.iteration % every == 0 or one.steps >= run.steps):
                checkpoint.save(algos[name], run, parent)
    return seen


def speed(progress: list[Progress]) -> float:
    """Median steps per second, without the first iteration where there are more: it warms up."""
    rates = sorted(one.steps_per_s for one in progress[1:] or progress)
    return rates[len(rates) // 2]


def parse(arguments: list[str]) -> Command:
    """The command line; exits with one line on a mistake, with help on --help."""
    import tyro

    fields = [f.name for kind in (Command, type(Command.model)) for f in dataclasses.fields(kind)]
    known = [name for name in fields if name not in ("env", "model")] + ["no_anneal", "no_compare", "help"]
    for argument in arguments:
        word = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and word not in known:
            near = difflib.get_close_matches(word, known, 2, 0.6)
            hint = (
                f"did you mean {' or '.join('--' + name for name in near)}?" if near else f"known: {', '.join(known)}"
            )
            fail(f"unknown option --{word}; {hint}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Command, prog="python -m rl.ppo", args=arguments, use_underscores=True)
    except ValueError as error:
        fail(error)
    except SystemExit as end:
        if not end.code:
            raise  # --help was printed
    body = re.split("For full helptext|Argument helptext", said.getvalue())[0].partition("\n")[2]
    fail(re.sub("[\u2500-\u257f]", " ", body) + " (see python -m rl.ppo --help)")


def main(arguments: list[str]) -> None:
    command = parse(arguments)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if command.threads:
        torch.set_num_threads(command.threads)
    try:
        session.connect(cpus=command.runners * (2 if command.compare else 1) + 1)
        seen = train(command)
    except ValueError as error:
        fail(error)
    except RuntimeError as error:
        fail(error, code=1)
    for name, progress in seen.items():
        if progress:
            print(f"{name}: {speed(progress):,.0f} steps/s, return {progress[-1].episode_return:.1f}", flush=True)
    if command.compare and all(seen.values()):
        print(f"edifice / rllib: {speed(seen['edifice']) / speed(seen['rllib']):.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
