"""/predict: every model that predicts, over HTTP, says what it says here."""

import asyncio
import base64
import json
import threading

import numpy
import pytest
import torch
from starlette.testclient import TestClient

import models
from serve import predict
from serve.http import tensors
from serve.http.api import create_app
from serve.http.served import Service
from serve.predict import Predictor
from serve.worker import Busy, Failed

NAMES = [name for name in models.names() if "predict" in models.card(name)["supports"]]


def make(name):
    torch.manual_seed(0)
    return models.build(name).eval()


def inputs_of(model, rows=3, length=7, seed=0, optional=False):
    """Random ones that `model` takes."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, wanted in model.takes().items():
        shape = (rows, *(length if size is None else size for size in wanted.shape))
        if wanted.dtype.is_floating_point:
            made[name] = torch.randn(shape, generator=generator)
        elif not wanted.optional:
            most = wanted.most if wanted.shape else length
            made[name] = torch.randint(wanted.least, most + 1, shape, generator=generator)
        elif optional:
            made[name] = torch.zeros(shape, dtype=torch.int64)
    return made


@pytest.fixture(scope="module")
def predictors():
    made = {name: Predictor(make(name)) for name in NAMES}
    yield made
    for each in made.values():
        each.stop()


@pytest.fixture(scope="module")
def http(predictors):
    return TestClient(create_app(Service({}, predictors=predictors)), client=("127.0.0.1", 1))


def decode(told):
    data = numpy.frombuffer(base64.b64decode(told["base64"]), told["dtype"])
    return torch.tensor(data.reshape(told["shape"]))


@pytest.mark.parametrize("encoding", ["list", "base64"])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_that_predicts(http, name, encoding):
    model = make(name)
    for optional in (False, True):
        inputs = inputs_of(model, optional=optional)
        sent = {key: tensors.write(value, encoding) for key, value in inputs.items()}
        answer = http.post(f"/predict/{name}", json={"inputs": sent, "encoding": encoding})
        assert answer.status_code == 200, answer.text
        with torch.inference_mode():
            expected = model.predict(inputs)
        told = answer.json()["outputs"]
        assert told.keys() == expected.keys()
        for key, value in expected.items():
            got = torch.tensor(told[key]) if encoding == "list" else decode(told[key])
            assert got.shape == value.shape
            torch.testing.assert_close(got.to(value.dtype), value)


def test_what_can_be_sent_is_told(http):
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert cards.keys() >= set(NAMES)
    assert cards["vit"]["inputs"] == {
        "pixels_BCHW": {"dtype": "float32", "shape": ["rows", 1, 8, 8], "required": True},
    }
    assert cards["fnet"]["inputs"]["ids_BT"] == {
        "dtype": "int64",
        "shape": ["rows", "any"],
        "minimum": 0,
        "maximum": 64,
        "required": True,
    }
    assert http.get("/v1/models/vit").json() == cards["vit"] and cards["vit"]["predict"] == "/predict/vit"
    paths = http.get("/openapi.json").json()["paths"]
    assert "post" in paths["/predict/{name}"]


def test_only_the_outputs_that_are_wanted(http):
    inputs = {"pixels_BCHW": torch.zeros(2, 1, 8, 8).tolist()}
    answer = http.post("/predict/vit", json={"inputs": inputs, "outputs": ["labels_B"]}).json()
    assert (
        answer["model"] == "vit" and list(answer["outputs"]) == ["labels_B"] and len(answer["outputs"]["labels_B"]) == 2
    )


IMAGE = torch.zeros(1, 1, 8, 8).tolist()
WRONG = {
    "no inputs": ({"inputs": {}}, "inputs"),
    "missing": ({"inputs": {"labels_B": [1]}}, "'labels_B' is not known; the model takes pixels_BCHW"),
    "shape": ({"inputs": {"pixels_BCHW": [[1.0, 2.0]]}}, "has shape [1, 2], expected [rows, 1, 8, 8], none of them 0"),
    "ragged": ({"inputs": {"pixels_BCHW": [[1.0], [2.0, 3.0]]}}, "its lists differ in length or depth"),
    "texts": ({"inputs": {"pixels_BCHW": ["a"]}}, "must be lists of numbers"),
    "objects": ({"inputs": {"pixels_BCHW": [{"a": 1}]}}, "must be lists of numbers"),
    "holes": ({"inputs": {"pixels_BCHW": [None]}}, "must be lists of numbers"),
    "huge": ({"inputs": {"pixels_BCHW": [10**400]}}, "must be lists of numbers"),
    "no rows": ({"inputs": {"pixels_BCHW": []}}, "has shape [0], expected"),
    "too many": ({"inputs": {"pixels_BCHW": IMAGE * 65}}, "65 rows, at most 64 in one request"),
    "output": ({"inputs": {"pixels_BCHW": IMAGE}, "outputs": ["x"]}, "'x' is not known; the model has logits_BC"),
    "extra": ({"inputs": {"pixels_BCHW": IMAGE}, "seed": 1}, "seed: extra inputs are not permitted"),
    "not base64": ({"inputs": {"pixels_BCHW": {"base64": "!", "shape": [1], "dtype": "float32"}}}, "is not base64"),
    "bytes": (
        {"inputs": {"pixels_BCHW": {"base64": "AAAA", "shape": [2], "dtype": "float32"}}},
        "has 3 bytes, but [2] of float32 are 8",
    ),
    "dtype": (
        {"inputs": {"pixels_BCHW": {"base64": "AAAA", "shape": [2], "dtype": "object"}}},
        "should be 'float16', 'float32'",
    ),
    "negative": (
        {"inputs": {"pixels_BCHW": {"base64": "", "shape": [-1], "dtype": "float32"}}},
        "greater than or equal to 0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told(http, case):
    body, message = WRONG[case]
    answer = http.post("/predict/vit", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and "\n" not in error["message"]


def test_numbers_that_are_none(http):
    for text in ("NaN", "Infinity", "1e999"):
        body = json.dumps({"inputs": {"latents_BZ": [[0.0] * 8]}}).replace("0.0", text, 1)
        answer = http.post("/predict/gan", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
    made = tensors.write(torch.tensor([[1.0, float("nan")], [float("inf"), -1.0]]), "list")
    assert made == [[1.0, None], [None, -1.0]]


@pytest.mark.parametrize(
    "name, inputs, message",
    [
        ("fnet", {"ids_BT": [[1, 65]]}, "ids_BT: has numbers from 1 to 65, allowed are 0 to 64"),
        ("fnet", {"ids_BT": [[1.5]]}, "ids_BT: must be whole numbers"),
        (
            "fnet",
            {"ids_BT": [[1, 2]], "segments_BT": [[0]]},
            "segments_BT: has shape [1, 1], which differs from ids_BT's",
        ),
        (
            "fnet",
            {"ids_BT": [[1, 2]], "segments_BT": [[0, 0], [0, 0]]},
            "same number of rows, not ids_BT: 1, segments_BT",
        ),
        ("fnet", {"ids_BT": [[1] * 600]}, "a document has 600 tokens, length=512"),
        ("soft_moe", {"ids_BT": [[1, 2]], "segments_BT": [[0]]}, "segments_BT"),
        ("mixture_of_tokenizers", {"ids_BT": [[1, 2]], "segments_BT": [[0]]}, "segments_BT"),
        ("soft_moe", {"ids_BT": [[1] * 3000]}, "a row is 3000 long, at most 2048 is allowed"),
        (
            "encoder_decoder",
            {"ids_BT": [[1]], "source_BS": [[1, 2]], "source_count_B": [3]},
            "source_count_B: 3, but source_BS has 2 tokens",
        ),
        ("encoder_decoder", {"ids_BT": [[1]], "source_BS": [[1] * 65], "source_count_B": [65]}, "allowed are 0 to 64"),
        (
            "longformer",
            {"ids_BT": [[1, 2]], "global_BT": [[1]]},
            "global_BT: has shape [1, 1], which differs from ids_BT's",
        ),
    ],
    ids=str,
)
def test_what_a_model_refuses(http, name, inputs, message):
    answer = http.post(f"/predict/{name}", json={"inputs": inputs})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_unknown_names(http):
    answer = http.post("/predict/other", json={"inputs": {"x": [1]}})
    assert answer.status_code == 404 and "no model 'other' predicts here" in answer.json()["error"]["message"]


def test_those_that_come_together_are_computed_together():
    model = make("vit")
    held, free = threading.Event(), threading.Event()
    plain = model.predict

    def slow(inputs):  # the first call holds the thread while others come
        held.set()
        assert free.wait(10)
        return plain(inputs)

    model.predict = slow
    predictor = Predictor(model, max_rows=8, waiting=20)
    wanted = [inputs_of(model, rows=1 + index % 3, seed=index) for index in range(8)]

    async def ask():
        first = asyncio.create_task(predictor.predict(wanted[0]))
        await asyncio.to_thread(held.wait)
        others = [asyncio.create_task(predictor.predict(each)) for each in wanted[1:]]
        await asyncio.sleep(0)
        gone = asyncio.create_task(predictor.predict(wanted[0]))
        await asyncio.sleep(0)
        gone.cancel()
        free.set()
        return await asyncio.gather(first, *others)

    try:
        answers = asyncio.run(ask())
        for inputs, outputs in zip(wanted, answers):
            torch.testing.assert_close(outputs["logits_BC"], plain(inputs)["logits_BC"].detach())
        assert predictor.calls == 3, "one row; then 14 in two calls of at most 8"
    finally:
        predictor.stop()


def test_who_breaks_alone_ends_alone():
    model = make("vit")
    held, free, plain = threading.Event(), threading.Event(), model.predict

    def picky(inputs):
        held.set()
        assert free.wait(10)
        if (inputs["pixels_BCHW"] == 13).any():
            raise RuntimeError("thirteen")
        return plain(inputs)

    model.predict = picky
    predictor = Predictor(model, waiting=3)
    good, bad = inputs_of(model, seed=1), {"pixels_BCHW": torch.full((1, 1, 8, 8), 13.0)}

    async def ask():
        first = asyncio.create_task(predictor.predict(good))
        await asyncio.to_thread(held.wait)
        others = [asyncio.create_task(predictor.predict(each)) for each in (good, bad)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await predictor.predict(good)
        free.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    one, two, three = asyncio.run(ask())
    assert torch.equal(one["logits_BC"], two["logits_BC"]) and str(three) == "thirteen"
    predictor.stop()
    with pytest.raises(Failed, match="shut down"):
        asyncio.run(predictor.predict(good))


def test_a_folder_is_loaded(tmp_path, model_folder):
    from models import hub

    hub.save(make("gan"), str(tmp_path / "gan"))
    predictor = predict.load(str(tmp_path / "gan"), max_rows=2)
    try:
        told = asyncio.run(predictor.predict({"latents_BZ": torch.zeros(2, 8)}))
        assert told["pixels_BCHW"].shape == (2, 1, 8, 8)
    finally:
        predictor.stop()
    with pytest.raises(ValueError, match="language model"):
        predict.load(str(model_folder))
