"""`python -m serve.bench` runs from end to end on a tiny checkpoint, and what it makes of arrival times is right."""

import re

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from serve.bench import __main__ as bench
from serve.bench import checkpoint, gguf_file
from serve.bench.arrivals import Round, Rounds, percentile
from serve.bench.limits import Limits


def test_what_arrival_times_say():
    steady = [[(1.0 + 0.1 * i, 1 + i) for i in range(11)], [(1.5 + 0.1 * i, 1 + i) for i in range(6)]]
    found = Round.of(steady)
    assert found.rate == pytest.approx(20), "two requests, a token each in a tenth of a second"
    assert (found.first, found.middle, found.late) == pytest.approx((1.25, 0.1, 0.1))
    together = Round.of([[(0.2, 1), (1.2, 101)]])
    assert together.rate == pytest.approx(100) and together.middle == pytest.approx(1.0), "a hundred in one piece"
    assert Round.of([[(0.2, 1)]]).rate == 0, "a first token alone tells no rate"
    three = Rounds.of([Round(rate, 1, 1, late) for rate, late in ((90, 3), (110, 1), (100, 2))])
    assert (three.rate, three.spread, three.late) == pytest.approx((100, 0.2, 2))
    hundred = [float(i) for i in range(1, 101)]
    assert (percentile(hundred, 0.5), percentile(hundred, 0.99), percentile([], 0.5)) == (50, 99, 0)


def test_limits():
    limits = Limits(read=16e9, product=1e12)
    assert limits.rate(10**9, "bf16", 1) == pytest.approx(8), "a step reads two gigabytes"
    assert limits.rate(10**9, "int8", 1) == pytest.approx(8 * 16 / 8.25)
    assert limits.rate(10**9, "bf16", 10_000) == pytest.approx(500), "two operations for each weight and token"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    checkpoint.write(folder, checkpoint.SMALL)
    return folder


@pytest.mark.parametrize(("form", "bound"), [("fp32", 0), ("bf16", 2**-8), ("int8", 2**-7), ("int4", 2**-3)])
def test_the_file_of_llama_cpp_has_the_same_weights(folder, tmp_path, form, bound):
    path = tmp_path / "llama.gguf"
    gguf_file.write(folder / "hf", path, form)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    given = load_file(folder / "hf" / "model.safetensors")
    assert len(stored) == len(given)
    for name, weight in given.items():
        found = stored[gguf_file._name(name)]
        values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(weight.shape)
        if "q_proj" in name or "k_proj" in name:  # rows of each head in pairs: i and i + half
            heads = weight.shape[0] // 64
            values = values.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        assert np.abs(values - weight).max() <= bound * np.abs(weight).max(), name


def test_the_tokenizer_has_a_token_for_every_number(folder):
    tokenizer = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == checkpoint.vocabulary(folder) == 512
    assert tokenizer.decode(tokenizer.encode("Gr\u00fc\u00dfe, that").ids) == "Gr\u00fc\u00dfe, that"
    first, second = (checkpoint.prompts(32, 16, 512, draw) for draw in (1, 2))
    assert not {tuple(prompt) for prompt in first} & {tuple(prompt) for prompt in second}


def test_a_run(tmp_path, capsys):
    record = tmp_path / "records" / "serving.md"
    options = ["--small", "--threads", "1", "--rows", "1", "4", "--rounds", "1", "--tokens", "24", "--warm", "0"]
    parts = ["edifice", "transformers", "uvicorn", "llama_cpp"]
    assert (
        bench.main([*parts, *options, "--forms", "bf16", "--llama-python", "no-python", "--record", str(record)]) == 0
    )
    lines = record.read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    rows = [line.split(" | ") for line in lines if re.match(r"\| (edifice|transformers|llama)", line)]
    assert [(row[0], row[2]) for row in rows] == [
        (f"| {name}", count) for name in ("edifice", "edifice, HTTP uvicorn", "transformers") for count in ("1", "4")
    ]
    assert all(float(row[6]) > 0 for row in rows)
    assert all(float(row[3]) > 0 for row in rows if "HTTP" not in row[0]), "there all may come in one piece"
    assert "- llama_cpp bf16 did not run: there is no no-python." in lines
    assert sum("x transformers" in line for line in lines) == 2 == sum("over HTTP (uvicorn)" in line for line in lines)


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        bench.main(["other"])
    assert "no such part: other; there are edifice" in capsys.readouterr().err
