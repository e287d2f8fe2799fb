"""A small WGAN-GP on scikit-learn's handwritten digits, a minute on two cores; each side has its own AdamW."""

from jobs.config import Job
from jobs.data import Arrays
from jobs.optim import Optim
from models.generative.gan import GAN


def recipe() -> Job:
    return Job(
        name="gan_digits",
        model=GAN.Config(size=8, channels=1, width=8, latent=16, loss="wgan_gp", critic=2, scale=1 / 16, average=0.98),
        data=Arrays(source="digits"),
        optim=Optim(lr=2e-3, warmup=10, schedule="linear", beta1=0.0, decay=0.0, clip=0.0),
        steps=800,
        batch=64,
        length=1,
        workers=0,
        threads=1,
        eval_every=200,
        eval_rows=359,
        save_every=400,
    )
