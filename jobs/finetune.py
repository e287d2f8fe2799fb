"""Supervised finetuning: `python -m jobs.finetune RECIPE --from RUN_OR_MODEL --data.path chat.jsonl [...]`.

Architecture, tokenizer and first weights come from a run or a model folder, everything else from the recipe. The
corpus is conversations (`jobs.data.chat`), of which only the assistant's words are learnt. It is a job like any other:
the same loop, engines, checkpoints and resume, and the run that comes out of it is served, evaluated and finetuned.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from cluster import storage
from jobs import cli, given
from jobs.config import Job, check, from_json
from jobs.data import Chats, index_of, prepare
from jobs.pretrain import finish, run_folder

PROGRAM = "jobs.finetune"
USAGE = f"usage: python -m {PROGRAM} RECIPE --from RUN_OR_MODEL --data.path CHAT.jsonl [--option value ...]"
FIXED = ("model", "start", "data.tokenizer", "data.source")  # options that --from decides


def parse(arguments: list[str]) -> Job:
    """The job of a command line. ValueError, one line, for a mistake."""
    if arguments[0].startswith("-"):
        raise ValueError(f"the first word has to be a recipe; {USAGE}")
    rest, source = _take_from(arguments[1:])
    for argument in rest:
        word = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and (word in FIXED or word.startswith("model.")):
            raise ValueError(f"--{word}: comes with --from, finetuning does not change it; leave it out")
    recipe = cli.load(arguments[0])
    job = replace(recipe, name=f"{recipe.name}-chat", data=Chats())
    program = f"python -m {PROGRAM} {arguments[0]}"
    if not source and not {"-h", "--help"} & set(rest):
        raise ValueError(f"--from is missing: which weights to start from; {USAGE}")
    if source:
        name = cli.override(job, program, rest).name
        job = _start(job, source, run_folder(name) / "config.json")
    job = cli.override(job, program, rest)
    if not job.data.path:
        raise ValueError(f"data.path is empty: which conversations to learn; {USAGE}")
    return job


def _take_from(arguments: list[str]) -> tuple[list[str], str]:
    """(the other arguments, what --from says)."""
    rest, source, words = [], "", iter(arguments)
    for word in words:
        if word == "--from" or word.startswith("--from="):
            source = word.partition("=")[2] or next(words, "")
            if not source or source.startswith("--"):
                raise ValueError("--from: needs a run, its name, a model folder or a Hugging Face checkpoint")
        else:
            rest.append(word)
    return rest, source


def _start(job: Job, source: str, stored: Path) -> Job:
    """`job` with the architecture, tokenizer and weights of `source`.

    A run that has begun goes on with those it began with, though `source` may have newer ones by now, or be gone.
    """
    if stored.exists():
        before = from_json(json.loads(stored.read_text()))
        if before.start and _within(before.start, source):
            data = replace(job.data, tokenizer=before.data.tokenizer)
            return replace(job, model=before.model, start=before.start, data=data)
    found = given.find(source)
    if found.tokenizer is None:
        raise ValueError(f"{found.place}: has no tokenizer.json, which conversations need")
    data = replace(job.data, tokenizer=given.keep_tokenizer(found.tokenizer))
    place = found.place if storage.is_uri(found.place) else storage.join(*storage.split(found.place))
    return replace(job, model=given.config(found), start=place, data=data)


def _within(place: str, source: str) -> bool:
    """Whether `place` is the folder `source`, one of its checkpoints, or a checkpoint of the run called so."""
    runs = [source] if "/" in source or Path(source).exists() else [storage.join(storage.home(), "runs", source)]
    homes = [run if storage.is_uri(run) else storage.join(*storage.split(run)) for run in runs]
    return any(place == home or place.startswith(f"{home.rstrip('/')}/checkpoints/") for home in homes)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nrecipes: {', '.join(cli.recipes())}; options: python -m {PROGRAM} RECIPE --help")
        raise SystemExit(0 if arguments else 2)
    try:
        job = parse(arguments)
        check(job)
        cut = index_of(prepare(job.data), "train", job.length).cut
    except (ValueError, OSError) as error:
        cli.fail(error)
    if cut:
        print(f"{cut} conversations are longer than a row of {job.length} tokens and lose their end; raise --length")
    finish(job)


if __name__ == "__main__":
    main(sys.argv[1:])
