"""The Ray Serve application.

    serve run serve.app:build model=RUN_OR_DIR[,RUN_OR_DIR...] [name=...] [predict=RUN_OR_DIR[,...]]

RUN is the name of a run under EDIFICE_HOME/runs or its folder, DIR a model folder, with engine=vllm also one of Hugging
Face's; a tokenizer_config.json or a chat_template.jinja in it says how chats become prompts and which further token
ends a completion. Replicas keep to the checkpoint that is the newest when this command runs. predict= names models that
answer whole inputs, under /predict/NAME (`serve.http.predictions`). Further arguments of each model, with defaults:

    replicas=1 most_replicas=        processes, and how many there may be when there is more to do
    cpus=1 gpus=0 stall=10           of each; seconds of a step after which it is wedged and replaced
    max_rows=32 waiting=256          completions computed together, and waiting beside them
    max_len=2048 memory_bytes=       tokens of prompt and completion; bytes of state, all that rows could need
    chunk=2048                       prompt tokens of a step at most (`serve.pace` says how many)
    draft=off                        what guesses tokens: ngram, medusa, mtp, or a small model (`serve.drafters`)
    prefix_cache=true isolated=false beginnings of prompts are computed once; not shared among API keys
    preempt=recompute                or offload: what happens to a completion whose memory another one needs
    dtype= weights=                  fp32 or bf16; int8 or int4 besides
    batch_invariant=false            the same bits whoever else is there and wherever a stream goes on; slow in company
    engine=edifice                   or vllm, for what it knows (`serve.vllm`)

`models=` takes a JSON list of tables with these instead, `gateways=1` says how many processes answer HTTP, `loaded=0`
how many models that came while the server runs (`serve.http.admin`) may be there at once, 0 for any number.

A gateway (`serve.replicas.gateway`) answers HTTP, replicas (`serve.replicas.replica`) hold one engine each.
most_replicas lets Ray Serve start more of them, up to so many, when there are more than max_rows requests for each.
EDIFICE_API_KEYS, comma separated, is read where this command runs; keys= names a file of keys with limits
(`serve.http.keys`).
"""

import json
import os
import re
import time
from hashlib import sha256
from typing import Any, Literal

from click import ClickException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from cluster import storage
from serve.replicas.directory import Directory, Model
from serve.replicas.gateway import Gateway
from serve.replicas.predictors import PredictReplica
from serve.replicas.replica import Replica

ENGINE = ("engine", "max_rows", "max_len", "memory_bytes", "chunk")  # what every engine takes
OURS = ("dtype", "weights", "draft", "prefix_cache", "isolated", "preempt", "batch_invariant")  # and ours


class Options(BaseModel):
    """Of one model; a command line gives them as text."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1)
    name: str = ""
    replicas: int = Field(1, ge=1)
    most_replicas: int | None = Field(None, ge=1)
    dtype: Literal["", "fp32", "bf16"] = ""
    weights: Literal["", "fp32", "bf16", "int8", "int4"] = ""
    max_rows: int = Field(32, ge=1)
    max_len: int = Field(2048, ge=1)
    memory_bytes: int | None = Field(None, ge=1)
    chunk: int = Field(2048, ge=1)
    draft: str = "off"
    prefix_cache: bool = True
    isolated: bool = False
    preempt: Literal["recompute", "offload"] = "recompute"
    batch_invariant: bool = False
    waiting: int = Field(256, ge=0)
    stall: float = Field(10, gt=0)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    engine: Literal["edifice", "vllm"] = "edifice"


class Arguments(Options):
    """Of `build`."""

    model: str = ""
    models: list[Options] = []
    gateways: int = Field(1, ge=1)
    loaded: int = Field(0, ge=0)
    keys: str = ""
    predict: str = ""


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run`. A wrong argument is one line, before Ray does anything."""
    from serve.http import keys

    arguments = _validated(Arguments, args)
    models = [located(options) for options in _models(arguments, args)]
    predicting = [(storage.split(each)[1], find(each)) for each in map(str.strip, arguments.predict.split(",")) if each]
    names = [name for name, _ in predicting] + [model.name for model, _ in models]
    if len(set(names)) < len(names):
        raise ClickException(f"models: {', '.join(names)}: each must have its own name; give them one with name=")
    try:
        known = keys.plain(os.environ.get("EDIFICE_API_KEYS", ""))
        known += keys.read(arguments.keys) if arguments.keys else []
    except ValueError as error:
        raise ClickException(f"keys={error}") from None
    directory = Directory.bind(arguments.loaded)
    gateway = Gateway.options(num_replicas=arguments.gateways)
    return gateway.bind(
        [model for model, _ in models],
        known,
        directory,
        [replicas(*each, directory) for each in models],
        {name: predictors(name, source, arguments) for name, source in predicting},
    )


def replicas(model: Model, options: Options, directory: Application | DeploymentHandle) -> Application:
    """Those of one model."""
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.most_replicas is not None:
        scaling["num_replicas"] = None
        scaling["autoscaling_config"] = AutoscalingConfig(
            min_replicas=options.replicas,
            max_replicas=max(options.replicas, options.most_replicas),
            target_ongoing_requests=options.max_rows,
            look_back_period_s=15,
            upscale_delay_s=10,
            downscale_delay_s=120,
            policy=AutoscalingPolicy(policy_function="serve.replicas.scaling:by_requests"),
        )
    deployment = Replica.options(
        name=f"Replica {label(model.name)}",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        **scaling,
    )
    names = (*ENGINE, *OURS) if options.engine == "edifice" else ENGINE
    engine = {name: getattr(options, name) for name in names}
    return deployment.bind(model, directory, options.waiting, options.stall, engine)


def predictors(name: str, source: str, options: Options) -> Application:
    """Those of a model that predicts."""
    deployment = PredictReplica.options(
        name=f"Predictor {label(name)}",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    return deployment.bind(
        source, {"max_rows": options.max_rows, "max_len": options.max_len, "waiting": options.waiting}
    )


def label(name: str) -> str:
    """Of a model, for Ray Serve, which makes file names of it."""
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return plain if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:8]}"


def located(options: Options) -> tuple[Model, Options]:
    """What is to be served. ClickException in one line when it is not there."""
    from serve import stored

    source = find(options.model)
    config = stored.stored(source).json("config.json")
    if stored.is_plain(source) and options.engine != "vllm":
        raise ClickException(f"model={options.model}: a Hugging Face folder is served with engine=vllm")
    vocab = config["vocab_size"] if stored.is_plain(source) else config["config"]["vocab"]
    name = options.name or storage.split(options.model)[1]
    return Model(name, source, vocab, options.max_len, options.engine, created=int(time.time())), options


def find(model: str) -> str:
    """The absolute path or URI of the newest checkpoint of a run or of a model folder. ClickException otherwise."""
    from models import hub
    from serve import stored

    places = [model if storage.is_uri(model) else os.path.abspath(os.path.expanduser(model))]
    if "/" not in model:
        places.append(storage.join(storage.home(), "runs", model))
    for place in places:
        try:
            newest = place if stored.is_plain(place) else hub.locate(place)
            if "config.json" in stored.stored(newest):
                return newest
        except (OSError, ValueError):
            continue
    raise ClickException(
        f"model={model}: neither a model folder nor a run with a complete checkpoint; looked in {' and '.join(places)}"
    )


def _models(arguments: Arguments, args: dict[str, Any]) -> list[Options]:
    """One for each model."""
    if arguments.predict and not (arguments.model or arguments.models):
        return []
    if bool(arguments.model) == bool(arguments.models):
        raise ClickException("model: name one, or several with commas; or give models=, a JSON list of tables")
    if arguments.models:
        return arguments.models
    common = {key: value for key, value in args.items() if key in Options.model_fields}
    return [_validated(Options, {**common, "model": model.strip()}) for model in arguments.model.split(",")]


def _validated(kind: type[BaseModel], args: dict[str, Any]) -> Any:
    try:
        if isinstance(args.get("models"), str):
            args = {**args, "models": json.loads(args["models"])}
        return kind.model_validate(args)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(kind.model_fields)
        raise ClickException(f"{name}: {first['msg']}; the arguments are name=value of {known}") from None
    except json.JSONDecodeError as error:
        raise ClickException(f"models: not JSON: {error}") from None
