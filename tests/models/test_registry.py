"""Names, parts as text, and mistakes that get one clear line."""

import json
import subprocess
import sys
import time

import pytest

import models
from models import registry
from models.__main__ import main
from models.config import from_json, parse_part, parse_pattern, to_json, to_text
from models.decoder import Decoder
from models.model import Model
from serve.engine import Engine


def test_names_are_file_stems():
    assert {"gqa", "gated_deltanet"} <= set(models.names(kind="mixer"))
    assert "gqa" in models.names(family="attention") and "swiglu" not in models.names(family="attention")


@pytest.mark.parametrize("name", models.names())
def test_every_name_builds_and_has_a_card(name):
    card = models.card(name)
    assert card["parameters"] > 0 and card["family"] and len(card["idea"]) > 40
    assert registry.name_of(registry.lookup(name)) == name
    if card["paper"]:  # an arXiv id is a year, a month and a number
        month, number = card["paper"].split(".")
        assert 1991 <= 2000 + int(month[:2]) <= 2026 and 1 <= int(month[2:]) <= 12, card["paper"]
        assert len(number) == (4 if int(month) < 1501 else 5), card["paper"]


@pytest.mark.parametrize("name", models.names())
def test_a_card_says_what_the_model_can(name):
    """What is said to serve is taken by an engine, nothing else is; what is said to predict has its own way."""
    model, card = models.build(name), models.card(name)
    if "serve" in card["supports"]:
        assert card["supports"] == ("train", "serve", "rl") and card["state"]
        Engine(model, max_rows=1, max_len=16)
    else:
        assert card["supports"] in [("train", "predict"), ("train",)]
        assert ("predict" in card["supports"]) == (type(model).predict is not Model.predict)
        with pytest.raises(ValueError):
            Engine(model, max_rows=1, max_len=16)


def test_parts_support_what_their_model_does():
    said = {name: models.card(name)["supports"] for name in ("ssmax", "full", "soft_moe", "encoder_decoder", "gan")}
    assert said["ssmax"] == said["full"] == ("train", "serve", "rl")
    assert said["soft_moe"] == said["encoder_decoder"] == said["gan"] == ("train", "predict")


def test_the_paper_of_a_card_is_the_one_that_introduces_it():
    """Not the first that is mentioned, where a line of its own names it."""
    assert models.card("rope")["paper"] == "2104.09864" and models.card("gqa")["paper"] == "2305.13245"
    assert models.card("lm")["paper"] is None


def test_overrides_find_their_place():
    decoder = models.build("gqa", heads=8, window=3, dim=32, layers=1, positions="yarn(factor=2)")
    assert decoder.config.dim == 32
    assert decoder.blocks[0].mixer.config.heads == 8 and decoder.blocks[0].mixer.config.window == 3


def test_pattern_strings():
    parts = parse_pattern("2*gated_deltanet(heads=2) gqa(window=4,positions=rope(theta=5e5,factor=2))", "mixer")
    assert [registry.name_of(cls) for cls, _ in parts] == ["gated_deltanet", "gated_deltanet", "gqa"]
    assert parts[2][1].window == 4
    assert parse_part(parts[2][1].positions, "position")[1].theta == 5e5
    for cls, config in parts:
        assert parse_part(to_text(config), "mixer") == (cls, config)


def test_config_round_trip():
    config = Decoder.Config(pattern="3*gated_deltanet gqa", tied=True)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "options,words",
    [
        ({"pattern": "gpa"}, ["no architecture", "gpa", "gqa"]),
        ({"pattern": "gqa(hats=3)"}, ["gqa", "hats", "heads"]),
        ({"pattern": "gqa(heads=many)"}, ["heads", "many", "int"]),
        ({"pattern": "gqa(mask=sideways)"}, ["mask", "sideways", "causal"]),
        ({"pattern": "gqa(heads=3"}, ["bracket"]),
        ({"pattern": "gqa(heads)"}, ["heads", "option=value"]),
        ({"pattern": ""}, ["no mixer", "gqa"]),
        ({"pattern": "swiglu"}, ["swiglu", "ffn", "mixer"]),
        ({"pattern": "gqa(heads=3,kv_heads=1)"}, ["dim=64", "heads=3"]),
        ({"layers": 0}, ["layers", "at least 1"]),
        ({"dims": 3}, ["dims", "dim"]),
    ],
)
def test_a_mistake_gets_one_clear_line(options, words):
    with pytest.raises(ValueError) as error:
        models.build("decoder", **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_mistake_in_a_name():
    with pytest.raises(ValueError, match="did you mean gated_deltanet"):
        models.build("gated_delta_net")


def test_command():
    listing = subprocess.run([sys.executable, "-m", "models", "--kind", "ffn"], capture_output=True, text=True)
    assert listing.returncode == 0 and "swiglu" in listing.stdout and "gqa" not in listing.stdout
    card = subprocess.run([sys.executable, "-m", "models", "gqa"], capture_output=True, text=True)
    assert card.returncode == 0 and "2305.13245" in card.stdout and "window=0" in card.stdout
    wrong = subprocess.run([sys.executable, "-m", "models", "gpa"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_the_list_fits_a_screen_and_is_quick():
    """Every name whole on a line of its own, of at most 100 columns, also when nothing is a terminal."""
    begin = time.monotonic()
    listing = subprocess.run([sys.executable, "-m", "models"], capture_output=True, text=True)
    assert time.monotonic() - begin < 60  # 3 s on an idle machine
    lines = listing.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: line.split()[1:] for line in lines[1 : lines.index("")]}
    assert sorted(rows) == models.names() == list(rows)
    assert rows["rope"][:3] == ["position", "positions", "2104.09864"] and rows["gan"][-2:] == ["train", "predict"]


def test_the_list_can_be_cut_and_read_by_programs(capsys):
    main(["--family", "meta", "--kind", "ffn", "--json"])
    cards = json.loads(capsys.readouterr().out)
    assert [card["name"] for card in cards] == models.names("meta", "ffn") and len(cards) > 2
    main(["gqa", "--json"])
    card = json.loads(capsys.readouterr().out)
    assert card == json.loads(json.dumps(models.card("gqa")))
    main(["gqa"])
    assert "https://arxiv.org/abs/2305.13245" in capsys.readouterr().out
    for words, said in (
        (["--kind", "mixxer"], "mixer"),
        (["--family", "metta"], "meta"),
        (["gqa", "--kind", "ffn"], "one architecture"),
    ):
        with pytest.raises(SystemExit, match=said) as error:
            main(words)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pattern,word",
    [
        ("gqa(heads=0)", "heads"),
        ("gqa(kv_heads=0)", "kv_heads"),
        ("gqa(window=-5)", "window"),
        ("gated_deltanet(key_heads=0)", "key_heads"),
        ("gated_deltanet(key_dim=-3)", "key_dim"),
        ("mamba_ssd(groups=0)", "groups"),
        ("mamba_ssd(state=0)", "state"),
        ("rwkv7(heads=0)", "heads"),
        ("mla(latent=0)", "latent"),
        ("lstm(hidden=-1)", "hidden"),
        ("gqa(positions=rope(theta=0))", "theta"),
        ("gqa(positions=rope(factor=0))", "factor"),
        ("gqa(positions=longrope(short=5))", "short"),
        ("gqa(heads=4,heads=8)", "twice"),
        ("gqa(heads=4,,)", "option=value"),
        ("gqa(heads=4)lstm", "cannot read"),
        ("0*gqa lstm", "cannot read"),
    ],
)
def test_a_value_that_cannot_be_is_named(pattern, word):
    with pytest.raises(ValueError, match=word) as error:
        models.build("decoder", pattern=pattern)
    assert "\n" not in str(error.value)


def test_one_place_is_not_given_twice():
    with pytest.raises(ValueError, match="pattern"):
        models.build("gqa", pattern="lstm")
