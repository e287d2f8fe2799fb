"""Supervised finetuning: `python -m jobs.finetune RECIPE --from RUN_OR_MODEL --data.path chat.jsonl [...]`.

Architecture, tokenizer and first weights come from a run or a model folder, everything else from the recipe. The
corpus is conversations (`jobs.data.chat`), of which only the assistant's words are learnt. It is a job like any other:
the same loop, engines, checkpoints and resume, and the run that comes out of it is served, evaluated and finetuned.

`--head medusa(heads=3)` gives a decoder a head that guesses further than the next token, and trains that alone: the
frozen rest answers as before, and serving drafts with the head. Its corpus is that of the run it comes from, or what
`--data.source` says: text as in pretraining, or `chat`.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from cluster import storage
from jobs import cli, given
from jobs.config import Job, check, from_json
from jobs.data import Arrays, Chats, Data, index_of, prepare
from jobs.pretrain import finish, run_folder
from models.decoder import Decoder

PROGRAM = "jobs.finetune"
USAGE = (
    f"usage: python -m {PROGRAM} RECIPE --from RUN_OR_MODEL (--data.path CHAT.jsonl | --head HEAD) [--option value ...]"
)
FIXED = ("model", "start", "data.tokenizer", "data.source", "frozen")  # options that --from and --head decide


def parse(arguments: list[str]) -> Job:
    """The job of a command line. ValueError, one line, for a mistake."""
    if arguments[0].startswith("-"):
        raise ValueError(f"the first word has to be a recipe; {USAGE}")
    rest, source = _taken(arguments[1:], "--from", "a run, its name, a model folder or a Hugging Face checkpoint")
    rest, head = _taken(rest, "--head", "a head, as medusa(heads=3)")
    rest, corpus = _taken(rest, "--data.source", "stdlib, text, jsonl, parquet or chat") if head else (rest, "")
    for argument in rest:
        word = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and (word in FIXED or word.startswith("model.")):
            raise ValueError(f"--{word}: comes with --from, finetuning does not change it; leave it out")
    recipe = cli.load(arguments[0])
    job = replace(recipe, name=f"{recipe.name}-chat", data=Chats())
    if head:
        data = {"": recipe.data, "chat": Chats()}.get(corpus) or Data(source=corpus)
        job = replace(recipe, name=f"{recipe.name}-{head.partition('(')[0]}", data=data)
    program = f"python -m {PROGRAM} {arguments[0]}"
    if not source and not {"-h", "--help"} & set(rest):
        raise ValueError(f"--from is missing: which weights to start from; {USAGE}")
    if source:
        name = cli.override(job, program, rest).name
        job = _start(job, source, run_folder(name) / "config.json", head, own_corpus=bool(head) and not corpus)
    job = cli.override(job, program, rest)
    if not job.data.path and isinstance(job.data, Chats):
        raise ValueError(f"data.path is empty: which conversations to learn; {USAGE}")
    return job


def _taken(arguments: list[str], option: str, what: str) -> tuple[list[str], str]:
    """(the other arguments, what `option` says)."""
    rest, value, words = [], "", iter(arguments)
    for word in words:
        if word == option or word.startswith(f"{option}="):
            value = word.partition("=")[2] or next(words, "")
            if not value or value.startswith("--"):
                raise ValueError(f"{option}: needs {what}")
        else:
            rest.append(word)
    return rest, value


def with_head(job: Job, source: str, head: str) -> Job:
    """`job` as one that trains `head` on the frozen weights of the run or model `source`, on the job's own corpus."""
    return _start(job, source, run_folder(job.name) / "config.json", head)


def _start(job: Job, source: str, stored: Path, head: str = "", own_corpus: bool = False) -> Job:
    """`job` with the architecture, tokenizer and weights of `source`; head: another one. own_corpus: its corpus, too.

    A run that has begun goes on with those it began with, though `source` may have newer ones by now, or be gone.
    """
    if stored.exists():
        before = from_json(json.loads(stored.read_text()))
        if before.start and _within(before.start, source):
            data = replace(before.data if own_corpus else job.data, tokenizer=before.data.tokenizer)
            model = replace(before.model, head=head) if head else before.model
            return replace(job, model=model, start=before.start, data=data, frozen=before.frozen)
    found = given.find(source)
    if found.tokenizer is None:
        raise ValueError(f"{found.place}: has no tokenizer.json, which a corpus of text needs")
    data = from_json(found.job).data if own_corpus and found.job else job.data
    if isinstance(data, Arrays):
        raise ValueError(f"{found.place}: learnt from rows of {data.source}, and a head needs text; set --data.source")
    data = replace(data, tokenizer=given.keep_tokenizer(found.tokenizer))
    place = found.place if storage.is_uri(found.place) else storage.join(*storage.split(found.place))
    model = given.config(found)
    if head and not isinstance(model, Decoder.Config):
        raise ValueError(f"{found.place}: is no decoder, and --head is for those")
    model = replace(model, head=head) if head else model
    return replace(job, model=model, start=place, data=data, frozen=bool(head))


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
        prepared = prepare(job.data)
        cut = index_of(prepared, "train", job.length).cut if isinstance(job.data, Chats) else 0
    except (ValueError, OSError) as error:
        cli.fail(error)
    if cut:
        print(f"{cut} conversations are longer than a row of {job.length} tokens and lose their end; raise --length")
    finish(job)


if __name__ == "__main__":
    main(sys.argv[1:])
