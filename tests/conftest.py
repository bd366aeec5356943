"""A language model of two small random layers, saved as any Hugging Face folder is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gsae_core.lm.model import LanguageModel, load_model

WORDS = 38
"""Words of the tiny tokenizer, `w0` to `w37`; with <|endoftext|> (id 0) and <unk>, 40 tokens."""


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a word, split at spaces; BOS and EOS are token 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocab = {"<|endoftext|>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=end, eos_token=end, unk_token="<unk>"
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A GPT-2 with d_model 12, d_mlp 20, two layers, context 16 and a vocabulary of 40."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 20,
        "n_positions": 16,
    }
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **shape))
    with torch.no_grad():
        for parameter in hf.parameters():
            # Far from the start, where blocks do next to nothing and biases are zero.
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    hf.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_folder: Path) -> LanguageModel:
    """The model of `tiny_lm_folder`; share it, and leave its weights alone."""
    return load_model(str(tiny_lm_folder))
