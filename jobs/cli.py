"""Command lines: a recipe's name, then overrides of its job. A mistake is one line and exit code 2.

tyro reads the options and writes the help; what it says about a mistake is a box of several lines, so the mistakes
people make (a misspelt option, a value of the wrong type) are told here.
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jobs.config import Job

RECIPES = Path(__file__).parent / "recipes"


def fail(message: object, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def recipes() -> list[str]:
    """Names of the recipes: the stems of jobs/recipes/*.py."""
    return sorted(path.stem for path in RECIPES.glob("[a-z]*.py"))


def load(name: str) -> Job:
    """The job a recipe returns; `RECIPE:ARCHITECTURE` asks it for another architecture than its own.

    ValueError lists the recipes there are, or says that this one has an architecture of its own.
    """
    recipe, colon, architecture = name.partition(":")
    if recipe not in recipes():
        raise ValueError(f"there is no recipe {recipe!r}; recipes: {', '.join(recipes())}")
    make = importlib.import_module(f"jobs.recipes.{recipe}").recipe
    if colon and not inspect.signature(make).parameters:
        raise ValueError(f"recipe {recipe} has its own architecture; tiny:{architecture} takes any of a sequence")
    return make(architecture) if colon else make()


def options(config: Any, prefix: str = "") -> list[str]:
    """Every option of a config, as written on a command line: steps, model.dim, model.no_tied."""
    found = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found += options(value, f"{prefix}{f.name}.")
        else:
            found += [f"{prefix}{f.name}"] + ([f"{prefix}no_{f.name}"] if isinstance(value, bool) else [])
    return found


def parse(program: str, arguments: list[str]) -> Job:
    """The job of `RECIPE --option value ...`; exits with one line on a mistake, with help on --help."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m {program} RECIPE [--option value ...]\n\nrecipes: {', '.join(recipes())}")
        print("tiny:NAME is the recipe `tiny` of an architecture; `python -m models` lists them")
        print(f"options of a recipe, with their defaults: python -m {program} RECIPE --help")
        raise SystemExit(0 if arguments else 2)
    try:
        job = load(arguments[0])
        return override(job, f"python -m {program} {arguments[0]}", arguments[1:])
    except ValueError as error:
        fail(error)


def override(job: Any, program: str, arguments: list[str]) -> Any:
    """A job, or another config, with options replaced. ValueError, one line, for an unknown option or a wrong value."""
    import tyro

    kind = Job[type(job.model), type(job.data)] if isinstance(job, Job) else type(job)
    known = options(job)
    for argument in arguments:
        word = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and word not in known and word != "help":
            near = difflib.get_close_matches(word, known, 2, 0.6)
            hint = f"did you mean {' or '.join('--' + name for name in near)}? " if near else ""
            raise ValueError(f"unknown option --{word}; {hint}options: {', '.join('--' + name for name in known)}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, default=job, prog=program, args=arguments, use_underscores=True)
    except SystemExit as end:
        if not end.code:
            raise  # --help was printed
    body = re.split("For full helptext|Argument helptext", said.getvalue())[0]
    words = " ".join(re.sub("[\u2500-\u257f]", " ", body.partition("\n")[2]).split())
    raise ValueError(f"{words} (see {program} --help)")
