"""Longer contexts than a model was trained on: the same weights under other positions, told and drawn."""

import argparse
import dataclasses
import sys

import pytest

from jobs import cli, compare, extend
from jobs.data import Data
from jobs.pretrain import pretrain, run_folder
from models.decoder import Decoder


@pytest.fixture(scope="module")
def run(home):
    """The name of a short run of rotary attention over rows of 32 tokens."""
    job = cli.load("tiny:gqa")
    job = dataclasses.replace(
        job,
        name="short",
        length=32,
        workers=0,
        threads=1,
        eval_every=0,
        data=Data(vocab=512, limit_bytes=300_000, val_fraction=0.2),
    )
    pretrain(job)
    return "short"


def test_weights_run_at_eight_times_the_length(run):
    curves, edges, trained = extend.extend(run, 8, 4)
    rope, yarn, chunks = curves.values()
    assert trained == 32 and edges[-1] == 256 and len(edges) == len(rope)
    assert rope[0] == pytest.approx(chunks[0], rel=1e-5)  # inside a chunk distances are what they were
    assert rope[0] != pytest.approx(yarn[0], rel=1e-5) and rope[-1] != pytest.approx(chunks[-1], rel=1e-6)
    assert all(1 < value < 2000 for values in curves.values() for value in values)


def test_command_draws_a_plot(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["extend", run, "--factor", "2", "--rows", "2"])
    extend.main()
    said = capsys.readouterr().out
    assert "dual chunks" in said and (run_folder(run) / "context.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments,word",
    [(["short", "--factor", "1"], "--factor"), (["nowhere"], "nowhere"), (["short", "--factor", "4000"], "held-out")],
)
def test_mistakes_get_one_line(run, monkeypatch, capsys, arguments, word):
    monkeypatch.setattr(sys, "argv", ["extend", *arguments])
    with pytest.raises(SystemExit):
        extend.main()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word in said


def test_only_plain_rotary_attention_changes():
    config = Decoder.Config(pattern="gated_deltanet gqa(window=8) gqa(heads=2,positions=rope(theta=500.0))")
    variants = extend.extended(config, 64, 4)
    assert variants["dual chunks"].pattern == (
        "gated_deltanet gqa(window=8) dual_chunk_attention(heads=2,positions=rope(theta=500.0),chunk=48,local=8)"
    )
    assert "yarn(theta=500.0,original=64)" in variants["yarn, factor 4"].pattern
    with pytest.raises(ValueError, match="rope positions"):
        extend.extended(Decoder.Config(pattern="gated_deltanet"), 64, 4)


def test_architectures_side_by_side(run, monkeypatch, capsys, tmp_path):
    sizes = ["--dim", "16", "--layers", "2", "--steps", "3", "--batch", "2", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["compare", "retnet", "gqa", *sizes, "--record", str(tmp_path / "table.md")])
    compare.main()
    table = (tmp_path / "table.md").read_text()
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in table.splitlines() if line.startswith("| ")}
    assert capsys.readouterr().out.endswith(table + "\n")
    assert rows["retnet"][6] == rows["retnet"][7].rstrip(" |"), "a recurrence's state does not grow"
    small, large = (int(cell.rstrip(" |").replace(",", "")) for cell in rows["gqa"][6:8])
    assert 31 < (large - 16) / (small - 16) < 33


def test_another_budget_is_another_run():
    given = {"dim": 64, "layers": 4, "steps": 100, "batch": 8, "length": 256, "threads": 1, "lr": 5e-3}
    changes = ({}, {"steps": 50}, {"batch": 4}, {"length": 64}, {"lr": 1e-3}, {"dim": 32}, {"layers": 2})
    made = [compare.job_of("gqa", argparse.Namespace(**given | change)).name for change in changes]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    "arguments,word",
    [
        (["nothing"], "nothing"),
        (["gqa", "fnet"], "fnet"),
        (["soft_moe"], "soft_moe"),
        (["encoder_decoder"], "encoder_decoder"),
        (["gqa", "--record", "/nowhere/table.md"], "/nowhere"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_trained(run, monkeypatch, capsys, arguments, word):
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    monkeypatch.setattr(compare, "pretrain", None)
    with pytest.raises(SystemExit):
        compare.main()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word in said


@pytest.mark.parametrize("name", ["moed"])
def test_patterns_are_read_further_as_what_they_are(run, name):
    options = {"layers": 2, "pattern": "gqa"}
    job = cli.load(f"tiny:{name}")
    job = dataclasses.replace(
        job,
        name=f"short-{name}",
        model=dataclasses.replace(job.model, **options),
        length=32,
        steps=1,
        workers=0,
        threads=1,
        eval_every=0,
        data=Data(vocab=512, limit_bytes=300_000, val_fraction=0.2),
    )
    pretrain(job)
    curves, _, _ = extend.extend(job.name, 2, 1)
    assert len(curves) == 3


def test_everything_that_speaks_is_compared():
    names = compare.names()
    assert {"gqa", "rwkv7", "nsa", "decoder_only"} <= set(names) and "encoder_decoder" not in names
