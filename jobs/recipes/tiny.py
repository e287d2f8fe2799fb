"""Seconds on one core: a small model on a sliver of the standard library, for tests and first tries.

`tiny` is a hybrid; `tiny:NAME` is any architecture for sequences, or a decoder with the part of that name.
"""

from jobs.config import Job
from jobs.data import Data
from jobs.optim import Optim
from models import registry
from models.decoder import Decoder

SIZES = {"vocab": 512, "dim": 32}  # an architecture brings as many layers as it needs


def recipe(architecture: str = "") -> Job:
    hybrid = Decoder.Config(**SIZES, layers=2, pattern="gated_deltanet gqa")
    return Job(
        name=f"tiny-{architecture}" if architecture else "tiny",
        model=registry.config_of(architecture, **SIZES) if architecture else hybrid,
        data=Data(vocab=512, limit_bytes=300_000, val_fraction=0.1),
        optim=Optim(lr=1e-2, warmup=5),
        steps=20,
        batch=8,
        length=64,
        workers=2,
        eval_every=10,
        eval_rows=16,
        save_every=5,
    )
