"""A model that somebody names: a run (by its name or folder), a model folder, or a Hugging Face checkpoint.

What it comes with is read here once: its config, its tokenizer and, for a run, the job that trained it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from cluster import folder, storage
from jobs.config import Job
from jobs.data import Prepared
from jobs.data import tokenizer as tokenizers
from models import hub
from models.config import from_json as model_from_json
from models.config import to_json as model_to_json
from models.model import Model


class Given(NamedTuple):
    """place: the folder with the weights. tokenizer: text of its tokenizer.json. job: as it is stored with a run."""

    place: str
    tokenizer: str | None
    job: dict[str, Any] | None


def find(name: str) -> Given:
    """What `name` means. ValueError, one line, when it is no model."""
    place = _place(name)
    hugging_face = _hugging_face(place)
    if hugging_face:
        file = hugging_face / "tokenizer.json"
        return Given(str(hugging_face), file.read_text() if file.exists() else None, None)
    try:
        place = hub.locate(place)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; give a run, its name, a model folder or a Hugging Face checkpoint") from None
    stored = folder.load(place)
    tokenizer = stored.text("tokenizer.json") if "tokenizer.json" in stored else None
    return Given(place, tokenizer, stored.meta.get("job"))


def load(found: Given) -> Model:
    """The model, in eval mode, in fp32."""
    model = hub.load_hf(found.place) if _hugging_face(found.place) else hub.load(found.place)
    return model.float()


def config(found: Given) -> Any:
    """The config of its architecture."""
    if _hugging_face(found.place):
        return load(found).config
    return model_from_json(folder.load(found.place).json("config.json"))


def fill(model: nn.Module, start: str, frozen: bool = False) -> None:
    """Gives `model` the weights of the run or model folder `start`. ValueError when they do not fit.

    frozen: the model may have another head, which then begins from the weights of that of `start`.
    """
    source = load(find(start))
    tensors = hub.weights(source)
    if frozen and source.config.head != model.config.head:
        own, added = hub.weights(model), tuple(f"head.{name}" for name in model.head.added)
        tensors = {name: x for name, x in tensors.items() if not name.startswith("head.") or name in own}
        tensors |= {name: x for name, x in own.items() if name.startswith(added)}
        hub.set_weights(model, tensors, start)
        model.head.begin()
    else:
        hub.set_weights(model, tensors, start)


def keep_tokenizer(text: str) -> str:
    """A file with this tokenizer.json that stays, also when the checkpoint it came with is replaced by a newer one."""
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    place = storage.join(storage.home(), "data", f"tokenizer-{name}.json")
    if storage.info(place) is None:
        storage.write(place, text.encode())
    return place


def check(job: Job, prepared: Prepared) -> None:
    """ValueError when the job's `start` is of another architecture, or the corpus is in tokens of another tokenizer."""
    found = find(job.start)
    theirs, ours = model_to_json(config(found)), model_to_json(job.model)
    if job.frozen and "head" in theirs["config"]:  # all but the head has to be the same
        theirs["config"]["head"] = ours["config"]["head"]
    if theirs != ours:
        names = [name for name in ours["config"] if ours["config"][name] != theirs["config"].get(name)]
        raise ValueError(
            f"start={job.start}: is a {theirs['model']} that differs from the job's model in "
            f"{', '.join(names) or 'its kind'}; it has {json.dumps(theirs['config'])}"
        )
    if found.tokenizer is None:
        return
    if tokenizers.parse(found.tokenizer).to_str() != tokenizers.load(prepared.tokenizer).to_str():
        raise ValueError(
            f"start={job.start}: has another tokenizer than the corpus; set --data.tokenizer to its tokenizer.json"
        )


def _place(name: str) -> str:
    """`name` itself, or the folder of the run called so."""
    if "/" in name or Path(name).exists():
        return name
    run = storage.join(storage.home(), "runs", name)
    if storage.info(run) is None:
        raise ValueError(f"{name}: there is no such folder, and no run of this name in {storage.split(run)[0]}")
    return run


def _hugging_face(place: str) -> Path | None:
    """The folder of a Hugging Face checkpoint; None when it is not one."""
    path = None if storage.is_uri(place) else Path(place)
    if path is None or (path / folder.MANIFEST).exists() or not (path / "config.json").is_file():
        return None
    return path if "model_type" in json.loads((path / "config.json").read_text()) else None
