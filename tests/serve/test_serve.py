"""A real Ray Serve replica, started once, through the official OpenAI client over HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import models
from cluster import session
from models import hub
from serve.engine import Engine
from serve.sampler import Sampling
from serve.template import Template

KEY = "secret"
MAX_LEN = 6000  # a completion of this length takes far longer than any test waits


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A model that predicts; the name of its folder is that of no process of others."""
    folder = tmp_path_factory.mktemp("models") / f"gan{os.getpid()}"
    hub.save(models.build("gan"), str(folder))
    return folder


@pytest.fixture(scope="module")
def url(model_folder, images):
    """The address of a server with two rows."""
    import ray
    from ray import serve

    from serve.app import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = os.environ.get("EDIFICE_API_KEYS")
    os.environ["EDIFICE_API_KEYS"] = f"other, {KEY}"
    session.serving()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = {"model": str(model_folder), "max_rows": "2", "max_len": str(MAX_LEN), "waiting": "20"}
        args |= {"predict": str(images), "cpus": "0.5"}
        serve.run(build(args), name="tiny", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        if before is None:
            del os.environ["EDIFICE_API_KEYS"]
        else:
            os.environ["EDIFICE_API_KEYS"] = before
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def engine(decoder, tokenizer):
    """What the server should say, computed here."""
    return Engine(decoder, tokenizer, max_len=MAX_LEN)


def test_it_answers_what_the_engine_says(client, engine):
    assert [model.id for model in client.models.list()][0] == "tiny"
    answer = client.completions.create(model="tiny", prompt="def f", max_tokens=30, seed=4)
    expected = engine.generate(["def f"], Sampling(max_tokens=30, seed=4))[0]
    assert answer.choices[0].text == expected.text and answer.choices[0].finish_reason == expected.reason
    assert answer.usage.prompt_tokens == len(engine.prompts.encode("def f"))
    assert answer.usage.completion_tokens == len(expected.tokens)


def test_streams_add_up_and_tell_their_usage(client, url):
    options = {"model": "tiny", "prompt": "for", "max_tokens": 400, "seed": 9, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 10  # some tokens may go out together
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 400
    body = {"model": "tiny", "prompt": "for", "max_tokens": 3, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.read().decode().endswith("data: [DONE]\n\n")


def test_chats(client, engine, tokenizer):
    messages = [{"role": "system", "content": "return"}, {"role": "user", "content": "def f<|end|>"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 30, "seed": 4, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(**options, n=2, logprobs=True)
    samplings = [Sampling(max_tokens=30, seed=seed, logprobs=0, ignore_eos=True) for seed in (4, 5)]
    expected = engine.generate([Template(tokenizer).encode(messages)] * 2, samplings)
    for choice, result in zip(answer.choices, expected):
        assert choice.message.content == result.text
        values = [each.logprob for each in choice.logprobs.content]
        assert values == pytest.approx([each.token for each in result.logprobs], abs=1e-4)
    options["max_tokens"] = 400
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert len(chunks) > 10 and chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_tokens_come_as_they_are_made(client):
    options = {"model": "tiny", "prompt": "a", "max_tokens": 400, "extra_body": {"ignore_eos": True}, "seed": 1}
    times = [time.monotonic()]
    for _ in client.completions.create(**options, stream=True):
        times.append(time.monotonic())
    assert times[1] - times[0] < 0.3 * (times[-1] - times[0])


def test_stop_texts(client):
    options = {"model": "tiny", "prompt": "def f", "max_tokens": 60, "seed": 3, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[9:12]
    for stream in (False, True):
        answer = client.completions.create(**options, stop=["never there", stop], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_errors_are_openais(client, url):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="together at most 6000 are allowed"):
        client.completions.create(model="tiny", prompt="a", max_tokens=MAX_LEN)
    with pytest.raises(openai.BadRequestError, match="top_p: input should be"):
        client.completions.create(model="tiny", prompt="a", top_p=2, stream=True)
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.RateLimitError, match="try again later") as busy:
        slow = {"model": "tiny", "prompt": "a", "max_tokens": 5000, "extra_body": {"ignore_eos": True}, "stream": True}
        with client.completions.create(**slow, n=20) as stream:
            next(iter(stream))
            client.completions.create(model="tiny", prompt="a", n=3)
    assert busy.value.response.headers["Retry-After"] == "1"
    with pytest.raises(openai.NotFoundError, match="GET /v1/nothing: Not Found"):
        client.get("/nothing", cast_to=object)
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert json.loads(answer.read()) == {"status": "ok"}


def test_eight_at_once_get_what_they_would_get_alone(client, engine):
    def ask(seed: int) -> str:
        stream = client.completions.create(model="tiny", prompt=[5] * (seed + 1), max_tokens=25, seed=seed, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(16)))
    results = engine.generate([[5] * (s + 1) for s in range(16)], [Sampling(max_tokens=25, seed=s) for s in range(16)])
    assert texts == [result.text for result in results]


def scrape(url: str) -> dict[str, float]:
    """Series by name, or name and reason."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.labels["model_name"] == "tiny"]
    return {f"{sample.name} {sample.labels.get('finished_reason', '')}".strip(): sample.value for sample in samples}


def test_metrics(client, url):
    before = scrape(url)["edifice_generation_tokens_total"]
    client.completions.create(model="tiny", prompt="a", max_tokens=3, extra_body={"ignore_eos": True})
    assert scrape(url)["edifice_generation_tokens_total"] == before + 3
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/metrics")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_free_their_rows(client, url, stream, chat):
    """Both rows would be taken for many seconds, and then their completions would not be counted as cancelled."""
    slow = {"model": "tiny", "n": 2, "max_tokens": 5900, "extra_body": {"ignore_eos": True}}
    slow |= {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    cancelled, running = "edifice_request_success_total cancelled", "edifice_num_requests_running"
    before = scrape(url)[cancelled]

    def ask(client, **options):
        return (client.chat.completions if chat else client.completions).create(**slow, **options)

    if stream:
        with ask(client, stream=True) as chunks:
            next(iter(chunks))
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.7))
    start = time.monotonic()
    while (found := scrape(url))[cancelled] < before + 2 or found[running]:
        assert time.monotonic() - start < 120
        time.sleep(0.05)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=5).choices


def test_wrong_arguments_are_one_line_before_ray_starts(tmp_path, model_folder):
    from serve.app import build

    for args, message in [
        ({}, r"model: name one, or several with commas"),
        ({"model": "x", "models": "[]", "name": ""}, r"looked in"),
        ({"models": "[{"}, r"models: not JSON"),
        ({"models": '[{"model": "x", "rows": 3}]'}, r"models.0.rows: Extra inputs"),
        (
            {"model": "x", "rows": 3},
            r"rows: Extra inputs are not permitted; the arguments are name=value of model, name",
        ),
        ({"model": f"{model_folder},{model_folder}"}, r"tiny, tiny: each must have its own name"),
        ({"model": str(model_folder), "keys": "nowhere"}, r"keys=nowhere: not a file of"),
        ({"model": "x", "max_rows": "many"}, r"max_rows: Input should be a valid integer"),
        ({"model": str(tmp_path)}, r"model=.*: neither a model folder nor a run with a complete checkpoint"),
        ({"model": str(tmp_path / "none")}, r"model=.*: neither a model folder nor a run"),
    ]:
        with pytest.raises(Exception, match=message) as error:
            build(args)
        assert "\n" not in str(error.value)
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "serve"), "run", "serve.app:build", "model=no-such-run"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^Error: model=no-such-run: neither a model folder nor a run", done.stderr, re.MULTILINE)


def test_a_run_can_be_named(model_folder, tmp_path, monkeypatch):
    from serve.app import find

    home = tmp_path / "home"
    (home / "runs").mkdir(parents=True)
    (home / "runs" / "mine").symlink_to(model_folder)
    monkeypatch.setenv("EDIFICE_HOME", str(home))
    step = "checkpoints/step-00000010"  # the newest now: a replica that starts later has the same weights
    assert find("mine") == str(home / "runs" / "mine" / step)
    assert find(str(model_folder)) == str(model_folder / step)


def test_one_completion_on_the_command_line(model_folder, engine):
    command = [
        sys.executable,
        "-m",
        "serve.generate",
        str(model_folder),
        "--prompt",
        "def f",
        "--seed",
        "4",
        "--max-tokens",
        "12",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = engine.generate(["def f"], Sampling(max_tokens=12, temperature=0.8, seed=4))[0]
    assert done.stdout == f"def f{expected.text}\n"
    command[3] = "no-such-run"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "no-such-run" in done.stderr


def test_a_model_that_predicts(url, images):
    """Also after its replica was killed."""
    import torch

    def ask(body):
        request = urllib.request.Request(
            f"{url}/predict/{images.name}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return torch.tensor(json.load(answer)["outputs"]["pixels_BCHW"])

    latents_BZ = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hub.load(str(images)).predict({"latents_BZ": latents_BZ})["pixels_BCHW"]
    body = {"inputs": {"latents_BZ": latents_BZ.tolist()}}
    torch.testing.assert_close(ask(body), expected)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask({"inputs": {"latents_BZ": [[0.0] * 8] * 3}})
    assert refused.value.code == 400 and "3 rows, at most 2" in refused.value.read().decode()
    for line in os.popen("ps -eo pid,args").read().splitlines():
        pid, name = line.split(maxsplit=1)
        if name.startswith("ray::ServeReplica:tiny:Predictor") and images.name in name:
            os.kill(int(pid), signal.SIGKILL)
            break
    else:
        raise AssertionError("no process of the replica was found")
    torch.testing.assert_close(ask(body), expected)
