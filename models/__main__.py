"""`python -m models` lists every architecture; `python -m models NAME` prints its card; --json is for programs."""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from models import registry

WIDTH = 100  # of the list where there is no terminal to ask


def main(words: list[str] | None = None) -> None:
    """words: of the command line, None for this process's."""
    parser = argparse.ArgumentParser(prog="python -m models", description="The architectures, or one of them.")
    parser.add_argument("name", nargs="?", help="an architecture: prints its card")
    parser.add_argument("--family", help="list only this family of the catalogue")
    parser.add_argument("--kind", help="list only this kind, as mixer, ffn or module")
    parser.add_argument("--json", action="store_true", help="print cards as JSON")
    arguments = parser.parse_args(words)
    try:
        if arguments.name and (arguments.family or arguments.kind):
            raise ValueError(f"{arguments.name} is one architecture; --family and --kind are for the list")
        names = [arguments.name] if arguments.name else _chosen(arguments.family, arguments.kind)
        cards = [registry.card(name) for name in names]
    except ValueError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps(cards[0] if arguments.name else cards, indent=1))
    elif arguments.name:
        _print_card(cards[0])
    else:
        _print_list(cards)


def _chosen(family: str | None, kind: str | None) -> list[str]:
    """Names to list. ValueError, with what there is, where a family or kind has none."""
    known = registry.names()
    kinds = sorted({registry.kind_of(name) for name in known})
    if kind is not None and kind not in kinds:
        raise ValueError(f"--kind {kind}: there are {', '.join(kinds)}")
    if family is not None and not registry.names(family):
        families = sorted({registry.lookup(name).family for name in known})
        raise ValueError(f"--family {family}: there are {', '.join(families)}")
    return registry.names(family, kind)


def _print_list(cards: list[dict]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    for column in ("kind", "family", "paper"):
        table.add_column(column, no_wrap=True)
    table.add_column("tiny", justify="right", no_wrap=True)
    table.add_column("supports", no_wrap=True)
    for card in cards:
        row = (card["name"], card["kind"], card["family"], card["paper"], card["parameters"])
        table.add_row(*map(_text, row), " ".join(card["supports"]))
    console.print(table, highlight=False)
    print(f"\n{len(cards)} architectures; tiny: parameters of the smallest useful one; paper: arXiv")
    print("`python -m models NAME` says more; --family, --kind choose; --json is for programs")


def _print_card(card: dict) -> None:
    console = Console()
    for field in ("name", "kind", "family", "paper", "parameters", "options", "state", "supports"):
        value = f"https://arxiv.org/abs/{card[field]}" if field == "paper" and card[field] else _text(card[field])
        console.print(f"[bold]{field:12}[/bold]", end="")
        console.print(value, soft_wrap=True, highlight=False, markup=False)
    console.print()
    console.print(card["idea"], markup=False, highlight=False, soft_wrap=True)


def _text(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value or "-")


if __name__ == "__main__":
    main()
