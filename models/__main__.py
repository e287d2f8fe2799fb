"""`python -m models` lists every architecture; `python -m models NAME` prints its card."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from models import registry


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models", description="The architectures, or one of them.")
    parser.add_argument("name", nargs="?", help="an architecture: prints its card")
    parser.add_argument("--family", help="list only this family of the catalogue")
    parser.add_argument("--kind", help="list only this kind: mixer, ffn, head, position, pattern or module")
    arguments = parser.parse_args()
    console = Console()
    if arguments.name:
        try:
            card = registry.card(arguments.name)
        except ValueError as error:
            sys.exit(f"error: {error}")
        for field in ("name", "kind", "family", "paper", "parameters", "options", "state", "supports"):
            console.print(f"[bold]{field:12}[/bold]{_text(card[field])}", soft_wrap=True, highlight=False)
        console.print()
        console.print(card["idea"], markup=False, highlight=False)
        return
    table = Table("name", "kind", "family", "paper", "parameters of tiny", "supports")
    names = registry.names(arguments.family, arguments.kind)
    for name in names:
        card = registry.card(name)
        table.add_row(*(_text(card[field]) for field in ("name", "kind", "family", "paper", "parameters", "supports")))
    console.print(table)
    console.print(f"{len(names)} architectures; `python -m models NAME` says more about one")


def _text(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value or "-")


if __name__ == "__main__":
    main()
