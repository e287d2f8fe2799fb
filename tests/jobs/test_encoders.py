"""Every text encoder: its tiny recipe learns to tell hidden tokens, is stored, loaded, predicts; no bits per byte."""

import dataclasses
import json

import pytest
import torch

import models
from jobs import cli
from jobs.evaluate import Evaluation, evaluate
from jobs.pretrain import pretrain, run_folder
from models import hub
from models.encoder import Encoder
from models.registry import lookup
from serve.engine import Engine

NAMES = [name for name in models.names(kind="encoder") if issubclass(lookup(name), Encoder)]


pytestmark = pytest.mark.usefixtures("home")


def trained(architecture, **changes):
    """(summary, records, folder) of the tiny recipe's run."""
    job = dataclasses.replace(cli.load(f"tiny:{architecture}"), workers=0, threads=1, **changes)
    summary = pretrain(job)
    lines = (run_folder(job.name) / "metrics.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines], run_folder(job.name)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_is_stored_and_predicts(name):
    summary, records, run = trained(name)
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert summary.finished and losses[-1] < 0.93 * losses[0], losses
    assert not [key for record in records for key in record if "bits" in key]  # hidden tokens are no code of the text
    assert summary.measure == "loss" and summary.last == losses[-1]
    assert "bits per byte" not in (run / "report.html").read_text()
    model = hub.load(str(run))
    predicted = model.predict({"ids_BT": torch.randint(513, (2, 30))})
    assert predicted["hidden_BTD"].shape == (2, 30, 32) and predicted["logits_BTC"].shape == (2, 30, 512)
    with pytest.raises(ValueError):
        Engine(model, max_rows=2, max_len=64)
    with pytest.raises(ValueError, match="not a causal decoder"):
        evaluate(str(run), Evaluation())


@pytest.mark.parametrize("name", ["fnet", "longformer"])
def test_going_on_hides_what_an_unbroken_run_hides(name):
    """Masks are drawn from the stream that a checkpoint keeps."""
    _, whole, _ = trained(name, steps=8, save_every=4, eval_every=0, name=f"{name}-whole")
    trained(name, steps=4, save_every=4, eval_every=0, name=f"{name}-parts")
    _, parts, _ = trained(name, steps=8, save_every=4, eval_every=0, name=f"{name}-parts")
    losses = [[r["loss"] for r in records if "loss" in r] for records in (whole, parts)]
    assert losses[0][4] == losses[1][4]
