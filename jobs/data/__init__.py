"""What to train on: text (documents -> tokenizer -> token shards), conversations or rows of tensors.

`prepare` gives a folder for a `Data`, `Chats` or `Arrays`; `index_of` says which sample n of a training run is;
`Loader` reads ahead.
"""

from cluster import folder
from jobs.data.arrays import ArrayIndex, Arrays
from jobs.data.chat import Chats
from jobs.data.config import Data
from jobs.data.index import Index
from jobs.data.packed import Packed
from jobs.data.shards import Prepared

__all__ = ["Arrays", "Chats", "Data", "Prepared", "index_of", "prepare"]


def prepare(data: Data | Arrays | Chats, quiet: bool = False) -> Prepared:
    """Finds or makes the prepared folder of some data in EDIFICE_HOME/data. ValueError for bad input."""
    from jobs.data import arrays, chat, shards

    if isinstance(data, Chats):
        return chat.prepare(data, quiet)
    return arrays.prepare(data) if isinstance(data, Arrays) else shards.prepare(data, quiet)


def index_of(prepared: Prepared, split: str, length: int, seed: int = 0) -> Index | ArrayIndex | Packed:
    """The samples of a split; `length` is the tokens in a row of text."""
    if "conversations" in folder.load(prepared.folder).meta:
        return Packed(prepared.folder, split, length, seed)
    if prepared.tokenizer:
        return Index(prepared.folder, split, length, seed)
    return ArrayIndex(prepared.folder, split, seed)
