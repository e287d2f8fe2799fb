"""A hybrid language model on Python's own source, start to finish in minutes on two cores."""

from jobs.config import Job
from jobs.data import Data
from jobs.optim import Optim
from models.decoder import Decoder


def recipe() -> Job:
    return Job(
        name="demo",
        model=Decoder.Config(vocab=2048, dim=192, layers=6, pattern="2*gated_deltanet gqa"),
        data=Data(vocab=2048, limit_bytes=20_000_000),
        optim=Optim(lr=4e-3, warmup=40, schedule="linear", floor=0.0),
        steps=900,
        batch=8,
        length=256,
        engine="deepspeed",
        zero=2,
        workers=2,
        eval_every=150,
        eval_rows=64,
        save_every=150,
    )
