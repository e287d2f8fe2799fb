"""A hybrid language model on Python's own source, start to finish in minutes on two cores."""

from jobs.config import Job
from jobs.data import Data
from jobs.optim import Optim
from models.decoder import Decoder


def recipe() -> Job:
    return Job(
        name="demo",
        model=Decoder.Config(vocab=1024, dim=256, layers=3, pattern="2*gated_deltanet gqa"),
        data=Data(vocab=1024),
        optim=Optim(lr=4e-3, warmup=30, schedule="linear", floor=0.0),
        steps=600,
        batch=8,
        length=256,
        engine="deepspeed",
        zero=2,
        workers=2,
        eval_every=100,
        eval_rows=64,
        save_every=100,
    )
