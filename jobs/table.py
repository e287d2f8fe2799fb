"""A measurement's table as Markdown: made, printed, and kept where --record says."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jobs import cli


def page(title: str, about: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table under its title and what it was made with."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"# {title}", "", about, "", *lines, ""])


def record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=Path, help="write the table to this file as well")


def tell(make: Callable[[], str], record: Path | None) -> None:
    """Prints and keeps what `make` returns. A user's mistake, a ValueError, is one line, told before any work."""
    try:
        if record and not record.parent.is_dir():
            raise ValueError(f"--record {record}: there is no folder {record.parent}")
        table = make()
    except ValueError as error:
        cli.fail(error)
    print(table)
    if record:
        record.write_text(table)
