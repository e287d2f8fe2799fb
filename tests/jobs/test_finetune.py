"""Finetuning: which tokens are learnt, how conversations fill rows, and a run that starts from another's weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given as having
from hypothesis import settings
from hypothesis import strategies as st
from test_pretrain import curve

from jobs import finetune, given, pretrain
from jobs.data import Chats, index_of, prepare, tokenizer
from jobs.data.chat import Form, messages
from jobs.data.packed import Packed, pack
from jobs.record import read
from models import hub

ANSWERS = {"red": "warm and loud", "blue": "cold, deep water", "green": "leaves after rain", "black": "no light at all"}
CHATS = [
    {"prompt": f"what is {name}?", "completion": answer}
    if number % 2
    else {
        "messages": [
            {"role": "system", "content": "you know colours"},
            {"role": "user", "content": f"what is {name}?"},
            {"role": "assistant", "content": answer},
        ]
    }
    for number in range(6)
    for name, answer in ANSWERS.items()
]
BASE = "tiny --workers 0 --steps 2 --batch 4 --length 48 --eval_rows 2 --data.vocab 300 --name base".split()
TUNE = "tiny --workers 0 --batch 8 --length 96 --eval_rows 4 --save_every 5 --eval_every 0".split()
TUNE += ["--optim.schedule", "constant", "--data.val_fraction", "0.2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The JSONL of CHATS, in an EDIFICE_HOME that has a pretrained run called base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDIFICE_HOME", str(tmp_path_factory.mktemp("home")))
        pretrain.main(BASE)
        place = tmp_path_factory.mktemp("corpus") / "chats.jsonl"
        place.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
        yield place


@pytest.fixture(scope="module")
def tokens(corpus):
    return tokenizer.parse(given.find("base").tokenizer)


def tune(corpus: Path, name: str, *options: str) -> Path:
    finetune.main([*TUNE, "--from", "base", "--data.path", str(corpus), "--name", name, *options])
    return pretrain.run_folder(name)


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_exactly_the_assistants_tokens_are_learnt(tokens):
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "so"},
    ]
    words = {
        text: tokenizer.encode_batch(tokens, [text])[0].tolist() for text in ("be brief", "hi", "yes", "why", "so")
    }
    expected = [("<|bos|>", False)]
    for message in chat:
        said = message["role"] == "assistant"
        expected += [(f"<|{message['role']}|>", False)]
        expected += [(token, said) for token in words[message["content"]]] + [("<|end|>", said)]
    expected += [("<|eos|>", True)]
    expected = [(tokens.token_to_id(token) if isinstance(token, str) else token, said) for token, said in expected]
    ((ids_N, learn_N),) = Form(tokens).encode([chat])
    assert list(zip(ids_N.tolist(), learn_N.tolist(), strict=True)) == expected
    assert len(expected) > 20, "some messages have to be of several tokens"
    ((_, without),) = Form(tokens).encode([chat[:-1]])
    assert not without[-1], "a conversation that ends with a question does not teach to end there"


def test_the_form_is_the_one_serving_prompts_with(tokens):
    from serve.template import Template

    chat = [{"role": "system", "content": "s <|end|> \u00e9"}, {"role": "user", "content": "a <|assistant|> b\n"}]
    ((ids_N, learn_N),) = Form(tokens).encode([[*chat, {"role": "assistant", "content": "yes"}]])
    prompt = Template(tokens).encode(chat)
    assert ids_N[: len(prompt)].tolist() == prompt
    assert not learn_N[: len(prompt)].any() and learn_N[len(prompt) :].all()
    assert (ids_N == tokens.token_to_id("<|assistant|>")).sum() == 1, "a spelling in a message is text"


BAD = {
    "[1]": "not a JSON object, but list",
    "{": "not a JSON object (",
    '{"text": "x"}': "needs 'messages', or 'prompt' and 'completion'; its fields: 'text'",
    '{"messages": "x"}': "messages has to be a list of objects",
    '{"messages": [{"role": "bot", "content": "x"}]}': "messages[0] has role 'bot'; use system, user, assistant",
    '{"messages": [{"role": "user"}]}': "messages[0] has no text",
    '{"messages": [{"role": "user", "content": "x"}]}': "no message of the assistant",
    '{"prompt": "x", "completion": 3}': "messages[1] has no text",
    '{"prompt": "x", "completion": "\\ud800"}': "messages[1] has half a surrogate pair",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named(line, corpus, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(CHATS[0]) + "\n\n" + line + "\n")
    place = given.keep_tokenizer(given.find("base").tokenizer)
    with pytest.raises(ValueError) as caught:
        prepare(Chats(path=str(tmp_path), tokenizer=place), quiet=True)
    assert str(caught.value).startswith(f"{tmp_path}/bad.jsonl:3: ") and BAD[line] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompt_and_completion_are_two_messages():
    chat = messages({"prompt": "p", "completion": "c", "id": 3}, "x")
    assert chat == [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]


# -- rows --------------------------------------------------------------------------------------------------------------


@having(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 80))
@settings(max_examples=50, deadline=None)
def test_packing_fits_everything_into_few_rows(sizes, length):
    rows = pack(dict(enumerate(sizes)), length)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    fills = [sum(sizes[number] for number in row) for row in rows]
    assert all(0 < fill <= length for fill in fills)
    assert all(a + b > length for a in fills[:1] for b in fills[1:]), "two rows that fit into one"


@pytest.fixture(scope="module")
def prepared(corpus):
    place = given.keep_tokenizer(given.find("base").tokenizer)
    return prepare(Chats(path=str(corpus), tokenizer=place, val_fraction=0.2), quiet=True)


def conversations(batch) -> list[tuple[tuple, tuple]]:
    """(ids, targets) of each conversation of a batch."""
    found = []
    for ids_T, targets_T, segments_T in zip(*(batch[n] for n in ("ids_BT", "targets_BT", "segments_BT")), strict=True):
        assert (targets_T[segments_T < 0] == -100).all()
        for segment in range(int(segments_T.max()) + 1):
            own = segments_T == segment
            found.append((tuple(ids_T[own].tolist()), tuple(targets_T[own].tolist())))
    return found


def test_every_conversation_is_whole_and_seen_once_an_epoch(prepared, tokens):
    expected = []
    for ids_N, learn_N in Form(tokens).encode([messages(chat, "x") for chat in CHATS]):
        targets = [token if learn else -100 for token, learn in zip(ids_N[1:].tolist(), learn_N[1:], strict=True)]
        expected.append((tuple(ids_N[:-1].tolist()), tuple(targets)))
    seen = []
    for split in ("train", "val"):
        index = index_of(prepared, split, 96, seed=4)
        assert isinstance(index, Packed) and index.cut == 0
        epochs = [index.rows(e * index.samples_per_epoch, index.samples_per_epoch) for e in range(3)]
        found = [sorted(conversations(epoch)) for epoch in epochs]
        assert found[0] == found[1] == found[2]
        if split == "train":
            assert not torch.equal(epochs[0]["ids_BT"], epochs[1]["ids_BT"]), "each epoch has its own order"
            assert index.samples_per_epoch < len(found[0]), "rows have to hold several conversations"
            pieces = [
                index_of(prepared, split, 96, seed=4).rows(n, 1)["ids_BT"] for n in range(len(epochs[0]["ids_BT"]))
            ]
            assert torch.equal(torch.cat(pieces), epochs[0]["ids_BT"])
        seen += found[0]
    assert sorted(seen) == sorted(expected)


def test_a_conversation_longer_than_a_row_loses_its_end(prepared):
    whole = index_of(prepared, "train", 96)
    size = max(len(ids) for ids, _ in conversations(whole.rows(0, whole.samples_per_epoch)))
    index = index_of(prepared, "train", size - 1)
    assert index.cut > 0
    cut = conversations(index.rows(0, index.samples_per_epoch))
    assert max(len(ids) for ids, _ in cut) == size - 1
    with pytest.raises(ValueError, match="length=4: no answer of the assistant begins within a row"):
        index_of(prepared, "train", 4)


def test_what_is_cut_is_said(corpus, capsys):
    tune(corpus, "short", "--steps", "1", "--length", "40")
    assert "conversations are longer than a row of 40 tokens and lose their end" in capsys.readouterr().out


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(corpus):
    return tune(corpus, "tuned", "--steps", "60")


def test_it_starts_from_the_given_weights_and_learns(tuned, prepared):
    base, stored = hub.load(str(pretrain.run_folder("base"))), json.loads((tuned / "config.json").read_text())
    assert stored["start"].endswith("runs/base/checkpoints/step-00000002")
    held_out = index_of(prepared, "val", 96)
    batch = held_out.rows(0, min(4, held_out.samples_per_epoch))
    with torch.no_grad():
        expected = float(base(batch)[0])
    values = [record["val_loss"] for record in read(tuned) if "val_loss" in record]
    assert math.isclose(values[0], expected, rel_tol=1e-6)
    assert values[-1] < 0.2 * values[0], values


def test_what_was_learnt_is_served_and_ends(tuned, tokens):
    from serve.load import load
    from serve.sampler import Sampling
    from serve.template import Template

    engine = load(str(tuned), max_rows=4, max_len=128)
    chat = Template.load(str(tuned), engine.tokenizer)
    prompts = [chat.encode([{"role": "user", "content": f"what is {name}?"}]) for name in ANSWERS]
    results = engine.generate(prompts, Sampling(max_tokens=40, temperature=0.0))
    assert [result.text for result in results] == list(ANSWERS.values())
    assert {result.reason for result in results} == {"stop"}


def test_it_goes_on_bit_for_bit_also_when_the_weights_it_began_with_are_gone(corpus, tmp_path):
    whole = tune(corpus, "whole", "--steps", "12")
    broken = tune(corpus, "broken", "--steps", "7")
    base = pretrain.run_folder("base")
    base.rename(base.with_name("elsewhere"))
    try:
        tune(corpus, "broken", "--steps", "12")
        with pytest.raises(SystemExit):
            tune(corpus, "other", "--steps", "12")
    finally:
        base.with_name("elsewhere").rename(base)
    ours = [record for record in curve(broken) if record["step"] != 7 or "loss" in record]
    assert ours == curve(whole)


def test_the_result_is_evaluated_and_reported(tuned, capsys):
    from jobs import evaluate

    capsys.readouterr()
    evaluate.main(["tuned", "--rows", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    last = [record for record in read(tuned) if "val_loss" in record][-1]
    assert math.isclose(found["nats_per_token"], last["val_loss"], rel_tol=1e-6)
    page = (tuned / "report.html").read_text()
    assert "&lt;|assistant|&gt;</mark>" in page and any(answer in page for answer in ANSWERS.values())


def test_pretraining_can_start_from_given_weights_too(corpus, capsys):
    options = ["--start", "base", "--name", "again", "--steps", "3"]
    pretrain.main([*BASE, *options])
    first = next(record for record in read(pretrain.run_folder("again")) if "val_loss" in record)
    last = [record for record in read(pretrain.run_folder("base")) if "val_loss" in record][-1]
    assert first["val_loss"] == last["val_loss"]


MISTAKES = {
    "--from base": "the first word has to be a recipe",
    "tinny --from base": "no recipe 'tinny'",
    "tiny": "--from is missing",
    "tiny --from": "--from: needs a run",
    "tiny --from nobody --data.path x": "no run of this name",
    "tiny --from base": "data.path is empty",
    "tiny --from base --data.path /nowhere": "does not exist",
    "tiny --from base --model.dim 64": "--model.dim: comes with --from",
    "tiny --from base --data.tokenizer x": "--data.tokenizer: comes with --from",
    "tiny --from base --data.field x": "unknown option --data.field",
    "PRETRAIN --start base --model.dim 64": "differs from the job's model in dim",
    "PRETRAIN --start base --data.vocab 310": "has another tokenizer than the corpus",
    "PRETRAIN --start nobody": "no run of this name",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(command, corpus, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        if command.startswith("PRETRAIN"):
            pretrain.main([*BASE, "--name", "wrong", *command.split()[1:]])
        else:
            finetune.main([*command.split(), "--workers=0", "--name=wrong"])
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("read", "encode"))]
    assert end.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    assert MISTAKES[command] in said[0]
    assert not pretrain.run_folder("wrong").exists()
