"""A run as one page: `python -m jobs.report RUN` writes report.html, which needs no other file and no network.

It has the curves (loss, gradient norm, throughput and whatever else was measured), what the model writes now, the job,
and the machine. Pretraining writes it too when a run is finished; the text is left out there when the model is large.
"""

import argparse
import json
import os
import platform
import sys
import time
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cluster import folder, storage
from jobs import checkpoint, cli
from jobs.chart import chart
from jobs.record import read

FILE = "report.html"
LARGE = 200_000_000  # bytes of weights above which a finished job does not generate text
PROMPT, WRITTEN = 24, 64  # tokens
_PLACE = ("step", "tokens", "seconds", "lr", "items")  # fields of a record that say where it stands, not how it goes
_TITLES = {
    "loss": "loss (nats)",
    "bits_per_byte": "bits per byte",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "mfu": "model FLOPs utilisation",
    "lr": "learning rate",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --faint: #667085; --paper: #fff; --card: #f6f7f9; --grid: #dfe3e8;
  --line-0: #2563eb; --line-1: #ea7317; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --faint: #9aa3b2; --paper: #14171c; --card: #1d2128;
  --grid: #343a44; --line-0: #6ea0ff; --line-1: #ffa45c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin: 0 } h2 { margin: 2rem 0 .6rem; font-size: 1.1rem } .faint { color: var(--faint) }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0 } .facts div { background: var(--card);
  border-radius: .5rem; padding: .5rem .9rem } .facts b { display: block; font-size: 1.15rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .6rem }
figcaption { font-weight: 600; font-size: .9rem } svg { width: 100%; height: auto }
svg text { fill: var(--faint); font-size: 11px } .grid { stroke: var(--grid) }
polyline { fill: none; stroke-width: 1.5 } .line-0 { stroke: var(--line-0) } .line-1 { stroke: var(--line-1) }
.dot-0 { fill: var(--line-0) } .dot-1 { fill: var(--line-1) }
.key { font-weight: 400; margin-left: .6rem } .key::before { content: ""; display: inline-block; width: .8em;
  height: .25em; margin-right: .3em; vertical-align: middle } .key-0::before { background: var(--line-0) }
.key-1::before { background: var(--line-1) }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere } mark { background: none; color: var(--faint) }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; vertical-align: top } td:first-child {
  color: var(--faint) }
"""


def write(run: Path, samples: int = 3) -> Path:
    """Writes report.html of a run and returns its path. samples: texts the model writes. ValueError: it is no run."""
    stored = run / "config.json"
    if not stored.exists():
        raise ValueError(f"{run}: there is no run, for it has no config.json; give the folder or the name of a run")
    records, job = read(run), json.loads(stored.read_text())
    place = checkpoint.latest(run)
    texts = _samples(place, job, samples) if place and samples else []
    part = run / (FILE + ".part")
    part.write_text(page(run.name, job, records, texts, _environment(place)))
    part.replace(run / FILE)
    return run / FILE


def after(run: Path) -> None:
    """What a finished job does: the page, as far as it is cheap. What goes wrong is said, and the job stays fine."""
    try:
        place = checkpoint.latest(run)
        weights = storage.info(storage.join(place, "model.safetensors")) if place else None
        write(run, samples=3 if weights and weights.size <= LARGE else 0)
    except Exception as error:  # a page is not worth a run
        print(f"no {FILE}: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def page(
    name: str,
    job: dict[str, Any],
    records: list[dict[str, Any]],
    samples: list[tuple[str, str]],
    environment: dict[str, str],
) -> str:
    """The page as text. records: of metrics.jsonl; samples: (prompt, what the model wrote)."""
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "val_loss" in record]
    facts = "".join(
        f"<div><span class=faint>{escape(key)}</span><b>{escape(value)}</b></div>"
        for key, value in _facts(job, training, validation).items()
    )
    texts = "".join(f"<pre><mark>{escape(prompt)}</mark>{escape(text)}</pre>" for prompt, text in samples)
    said = f"<h2>What it writes</h2><p class=faint>The grey part was given.</p>{texts}" if texts else ""
    rows = "".join(f"<tr><td>{escape(key)}<td>{escape(value)}" for key, value in environment.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body><h1>{escape(name)}</h1>"
        f"<p class=faint>{escape(job['model']['model'])}, written {time.strftime('%Y-%m-%d %H:%M')}</p>"
        f"<div class=facts>{facts}</div><h2>Curves</h2><div class=charts>{_charts(training, validation)}</div>{said}"
        f"<h2>Job</h2><pre>{escape(json.dumps(job, indent=1))}</pre><h2>Environment</h2><table>{rows}</table>"
        "</body></html>\n"
    )


def _facts(job: dict[str, Any], training: list[dict], validation: list[dict]) -> dict[str, str]:
    facts = {"steps": f"{training[-1]['step'] if training else 0} / {job['steps']}"}
    if training and "tokens" in training[-1]:
        facts["tokens"] = f"{training[-1]['tokens']:,}"
    for name in ("bits_per_byte", "loss"):
        values = [record[f"val_{name}"] for record in validation if f"val_{name}" in record]
        if values:
            facts[f"validation {_TITLES[name]}"] = f"{values[0]:.3f} \u2192 {values[-1]:.3f}"
    speeds = sorted(record["tokens_per_s"] for record in training if "tokens_per_s" in record)
    if speeds:
        facts["tokens/s (median)"] = f"{speeds[len(speeds) // 2]:,.0f}"
    seconds = sum(record.get("seconds", 0.0) for record in training)
    return facts | {"training": f"{int(seconds) // 60} min {int(seconds) % 60} s"}


def _charts(training: list[dict], validation: list[dict]) -> str:
    """A chart for each thing measured, validation in that of its training measure."""
    names = [name for record in training[-1:] for name in record if name not in _PLACE]
    names += [n[4:] for record in validation[-1:] for n in record if n.startswith("val_") and n[4:] not in names]
    drawn = [name for name in _TITLES if name in names or name == "lr"]
    drawn += [name for name in names if name not in drawn]
    made = []
    for name in drawn:
        curves = {
            "training": [(r["step"], r[name]) for r in training if name in r],
            "validation": [(r["step"], r[f"val_{name}"]) for r in validation if f"val_{name}" in r],
        }
        made.append(chart(_TITLES.get(name, name), curves, log=name == "grad_norm"))
    return "".join(made)


def _samples(place: str, job: dict[str, Any], count: int) -> list[tuple[str, str]]:
    """(prompt, what the model writes after it) for beginnings of held-out text; none when it is no language model."""
    from serve.load import load
    from serve.sampler import Sampling

    if "tokenizer.json" not in folder.load(place):
        return []
    prompts = _prompts(job, count)
    try:
        engine = load(place, max_rows=len(prompts), max_len=max(map(len, prompts)) + WRITTEN)
    except ValueError:  # an encoder-decoder and the like
        return []
    samplings = [Sampling(max_tokens=WRITTEN, temperature=0.8, seed=seed) for seed in range(len(prompts))]
    results = engine.generate(prompts, samplings)
    texts = [engine.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
    return [(text, result.text) for text, result in zip(texts, results, strict=True)]


def _prompts(job: dict[str, Any], count: int) -> list[list[int]]:
    """Beginnings of held-out rows; of a conversation, all until the assistant speaks."""
    from jobs.config import from_json
    from jobs.data import Chats, index_of, prepare

    this = from_json(job)
    held_out = index_of(prepare(this.data, quiet=True), "val", this.length)
    batch = held_out.rows(0, min(count, held_out.samples_per_epoch))
    if not isinstance(this.data, Chats):
        return [ids_T[:PROMPT].tolist() for ids_T in batch["ids_BT"]]
    first_B = (batch["targets_BT"] != -100).int().argmax(1)
    return [ids_T[: first + 1].tolist() for ids_T, first in zip(batch["ids_BT"], first_B.tolist(), strict=True)]


def _environment(place: str | None) -> dict[str, str]:
    """The machine that writes the page, and how many processes trained."""
    packages = {}
    for name in ("torch", "ray", "deepspeed", "triton", "tokenizers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    workers = {"workers of the last checkpoint": str(folder.load(place).meta["world"])} if place else {}
    machine = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return workers | machine | {"cpus": str(os.cpu_count()), "gpus": ", ".join(gpus) or "none"} | packages


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a run's folder, or its name")
    parser.add_argument("--samples", type=int, default=3, help="texts the model writes; 0 for none")
    wanted = parser.parse_args(arguments)
    named = storage.join(storage.home(), "runs", wanted.run)
    try:
        print(write(Path(wanted.run if "/" in wanted.run or Path(wanted.run).exists() else named), wanted.samples))
    except (ValueError, OSError) as error:
        cli.fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
