"""Phases: an engine each, parameters of their own, exact resume; and data that is tensors, through the same index."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from group import ROOT, environment, run_ranks, wait
from safetensors.torch import load_file, save_file
from test_pretrain import curve as timed_curve
from test_pretrain import has_checkpoint, steps_made
from torch import nn

from cluster import folder
from jobs import cli
from jobs.config import check
from jobs.data import Arrays, Prepared, index_of, prepare
from jobs.data.loader import Loader
from jobs.engine import TorchEngine
from jobs.optim import Optim
from jobs.phases import Phases
from models import hub
from models.generative.gan import GAN
from models.model import Model

RECIPE = "gan_digits --steps 60 --save_every 4 --eval_every 20 --eval_rows 16 --batch 16 --model.width 4".split()
CASES = [("non_saturating", "fp32", 2), ("non_saturating", "bf16", 1), ("wgan_gp", "fp32", 1)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def start(home, name, *options):
    command = [sys.executable, "-m", "jobs.pretrain", *options, "--name", name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(EDIFICE_HOME=home), cwd=ROOT, **pipes)


def finish(process, seconds=240):
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output[-3000:]
    return output


def curve(run):
    return [{k: v for k, v in record.items() if k != "rows_per_s"} for record in timed_curve(run)]


def gan(home, name):
    """A run of the recipe gan_digits, made small."""
    return start(home, name, *RECIPE)


# -- phases ------------------------------------------------------------------------------------------------------


def phases(critic=1, **options):
    torch.manual_seed(0)
    model = GAN(GAN.Config(size=8, channels=1, width=4, latent=6, critic=critic, average=0.5, **options))
    return model, Phases(model, lambda phase: TorchEngine(model, Optim(lr=1e-2, warmup=0), "fp32", "cpu", phase))


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", ("non_saturating", "wgan_gp"))
def test_a_phase_touches_only_its_own_parameters(loss):
    model, engine = phases(loss=loss)
    batch = {"pixels_BCHW": torch.rand(4, 1, 8, 8)}
    for phase in ("discriminator", "generator"):
        before = copies(model)
        engine.engines[phase].update([batch], 1e-2)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and all(name.startswith(phase + ".") for name in changed)
        assert all(p.grad is None for p in model.parameters()), "no phase may find gradients of another"
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("averaged"))


def test_a_step_is_its_phases_in_order_then_after_step():
    """The same weights as plain torch by hand: two updates of the discriminator, one of the generator, the average."""
    model, _ = phases(critic=2)
    truth, _ = phases(critic=2)
    sides = {
        phase: torch.optim.AdamW(getattr(truth, phase).parameters(), 1e-2, (0.9, 0.95), weight_decay=0.0)
        for phase in ("discriminator", "generator")
    }
    engine = Phases(model, lambda phase: TorchEngine(model, Optim(lr=1e-2, decay=0.0, clip=0.0), "fp32", "cpu", phase))
    for step in range(3):
        batch = {"pixels_BCHW": torch.rand(4, 1, 8, 8)}
        torch.manual_seed(step)
        record = engine.step([batch], 1e-2)
        torch.manual_seed(step)
        for phase in ("discriminator", "discriminator", "generator"):
            sides[phase].zero_grad()
            loss, _ = truth(batch, phase)
            grads = torch.autograd.grad(loss, list(getattr(truth, phase).parameters()))
            for parameter, gradient in zip(getattr(truth, phase).parameters(), grads):
                parameter.grad = gradient
            sides[phase].step()
        truth.after_step()
        assert record["generator.loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in truth.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-5, atol=1e-6)
    assert {"loss", "grad_norm", "items", "real", "fake", "generator.loss", "generator.grad_norm"} == record.keys()
    assert [engine.updates] + [e.updates for e in engine.engines.values()] == [3, 6, 3]


def test_state_is_whole_and_goes_on():
    model, engine = phases(critic=2, loss="wgan_gp")
    batches = [{"pixels_BCHW": torch.rand(4, 1, 8, 8)} for _ in range(4)]
    for batch in batches[:2]:
        engine.step([batch], 1e-2)
    state = engine.state()
    assert state.weights.keys() == dict(model.named_parameters()).keys()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert state.moments.keys() == {f"{name}.{m}" for name in trained for m in ("exp_avg", "exp_avg_sq")}
    other_model, other = phases(critic=2, loss="wgan_gp")
    other.load(state)
    for each in (engine, other):
        torch.manual_seed(5)
        for batch in batches[2:]:
            record = each.step([batch], 1e-2)
        assert record["generator.grad_norm"] > 0
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in other_model.named_parameters())


class Half(Model):
    """A phase that trains nothing, or a parameter that no phase trains."""

    def __init__(self, names):
        super().__init__()
        self.a, self.b, self.names = nn.Linear(2, 2), nn.Linear(2, 2), names

    def phases(self):
        return self.names


@pytest.mark.parametrize(
    "names,words", [(("a", "c"), "phase 'c' has no parameters"), (("a",), "b.bias belongs to no phase")]
)
def test_phases_that_do_not_fit_the_model_are_refused(names, words):
    model = Half(names)
    with pytest.raises(ValueError, match=words):
        Phases(model, lambda phase: TorchEngine(model, Optim(), "fp32", "cpu", phase))


def test_an_engine_needs_to_know_its_phase():
    model, _ = phases()
    with pytest.raises(ValueError, match="trains in phases"):
        TorchEngine(model, Optim())


@pytest.mark.parametrize(
    "options,words", [("--engine deepspeed --workers 2 --zero 3", "zero=3: ZeRO-3 trains one phase")]
)
def test_what_phases_cannot_do_is_one_line_before_anything_starts(options, words):
    with pytest.raises(ValueError, match=words) as error:
        check(cli.override(cli.load("gan_digits"), "x", options.split()))
    assert "\n" not in str(error.value)


# -- ranks and DeepSpeed -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(of one process, of two): results.json of phases_ranks.py."""
    found = []
    for count in (1, 2):
        out = tmp_path_factory.mktemp(f"ranks{count}")
        run_ranks("phases_ranks.py", count, out)
        found.append(json.loads((out / "results.json").read_text()))
    return found


@pytest.mark.parametrize("kind", ("torch", "0", "1", "2"))
@pytest.mark.parametrize("loss,precision,accumulate", CASES)
def test_two_ranks_of_any_engine_follow_one_process(ranks, kind, loss, precision, accumulate):
    one, two = (found["cases"] for found in ranks)
    name = f"{loss}-{precision}-{accumulate}"
    ours, truth = two[f"{kind}-{name}"], one[f"torch-{name}"]
    tolerance = {"fp32": 1e-4, "bf16": 2**-5}[precision]
    for step, (a, b) in enumerate(zip(ours["curve"], truth["curve"], strict=True)):
        assert a.keys() == b.keys()
        for key in ("loss", "generator.loss", "grad_norm", "generator.grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (step, key)
    assert ours["broken"] == ours["curve"], "a stored state goes on bit for bit"
    assert ours["updates"] == truth["updates"] == 2
    assert ranks[1]["states"][f"{kind}-{name}"] == ranks[0]["states"][f"torch-{name}"]


# -- runs --------------------------------------------------------------------------------------------------------


def test_a_killed_run_of_two_phases_has_the_curve_of_the_unbroken_one(home):
    assert "validation loss" in finish(gan(home, "whole"))
    run, whole = home / "runs" / "killed", home / "runs" / "whole"
    process = gan(home, "killed")
    wait(lambda: (has_checkpoint(run) and steps_made(run) >= 6) or process.poll() is not None, 90, "step 6")
    process.kill()
    process.communicate()
    assert steps_made(run) < 60, "the run ended before it could be killed"
    assert "going on at step" in finish(gan(home, "killed"))
    assert curve(run) == curve(whole)
    place = "checkpoints/step-00000060"
    for name in ("model", "optimizer"):
        ours, truth = (load_file(each / place / f"{name}.safetensors") for each in (run, whole))
        assert ours.keys() == truth.keys() and all(torch.equal(ours[key], truth[key]) for key in truth)
    moments = {name.partition(".")[0] for name in load_file(run / place / "optimizer.safetensors")}
    assert moments == {"discriminator", "generator"}
    records = curve(run)
    assert {"generator.loss", "penalty", "rows"} <= records[1].keys() and "val_generator.loss" in records[0]
    assert hub.load(str(run)).predict({"latents_BZ": torch.zeros(2, 16)})["pixels_BCHW"].shape == (2, 1, 8, 8)


def test_vit_learns_digits_to_97_percent_from_the_command_line(home):
    output = finish(start(home, "vit", "vit_digits"), 500)
    found = re.search(r"validation accuracy ([\d.]+) -> ([\d.]+)", output)
    assert float(found[1]) < 0.3 and float(found[2]) >= 0.97, output[-2000:]
    model = hub.load(str(home / "runs" / "vit"))
    held_out = index_of(Prepared(next(home.glob("data/digits-*")).as_posix(), "", 0), "val", 1).rows(0, 359)
    right = (model.predict(held_out)["labels_B"] == held_out["labels_B"]).float().mean().item()
    assert right == pytest.approx(float(found[2]), abs=1e-4)


# -- tensors as data ---------------------------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """37 rows whose content is their number, as a file."""
    monkeypatch.setenv("EDIFICE_HOME", str(tmp_path / "home"))
    save_file({"n_B": torch.arange(37), "x_BD": torch.arange(37.0)[:, None].repeat(1, 3)}, tmp_path / "n.safetensors")
    return Arrays("safetensors", str(tmp_path / "n.safetensors"), val_fraction=0.2)


def test_every_row_is_seen_exactly_once_an_epoch_and_val_is_apart(numbers):
    prepared = prepare(numbers)
    assert prepare(numbers) == prepared and prepared.tokenizer == ""
    train, val = index_of(prepared, "train", 1, seed=3), index_of(prepared, "val", 1)
    assert (train.samples_per_epoch, val.samples_per_epoch) == (30, 7)
    held_out = val.rows(0, 7)["n_B"].tolist()
    epochs = [train.rows(30 * epoch, 30) for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows["n_B"].tolist() + held_out) == list(range(37))
        assert torch.equal(rows["x_BD"][:, 1], rows["n_B"].float())
    orders = [rows["n_B"].tolist() for rows in epochs] + [index_of(prepared, "train", 1, 4).rows(0, 30)["n_B"].tolist()]
    assert len({tuple(order) for order in orders}) == 4
    assert train.rows(17, 40)["n_B"].tolist() == sum(orders[:3], [])[17:57]


@pytest.mark.parametrize("world,accumulate", [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_any_number_of_workers_reads_the_same_steps_from_any_cursor(numbers, world, accumulate):
    prepared = prepare(numbers)
    truth = index_of(prepared, "train", 1).rows(24, 36)["n_B"].view(3, 12)
    loaders = [Loader(index_of(prepared, "train", 1), 12, rank, world, accumulate, 24) for rank in range(world)]
    for step in truth:
        parts = [batch["n_B"] for loader in loaders for batch in next(loader)]
        assert len(parts) == world * accumulate and torch.equal(torch.cat(parts), step)
    for loader in loaders:
        assert loader.cursor == 60
        loader.close()


def test_a_flipped_byte_of_prepared_rows_is_refused_by_name(numbers):
    prepared = prepare(numbers)
    file = Path(prepared.folder) / "train.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(folder.Damaged, match="train.safetensors"):
        index_of(prepared, "train", 1)


@pytest.mark.parametrize(
    "arrays,words",
    [
        (Arrays("digits", "x"), "source 'digits' has no path"),
        (Arrays("safetensors"), "path is empty"),
        (Arrays("safetensors", "/nowhere"), "is no file"),
        (Arrays(val_fraction=1.0), "val_fraction=1.0"),
        (Arrays(val_fraction=1e-6), "of 1797 rows it takes 0"),
    ],
)
def test_a_mistake_in_arrays_is_one_line(arrays, words, tmp_path, monkeypatch):
    monkeypatch.setenv("EDIFICE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=words) as error:
        prepare(arrays)
    assert "\n" not in str(error.value)


def test_tensors_with_different_numbers_of_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EDIFICE_HOME", str(tmp_path))
    save_file({"a": torch.zeros(3), "b": torch.zeros(4)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="same number of rows"):
        prepare(Arrays("safetensors", str(tmp_path / "bad.safetensors")))
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        prepare(Arrays("safetensors", str(tmp_path / "bad.safetensors")))


@pytest.mark.parametrize(
    "options,words", [("--length 4", "set --length 1"), ("--model.patch 3", "multiple of patch=3")]
)
def test_a_job_on_arrays_is_checked(options, words):
    with pytest.raises(ValueError, match=words):
        check(cli.override(cli.load("vit_digits"), "x", options.split()))
