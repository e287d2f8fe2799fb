"""Random tiny models and a tiny tokenizer, trained here: nothing is downloaded."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

import models

TEXT = [
    "def f(x): return x + 1",
    "wer Gr\u00fc\u00dfe sagt, \u00e4\u00f6\u00fc",
    "\u4f60\u597d \u4e16\u754c",
    "for i in range(10): print(i)",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of about 300 tokens: most characters outside ASCII are split."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def decoder(tokenizer):
    """A hybrid over the tokenizer's vocabulary, with sharp logits: greedy text varies."""
    torch.manual_seed(0)
    model = models.build("decoder", vocab=tokenizer.get_vocab_size(), dim=32, layers=3, pattern="2*gated_deltanet gqa")
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


@pytest.fixture(scope="session")
def first_end():
    """Finds a seed whose completion, of temperature 3 and at most 30 tokens, is ended by a special token."""
    from serve.sampler import Sampling

    def first_end(engine, prompt: list[int], end: str):
        for start in range(0, 512, 64):
            samplings = [Sampling(max_tokens=30, temperature=3.0, seed=start + index) for index in range(64)]
            for index, result in enumerate(engine.generate([prompt] * 64, samplings)):
                if result.tokens[-1] == engine.tokenizer.token_to_id(end):
                    return start + index, result
        raise AssertionError(f"no completion ends with {end}")

    return first_end


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, decoder, tokenizer):
    """A run with one checkpoint, as a job leaves it."""
    from models import hub

    run = tmp_path_factory.mktemp("runs") / "tiny"
    hub.save(decoder, str(run / "checkpoints" / "step-00000010"), tokenizer.to_str().encode())
    return run
