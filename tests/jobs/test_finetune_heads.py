"""Heads trained on a run that stays as it is: what learns, what does not, and a run that drafts for itself."""

import json

import pytest
import torch

from cluster import storage
from jobs import finetune, pretrain
from jobs.config import check
from jobs.record import read
from models import hub
from serve.drafters import make
from serve.engine import Engine
from serve.sampler import Sampling

SMALL = "--workers 0 --batch 4 --length 48 --eval_rows 2 --eval_every 0".split()
DATA = "--data.vocab 300 --data.limit_bytes 60000".split()


@pytest.fixture(scope="module")
def bases(home):
    """Runs of architectures with growing state, with fixed state, and with routers that learn by another rule."""
    for name, recipe in (("grows", "tiny:gqa"), ("fixed", "tiny:gated_deltanet"), ("routed", "tiny:moe_v2")):
        pretrain.main([recipe, *SMALL, *DATA, "--steps", "6", "--name", name])
    return ("grows", "fixed", "routed")


def weights(name: str) -> dict[str, torch.Tensor]:
    return hub.weights(hub.load(hub.locate(str(pretrain.run_folder(name)))))


def tune(base: str, name: str, *options: str) -> list[dict]:
    options = [*SMALL, "--steps", "12", "--optim.lr", "0.01", "--from", base, "--name", name, *options]
    finetune.main(["tiny", *options])
    return [record for record in read(pretrain.run_folder(name)) if "loss" in record]


@pytest.mark.parametrize("head,added", [("medusa(heads=2)", {"inner", "outer"}), ("mtp(depth=1)", None)])
@pytest.mark.parametrize("base", ["grows", "fixed", "routed"])
def test_a_head_learns_and_the_rest_is_bit_equal(bases, base, head, added):
    name = f"{base}-{head[:3]}"
    records = tune(base, name, "--head", head)
    losses = [key for key in records[0] if key.startswith(head.partition("(")[0] + "_")]
    assert losses and all(records[-1][key] < records[0][key] for key in losses)
    before, after = weights(base), weights(name)
    for key, value in before.items():
        assert torch.equal(after[key], value), f"{key} has changed"
    new = after.keys() - before.keys()
    assert new and all(key.startswith("head.") for key in new)
    assert added is None or {key.split(".")[1] for key in new} == added
    place = storage.join(hub.locate(str(pretrain.run_folder(name))), "optimizer.safetensors")
    from safetensors.torch import load

    held = {key.rpartition(".")[0] for key in load(storage.read(place))}
    assert held == new, "the optimizer holds moments of what it does not train"


def test_the_run_serves_and_drafts(bases):
    tune("grows", "served", "--head", "medusa(heads=2)", "--steps", "40")
    model = hub.load(hub.locate(str(pretrain.run_folder("served"))))
    prompts, sampling = [[1, 2, 3], [40, 41]], Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    plain = Engine(hub.load(hub.locate(str(pretrain.run_folder("grows")))), max_rows=2, max_len=64)
    drafting = Engine(model, max_rows=2, max_len=64, drafter=make("medusa", model, 2, 64))
    drafting.speculation.width.choose = lambda rates, ready: 4  # always, whether it pays or not
    assert [r.tokens for r in drafting.generate(prompts, sampling)] == [
        r.tokens for r in plain.generate(prompts, sampling)
    ]
    assert drafting.speculation.accepted > 0


def test_the_corpus_is_the_runs_own_unless_another_is_named(bases, tmp_path):
    own = json.loads((pretrain.run_folder("grows") / "config.json").read_text())["data"]
    job = finetune.parse(["tiny", "--from", "grows", "--head", "medusa"])
    assert job.data.limit_bytes == own["limit_bytes"] == 60000 and job.data.tokenizer and job.frozen
    assert job.name == "tiny-medusa" and job.model.head == "medusa"
    check(job)
    (tmp_path / "a.txt").write_text("some text")
    text = finetune.parse(["tiny", "--from", "grows", "--head=medusa", "--data.source", "text", "--data.path", "x"])
    assert (text.data.source, text.data.path) == ("text", "x")
    chat = finetune.parse(["tiny", "--from", "grows", "--head", "medusa", "--data.source=chat", "--data.path", "y"])
    assert (chat.data.source, chat.data.path) == ("chat", "y")


def test_it_goes_on_where_it_was_and_from_heads_that_are_there(bases):
    """Interrupted and gone on with is the run in one go; a head that the base has learns on."""
    whole = tune("grows", "whole", "--head", "medusa(heads=2)", "--save_every", "4")
    tune("grows", "parts", "--head", "medusa(heads=2)", "--save_every", "4", "--steps", "8")
    parts = tune("grows", "parts", "--head", "medusa(heads=2)", "--save_every", "4")
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours["medusa_2"] == pytest.approx(theirs["medusa_2"], rel=0.2)
    again = tune("whole", "again", "--head", "medusa(heads=2)")
    assert again[0]["medusa_1"] < whole[0]["medusa_1"]


@pytest.mark.parametrize(
    "options,word",
    [
        (["--head", "lm"], "has nothing to learn"),
        (["--head", "medusas"], "medusa"),
        (["--head"], "--head: needs"),
        (["--head", "medusa", "--engine", "deepspeed", "--zero", "3", "--workers", "1"], "--zero 2"),
        (["--head", "medusa", "--frozen"], "--frozen: comes with --from"),
        (["--head", "medusa", "--data.source", "chat"], "which conversations"),
    ],
)
def test_mistakes_are_one_line(bases, options, word, capsys):
    with pytest.raises(SystemExit):
        finetune.main(["tiny", *SMALL, "--from", "grows", *options])
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1


def test_frozen_needs_a_start(home, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["tiny", *SMALL, "--frozen", "--name", "nothing"])
    assert "set --start" in capsys.readouterr().err
