"""Small tokenizers of each kind, made on the spot as the well-known ones are made; an LM on one."""

from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPTSw3Tokenizer, PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<unk>")


def _fast(tokenizer: Tokenizer) -> Any:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _numbered(*groups: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(chain(*groups)))}


def _bpe(words: list[str]) -> list[tuple[str, str]]:
    """Return merges that build each word from its left."""
    pairs = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    return list(dict.fromkeys(pairs))


def byte_level() -> Any:
    """GPT-2's, Llama 3's, Qwen's: every byte is a character of the vocabulary."""
    merges = _bpe(["Ġthe", "Ġpond", "the", "ĊĊ"])
    vocabulary = _numbered(
        list(SPECIAL), sorted(pre_tokenizers.ByteLevel.alphabet()), [a + b for a, b in merges]
    )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def _byte_fallback() -> Tokenizer:
    merges = _bpe(["▁the", "▁pond", "▁dad", "▁▁"])
    vocabulary = _numbered(
        list(SPECIAL),
        [f"<0x{byte:02X}>" for byte in range(256)],
        list("▁thepondat."),
        [a + b for a, b in merges],
    )
    return Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )


def llama_2() -> Any:
    """Llama 2's and Mistral's: a space is put in front of a text and taken off again."""
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(tokenizer)


def metaspace() -> Any:
    """Newer files of Mistral: as Llama 2's, by Metaspace, which puts no second space in front."""
    tokenizer = _byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(tokenizer)


def gemma() -> Any:
    """Gemma's: spaces are as they are, at a text's beginning too."""
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(tokenizer)


def unigram() -> Any:
    """T5's: SentencePiece's other model, words with a space in front."""
    words = [*SPECIAL, "▁the", "▁pond", "▁", "s", "▁dad", ".", "t", "h", "e"]
    model = models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=2)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _fast(tokenizer)


def sentencepiece(folder: Path) -> Any:
    """GPT-SW3's: SentencePiece itself, behind Python."""
    from sentencepiece import SentencePieceTrainer

    with (folder / "sp.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["the pond and the dad of the pond"] * 3),
            model_writer=file,
            model_type="bpe",
            vocab_size=290,
            byte_fallback=True,
            pad_id=3,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return GPTSw3Tokenizer(str(folder / "sp.model"), name_or_path="gpt-sw3-126m")


def word_piece() -> Any:
    """BERT's: a word's later parts have `##` in front, its first part nothing."""
    words = [*SPECIAL, "the", "pond", "##s", "##er", "dad", "."]
    tokenizer = Tokenizer(models.WordPiece(vocab=_numbered(words), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _fast(tokenizer)


def word_level() -> Any:
    """Whole words and no decoder: the library sets them apart by spaces."""
    tokenizer = Tokenizer(
        models.WordLevel(vocab=_numbered([*SPECIAL, "the", "pond", "dad"]), unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer)


def end_of_word() -> Any:
    """GPT-1's and CLIP's: a word's last part ends in `</w>`."""
    merges = [("t", "h"), ("th", "e</w>"), ("d", "a"), ("da", "d</w>")]
    parts = ["t", "h", "e", "d", "a", "t</w>", "h</w>", "e</w>", "d</w>", "a</w>"]
    vocabulary = _numbered(list(SPECIAL), parts, [a + b for a, b in merges])
    model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _fast(tokenizer)


def write_llama(folder: Path) -> Path:
    """Write a random Llama of two layers and context 64 that reads by `llama_2`; return where."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = llama_2()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    ends: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, **heads, **ends)
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        # It writes pieces of words, and no lone bytes.
        hf.lm_head.weight[: len(SPECIAL) + 256] = 0
        hf.lm_head.weight *= 20
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama_run(folder: Path) -> list[str]:
    """Return the words of `train` that make a run of it, `spaces`, in about a second."""
    (folder / "text.txt").write_text("the pond and the dad, the pond\n" * 200, encoding="utf-8")
    return [
        *("train", "--model", str(write_llama(folder / "llama")), "--device", "cpu"),
        *("--data", str(folder / "text.txt"), "--layer", "1", "--arch", "gated", "relu"),
        *("--sparsity", "0.05", "--width", "16", "--tokens", "320", "--batch-size", "32"),
        *("--eval-tokens", "64", "--lr-warmup-steps", "2", "--out", str(folder / "spaces")),
    ]
