"""A small vision transformer on scikit-learn's handwritten digits: over 97% of those held out, in a minute."""

from jobs.config import Job
from jobs.data import Arrays
from jobs.optim import Optim
from models.vision.vit import ViT


def recipe() -> Job:
    mixer = "gqa(heads=4,kv_heads=4,positions=nope,mask=full,bias=True,out_bias=True)"
    return Job(
        name="vit_digits",
        model=ViT.Config(
            size=8, patch=2, channels=1, classes=10, dim=64, layers=4, mixer=mixer, hidden=128, scale=1 / 16
        ),
        data=Arrays(source="digits"),
        optim=Optim(lr=2e-3, warmup=50, decay=0.05),
        steps=900,
        batch=32,
        length=1,
        workers=0,
        threads=1,
        eval_every=300,
        eval_rows=359,
        save_every=300,
    )
