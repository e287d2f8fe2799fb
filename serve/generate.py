"""One completion on the command line: python -m serve.generate RUN --prompt "def " [--max-tokens 64] [--seed 1]"""

import argparse
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.generate", description=__doc__)
    parser.add_argument("model", help="a run, its name, or a model folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int)
    given = parser.parse_args()
    from cluster import storage
    from serve.load import load
    from serve.request import Request
    from serve.sampler import Sampling

    run = storage.join(storage.home(), "runs", given.model)
    try:
        engine = load(given.model if os.path.exists(given.model) or "/" in given.model else run, max_rows=1)
        sampling = Sampling(max_tokens=given.max_tokens, temperature=given.temperature, seed=given.seed)
        engine.submit(Request(engine.prompts.encode(given.prompt), sampling))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(given.prompt, end="", flush=True)
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
