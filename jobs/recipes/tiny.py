"""Seconds on one core: a small hybrid on a sliver of the standard library, for tests and first tries."""

from jobs.config import Job
from jobs.data import Data
from jobs.optim import Optim
from models.decoder import Decoder


def recipe() -> Job:
    return Job(
        name="tiny",
        model=Decoder.Config(vocab=512, dim=32, layers=2, pattern="gated_deltanet gqa"),
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
