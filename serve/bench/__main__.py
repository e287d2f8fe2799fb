"""How fast serving is: ours, vLLM, transformers and llama.cpp on one checkpoint, in one run, one process at a time.

`python -m serve.bench` makes a Llama of about 79 M random weights, checks that ours and transformers say the same in
fp32, and then decodes with each engine that is installed, in bf16, int8 and int4, and with ours over HTTP. What the
machine allows is measured in the same run; a figure is told with its share of that.

llama.cpp may be in a Python of its own: python3 -m venv P && P/bin/pip install llama-cpp-python numpy, which compiles
for ten minutes, and then --llama-python P/bin/python.
"""

import argparse
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from serve.bench import checkpoint, gguf_file
from serve.bench.arrivals import Rounds
from serve.bench.limits import Limits
from serve.bench.processes import Crashed, DidNotRun, Found, Processes
from serve.bench.server import KINDS
from serve.bench.table import Row, Table

FORMS = ("bf16", "int8", "int4")
TAKES = {"edifice": FORMS, "vllm": ("bf16",), "transformers": ("bf16",), "llama_cpp": FORMS}
PARTS = ("edifice", *KINDS, "vllm", "transformers", "llama_cpp")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serve.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {' '.join(PARTS)}")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of the weights; HTTP has bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="requests at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each")
    parser.add_argument("--tokens", type=int, default=96, help="that each generates")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement; the median counts")
    parser.add_argument("--warm", type=float, default=6.0, help="seconds that a server warms up, each time")
    parser.add_argument("--small", action="store_true", help="a tiny checkpoint, to see that everything runs")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH", help="a Python with llama-cpp-python")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the table there, as Markdown")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {' '.join(sorted(unknown))}; there are {' '.join(PARTS)}")
    if args.small:
        args.tokens, args.rounds, args.warm = min(args.tokens, 24), min(args.rounds, 2), min(args.warm, 1.0)
    with tempfile.TemporaryDirectory(prefix="edifice-bench-") as place:
        return Run(args, Path(place)).all()


class Run:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.begin = time.monotonic()
        self.parts = [part for part in PARTS if part in (args.parts or PARTS)]
        self.processes = Processes(args, folder)

    def all(self) -> int:
        args = self.args
        self._say("writing the checkpoint")
        parameters = checkpoint.write(self.folder, checkpoint.SMALL if args.small else checkpoint.SHAPE)
        self._say("comparing fp32 tokens with those of transformers")
        if not self._same():
            print("ours and transformers do not say the same: nothing is measured", file=sys.stderr)
            return 1
        limits = Limits.measure(args.threads)
        self.table = Table(limits, parameters)
        for line in self._head(limits, parameters):
            self.table.tell(line)
        for part in self.parts:
            for form in TAKES.get(part, ("bf16",)):
                if form in args.forms:
                    self._measure(part, form)
        self.table.close()
        if args.record:
            args.record.parent.mkdir(parents=True, exist_ok=True)
            args.record.write_text("\n".join(self.table.lines) + "\n")
        self._say("done")
        return 0

    def _same(self) -> bool:
        rows = [1, 3]
        ours, theirs = (self.processes.engine(name, "fp32", rows, 16, 0) for name in ("edifice", "transformers"))
        return all(ours[n]["tokens"] == theirs[n]["tokens"] for n in rows)

    def _head(self, limits: Limits, parameters: int) -> list[str]:
        args = self.args
        return [
            f"A Llama of {parameters / 1e6:.1f} M random weights, {args.threads} threads; {args.prompt} tokens of "
            f"prompt and {args.tokens} of completion; medians of {args.rounds} rounds, each with new prompts; "
            f"{_versions()}.",
            "",
            f"Measured in this run: reads {limits.read / 1e9:.0f} GB/s, bf16 products {limits.product / 1e9:.0f} "
            "GFLOP/s. The limit reads all weights once a step and multiplies every row with them. Greedy tokens of "
            "ours in fp32 equal those of transformers.",
        ]

    def _measure(self, part: str, form: str) -> None:
        self._say(f"{part} {form}")
        args = self.args
        try:
            if part in KINDS:
                found = self.processes.server(part)
            elif part == "llama_cpp":
                found = self._llama(form)
            else:
                simple = args.small and part == "vllm"  # compiling takes a minute
                found = self.processes.engine(part, form, args.rows, args.tokens, args.rounds, simple)
        except (DidNotRun, ImportError) as error:
            self.table.note(f"{part} {form} did not run: {error}.")
            return
        for rows, one in found.items():
            self.table.add(Row(part, form, rows, Rounds.of(one["rounds"])))

    def _llama(self, form: str) -> Found:
        gguf_file.write(self.folder / "hf", self.folder / f"{form}.gguf", form)
        args = self.args
        try:
            return self.processes.engine("llama_cpp", form, args.rows, args.tokens, args.rounds)
        except Crashed as error:  # some builds do, with AMX
            found = self.processes.engine("llama_cpp", form, args.rows, args.tokens, args.rounds, simple=True)
            self.table.note(f"llama_cpp {form} repacks no weights here: when it does, {error}.")
            return found

    def _say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.begin:4.0f} s] {what}", file=sys.stderr, flush=True)


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "ray"))


if __name__ == "__main__":
    sys.exit(main())
