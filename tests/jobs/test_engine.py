"""Two ranks of any engine and ZeRO stage follow the curve of one process, and take up what any of them stored."""

import json

import pytest
import torch
from group import run_ranks
from safetensors.torch import load_file

KINDS = ("torch", "0", "1", "2", "3")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(of one process, of two, folder of what two stored)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run_ranks("engine_ranks.py", 1, one)
    run_ranks("engine_ranks.py", 2, two)
    return json.loads((one / "results.json").read_text()), json.loads((two / "results.json").read_text()), one, two


def close(ours, theirs, tolerance):
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=0)


@pytest.mark.parametrize("accumulate", (1, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_losses_and_gradient_norms_of_one_process(results, kind, accumulate):
    one, two, *_ = results
    ours, truth = two[f"{kind}-fp32-{accumulate}"], one["torch-fp32-1"]
    close(ours["curve"], truth["curve"], 2e-6)
    assert ours["items"] == truth["items"]
    close(ours["loss"], truth["loss"], 2e-6)
    assert truth["curve"][0][1] > 0.5, "the norm must exceed the clip, or clipping is not tested"


@pytest.mark.parametrize("accumulate", (1, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_follows_one_process_within_rounding(results, kind, accumulate):
    one, two, *_ = results
    ours, truth = two[f"{kind}-bf16-{accumulate}"], one["torch-bf16-1"]
    close(ours["curve"], truth["curve"], 2**-7)  # one rounding of bf16


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("accumulate", (1, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_state_goes_on_bit_for_bit(results, kind, accumulate, precision):
    result = results[1][f"{kind}-{precision}-{accumulate}"]
    assert result["broken"] == result["curve"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_any_engine_takes_up_what_another_stored(results, source, kind):
    one, two, *_ = results
    close(two[f"{source}-to-{kind}"]["broken"], one["torch-fp32-1"]["curve"][3:], 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_states_are_whole_and_alike(results, kind):
    _, _, one, two = results
    for file in ("weights", "moments"):
        truth = load_file(one / f"torch-fp32-1-end/{file}.safetensors")
        ours = load_file(two / f"{kind}-fp32-1-end/{file}.safetensors")
        assert ours.keys() == truth.keys()
        for name, value in truth.items():
            assert ours[name].dtype == value.dtype
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
    weights = load_file(two / f"{kind}-bf16-1-end/weights.safetensors")
    assert weights["up.weight"].dtype == torch.float32
    rounded = weights["up.weight"].bfloat16().float()
    assert (weights["up.weight"] != rounded).any(), "bf16 must not round the stored weights"
    assert weights["steps"].tolist() == [6, 6, 6]
    assert torch.equal(weights["frozen"], torch.linspace(0.5, 1.5, 13))
    assert "head.weight" not in weights, "a tied weight is stored once"
