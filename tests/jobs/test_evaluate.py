"""Evaluation says what training's own validation says, what transformers says, and the same for any form of a text."""

import json
import math
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from cluster import storage
from jobs import evaluate, pretrain
from jobs.data import Data, tokenizer
from jobs.data.documents import documents
from jobs.record import read
from models import hub

TEXTS = [f"document {i}: " + f"the cat number {i * i % 17} sat on mat {i}. \u00e9\n" * (i % 9 + 1) for i in range(80)]
SMALL = "--workers 0 --steps 6 --batch 4 --length 48 --eval_every 3 --eval_rows 20 --save_every 0 --data.vocab 300"
SMALL = ["tiny", *SMALL.split(), "--data.val_fraction", "0.3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDIFICE_HOME", str(tmp_path_factory.mktemp("home")))
        yield tmp_path_factory.mktemp("corpus")


def write(place: str, form: str) -> str:
    """TEXTS at a path or URI; returns the place."""
    if form == "jsonl":
        storage.write(place, "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    elif form == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": TEXTS}), sink)
        storage.write(place, sink.getvalue().to_pybytes())
    else:
        for number, text in enumerate(TEXTS):
            storage.write(storage.join(place, f"{number:03d}.txt"), text.encode())
    return place


@pytest.fixture(scope="module")
def run(home):
    """A run on JSONL behind a file:// URI."""
    place = write((home / "corpus.jsonl").as_uri(), "jsonl")
    assert place.startswith("file:///")
    pretrain.main([*SMALL, "--name", "jsonl", "--data.source", "jsonl", "--data.path", place])
    return pretrain.run_folder("jsonl")


def figures(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    evaluate.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_run_scores_what_its_own_validation_said(run, capsys):
    last = [record for record in read(run) if "val_loss" in record][-1]
    found = figures(capsys, "jsonl", "--rows", "20")
    assert found["rows"] == 20 and found["length"] == 48
    assert math.isclose(found["nats_per_token"], last["val_loss"], rel_tol=1e-7)
    assert math.isclose(found["bits_per_byte"], last["val_bits_per_byte"], rel_tol=1e-7)
    assert math.isclose(found["perplexity"], math.exp(last["val_loss"]), rel_tol=1e-6)
    by_folder = figures(capsys, str(run), "--rows", "20", "--batch", "3")
    assert math.isclose(by_folder["nats_per_token"], last["val_loss"], rel_tol=1e-5)


def truth(run, texts: list[str]) -> tuple[float, int]:
    """(nats, tokens) of each text alone in one pass."""
    model, place = hub.load(str(run)), hub.locate(str(run))
    tokens = tokenizer.load(f"{place}/tokenizer.json")
    bos, eos = (tokenizer.special(tokens, name) for name in ("<|bos|>", "<|eos|>"))
    nats = count = 0
    for ids in tokenizer.encode_batch(tokens, texts):
        ids_1T = torch.tensor([[bos, *ids.tolist(), eos]])
        with torch.no_grad():
            logits_1TC, _ = model.logits(ids_1T[:, :-1])
        nats += float(F.cross_entropy(logits_1TC[0].double(), ids_1T[0, 1:], reduction="sum"))
        count += ids_1T.shape[1] - 1
    return nats, count


@pytest.mark.parametrize("chunk", (7, 64, 4096))
def test_whole_documents_with_their_state_carried_are_documents_in_one_pass(run, home, capsys, chunk):
    nats, count = truth(run, TEXTS)
    place = home.as_uri() + "/corpus.jsonl"
    options = ("--carry", "--length", str(chunk), "--batch", "5")
    found = figures(capsys, str(run), "--data.source", "jsonl", "--data.path", place, *options)
    assert (found["documents"], found["tokens"]) == (len(TEXTS), count)
    assert math.isclose(found["nats_per_token"], nats / count, rel_tol=1e-5)
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert math.isclose(found["bits_per_byte"], nats / math.log(2) / found["bytes"], rel_tol=1e-5)


def test_one_long_row_is_whole_documents_and_short_rows_know_less(run, home, capsys):
    nats, count = truth(run, TEXTS)
    data = ("--data.source", "jsonl", "--data.path", str(home / "corpus.jsonl"))
    long = figures(capsys, "jsonl", *data, "--length", "20000")
    assert long["rows"] == 1 and long["tokens"] == count
    assert math.isclose(long["nats_per_token"], nats / count, rel_tol=1e-5)
    short = figures(capsys, "jsonl", *data, "--length", "3")
    assert short["tokens"] == count and short["bytes"] == long["bytes"]
    assert abs(short["nats_per_token"] - long["nats_per_token"]) > 1e-3
    part = figures(capsys, "jsonl", *data, "--length", "32", "--rows", "11")
    assert part["rows"] == 11 and part["tokens"] <= 11 * 32


def test_held_out_documents_are_the_ones_that_were_held_out(run, capsys):
    from jobs.config import from_json
    from jobs.data import prepare
    from jobs.data.index import Index

    index = Index(prepare(from_json(json.loads((run / "config.json").read_text())).data).folder, "val", 48)
    found = figures(capsys, "jsonl", "--carry")
    assert (found["documents"], found["tokens"]) == (index.documents, index.targets_per_epoch)


def test_every_form_and_place_of_a_text_gives_the_same_numbers(run, home, capsys):
    memory = f"fsspec+memory://{uuid.uuid4().hex}"
    places = {
        "jsonl": write(f"{memory}/a.jsonl", "jsonl"),
        "parquet": write((home / "a.parquet").as_uri(), "parquet"),
        "text": write(f"{memory}/texts", "text"),
    }
    found = []
    for form, place in places.items():
        assert [d.text for d in documents(Data(source=form, path=place))] == TEXTS
        found.append(figures(capsys, "jsonl", "--data.source", form, "--data.path", place))
    same = ("rows", "tokens", "bytes", "nats_per_token", "bits_per_byte")
    assert [[each[name] for name in same] for each in found[1:]] == [[found[0][name] for name in same]] * 2


def test_a_run_on_parquet_in_an_object_store_is_the_run_on_local_jsonl(run, home, capsys):
    """Names of documents, and with them the split, are of the file; so it gets the same one."""
    place = write(f"fsspec+memory://{uuid.uuid4().hex}/corpus.jsonl", "parquet")
    pretrain.main([*SMALL, "--name", "memory", "--data.source", "parquet", "--data.path", place])
    ours, theirs = read(pretrain.run_folder("memory")), read(run)
    names = ("step", "loss", "val_loss", "bits_per_byte")
    kept = [[{n: r[n] for n in names if n in r} for r in records] for records in (ours, theirs)]
    assert kept[0] == kept[1]


@pytest.fixture(scope="module")
def llama(home):
    """(transformers model, folder with it and a tokenizer that is not byte-level)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    words = sorted({word for text in TEXTS for word in text.split()})
    vocab = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokens = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.add_special_tokens(["<unk>", "<s>", "</s>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(home / "llama")
    tokens.save(str(home / "llama" / "tokenizer.json"))
    return theirs, tokens, home / "llama"


def test_a_hugging_face_checkpoint_scores_what_transformers_says(llama, home, capsys):
    theirs, tokens, place = llama
    nats = count = 0
    for text in TEXTS:
        ids_1T = torch.tensor([[1, *tokens.encode(text).ids, 2]])
        with torch.no_grad():
            nats += float(theirs(ids_1T, labels=ids_1T).loss) * (ids_1T.shape[1] - 1)
        count += ids_1T.shape[1] - 1
    data = ["--data.source", "jsonl", "--data.path", write(str(home / "hf.jsonl"), "jsonl")]
    data += ["--data.bos", "<s>", "--data.eos", "</s>"]
    for options in (["--carry"], ["--length", "20000"]):
        found = figures(capsys, str(place), *data, *options)
        assert found["tokens"] == count
        assert math.isclose(found["nats_per_token"], nats / count, rel_tol=1e-5)
        assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_bf16_is_close(run, capsys):
    ours, theirs = (figures(capsys, "jsonl", "--precision", p)["nats_per_token"] for p in ("bf16", "fp32"))
    assert ours != theirs and math.isclose(ours, theirs, rel_tol=1e-2)


def test_the_table_and_the_progress(run, capsys, monkeypatch):
    ticks = iter(range(0, 10_000, 3))
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(ticks))
    evaluate.main(["jsonl", "--rows", "16"])
    said = capsys.readouterr()
    assert "16 rows" in said.out and "perplexity" in said.out and "bits/byte" in said.out
    assert "evaluate: 8 of 16 rows" in said.err and "tokens/s" in said.err and "s left" in said.err


MISTAKES = {
    "": "the first word has to be a run",
    "--rows 3": "the first word has to be a run",
    "nobody": "no run of this name",
    "/nowhere/at/all": "neither a model folder nor a run",
    "jsonl --rows -1": "rows=-1: must be at least 0",
    "jsonl --batch 0": "batch=0: must be at least 1",
    "jsonl --rws 1": "unknown option --rws; did you mean --rows",
    "jsonl --data.source text": "path is empty",
    "jsonl --data.source text --data.path /nowhere": "does not exist",
    "BARE": "no tokenizer.json; give one with --data.tokenizer",
    "BARE --data.tokenizer RUN/tokenizer.json": "the model 64; give its own",
    "BOTH_WAYS": "not a causal decoder",
    "LLAMA": "the tokenizer has no special token '<|bos|>'; it has <unk>, <s>, </s>",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(command, run, llama, home, capsys):
    import models

    places = {"LLAMA": llama[2], "RUN": hub.locate(str(run)), "BARE": home / "bare", "BOTH_WAYS": home / "both"}
    if "BARE" in command:
        hub.save(models.build("decoder"), str(home / "bare"))
    if "BOTH" in command:
        hub.save(models.build("decoder", pattern="gqa(mask=full)"), str(home / "both"))
    arguments = _filled(command, places).split()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        evaluate.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
    assert MISTAKES[command] in said


def _filled(command: str, places: dict) -> str:
    for name, place in places.items():
        command = command.replace(name, str(place))
    return command
