"""Text to batches: documents -> tokenizer -> token shards -> index -> loader.

`prepare(Data(...))` gives a folder; `Index` says which tokens sample n of a training run has; `Loader`
reads ahead.
"""

from jobs.data.config import Data
from jobs.data.shards import Prepared, prepare

__all__ = ["Data", "Prepared", "prepare"]
