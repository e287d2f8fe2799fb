"""The drafter that a setting names: off, ngram, medusa, mtp, or a run or model folder that drafts as a small model."""

from models.decoder import Decoder
from serve.speculative import Drafter

NAMES = ("off", "ngram", "medusa", "mtp")


def make(name: str, model: Decoder, max_rows: int, max_len: int) -> Drafter | None:
    """For an engine of `model` with so many rows of so many tokens. ValueError, one line, when it cannot be."""
    if name == "off":
        return None
    if name == "ngram":
        from serve.drafters.ngram import NGram

        return NGram()
    if name == "medusa":
        from serve.drafters.medusa import MedusaHeads

        return MedusaHeads(model)
    if name == "mtp":
        from serve.drafters.mtp import MTPHeads

        return MTPHeads(model, max_rows, max_len)
    from models import hub
    from serve.drafters.draft import DraftModel

    try:
        draft = hub.load(hub.locate(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"draft={name}: it is none of {', '.join(NAMES)}, and no model: {error}") from None
    if not isinstance(draft, Decoder) or not draft.causal or draft.config.vocab != model.config.vocab:
        raise ValueError(f"draft={name}: must be a causal decoder with the vocabulary of the model it drafts for")
    return DraftModel(draft.to(model.embedding.weight.device), max_rows, max_len)
