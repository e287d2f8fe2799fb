"""python -m jobs.data: prepares a corpus (or finds it prepared) and prints what is in it."""

import sys

import tyro

from cluster import folder
from jobs.data import Data, prepare


def main() -> None:
    data = tyro.cli(Data, prog="python -m jobs.data", description=__doc__)
    try:
        prepared = prepare(data)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"folder     {prepared.folder}")
    print(f"tokenizer  {prepared.tokenizer}, {prepared.vocab} entries")
    for split, has in folder.load(prepared.folder).meta["splits"].items():
        rate = has["bytes"] / (has["tokens"] - 2 * has["documents"])
        print(
            f"{split:<10} {has['documents']:,} documents, {has['tokens']:,} tokens, "
            f"{has['bytes'] / 1e6:,.1f} MB, {rate:.2f} bytes per token"
        )


if __name__ == "__main__":
    main()
