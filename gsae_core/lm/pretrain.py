"""Train the small language model that ships with the package, on the standard library's text.

    python -m gsae_core.lm.pretrain --out gsae_core/assets/stdlib-gpt2 --tokens 16000000

A 4-layer GPT-2 (d_model 256, context 256, byte-level BPE of 4096 tokens) in a plain Hugging Face
folder. Hidden matrices learn by Muon, the rest by AdamW; the split is by file (`stdlib.is_held_out`).
"""

import argparse
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gsae_core.lm.stdlib import stdlib_files

N_CTX = 256
VOCABULARY = 4096
END = "<|endoftext|>"


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCABULARY` tokens learnt from `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=N_CTX,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return one uint16 array: every text preceded by the end-of-text token."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([tokenizer.bos_token_id, *row], np.uint16) for row in rows])


def trigram_ce(train: np.ndarray, held_out: np.ndarray) -> float:
    """Return the held-out cross-entropy (nats per token) of an interpolated trigram model.

    Jelinek-Mercer mixing of trigram, bigram, add-one unigram and uniform counts with the weights
    of a grid search on the last tenth of `train`: as strong as counting gets without smoothing art.
    """
    cut = len(train) * 9 // 10
    counts, tune = [Counter(), Counter(), Counter()], train[cut:].tolist()
    ids = train[:cut].tolist()
    for n, counter in enumerate(counts, start=1):
        counter.update(zip(*(ids[i:] for i in range(n)), strict=False))
    context2 = Counter()
    for (a, b, _), count in counts[2].items():
        context2[a, b] += count
    total = sum(counts[0].values())

    def parts(tokens: list[int]) -> np.ndarray:
        rows = []
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            p3 = counts[2][a, b, c] / context2[a, b] if context2[a, b] else 0.0
            p2 = counts[1][b, c] / counts[0][b,] if counts[0][b,] else 0.0
            rows.append((p3, p2, (counts[0][c,] + 1) / (total + VOCABULARY), 1 / VOCABULARY))
        return np.array(rows)

    grid = [
        np.array([w3, w2, 0.99 - w3 - w2, 0.01])
        for w3 in np.arange(0.3, 0.9, 0.05)
        for w2 in np.arange(0.05, 0.6, 0.05)
        if w3 + w2 < 0.98
    ]
    tuning = parts(tune[:200_000])
    best = min(grid, key=lambda w: -np.log(tuning @ w).mean())
    return float(-np.log(parts(held_out.tolist()) @ best).mean())


@torch.no_grad()
def held_out_ce(model: GPT2LMHeadModel, tokens: np.ndarray) -> float:
    """Return the mean next-token loss (nats) over `tokens` in windows of `N_CTX`, BOS in front."""
    model.eval()
    total, n = 0.0, 0
    windows = torch.from_numpy(tokens[: len(tokens) // N_CTX * N_CTX].astype(np.int64))
    for ids in windows.view(-1, N_CTX).split(32):
        logits = model(ids).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        n += ids[:, 1:].numel()
    model.train()
    return total / n


def batches(tokens: np.ndarray, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield (batch_size, N_CTX + 1) windows for ever; each epoch shifts the cuts and reshuffles."""
    rng = np.random.default_rng(seed)
    while True:
        shift = int(rng.integers(N_CTX))
        n = (len(tokens) - shift - 1) // N_CTX
        order = rng.permutation(n)
        for rows in order[: n // batch_size * batch_size].reshape(-1, batch_size):
            starts = rows * N_CTX + shift
            yield torch.from_numpy(
                np.stack([tokens[s : s + N_CTX + 1] for s in starts]).astype(np.int64)
            )


def learning_rate_scale(step: int, n_steps: int, warmup: int = 60, decay: float = 0.4) -> float:
    """Warm-up, plateau, then a linear fall to 2 % over the last `decay` of the steps."""
    fall = (n_steps - step) / (decay * n_steps)
    return min(1.0, (step + 1) / warmup, max(0.02, fall))


def train(
    model: GPT2LMHeadModel, tokens: np.ndarray, held_out: np.ndarray, n_tokens: int, rows: int
) -> None:
    """Train `model` in place on `n_tokens` tokens in batches of `rows` windows."""
    hidden = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimisers = [
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
    ]
    peaks = [group["lr"] for o in optimisers for group in o.param_groups]
    n_steps, start, running = n_tokens // (rows * N_CTX), time.time(), None
    compiled = torch.compile(model)  # 1.7x on a CPU: fuses LayerNorm, GELU and the residual adds
    for step, window in zip(range(n_steps), batches(tokens, rows, seed=0), strict=False):
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * learning_rate_scale(step, n_steps)
        loss = loss_of(compiled, window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0 or step == n_steps - 1:
            speed = (step + 1) * rows * N_CTX / (time.time() - start)
            print(f"step {step}/{n_steps}  loss {running:.3f}  {speed:.0f} tokens/s", flush=True)
        if step % 200 == 199:
            print(f"held-out CE {held_out_ce(model, held_out[:65536]):.3f}", flush=True)
            model.save_pretrained(Path("/work/lm-ckpt"))


def loss_of(model: GPT2LMHeadModel, window: torch.Tensor) -> torch.Tensor:
    logits = model(window[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_000_000)
    parser.add_argument("--rows", type=int, default=32, help="windows of 256 tokens in a batch")
    args = parser.parse_args()
    torch.manual_seed(0)
    files = list(stdlib_files())
    tokenizer = train_tokenizer(f.text for f in files if not f.held_out)
    train_ids = encode(tokenizer, [f.text for f in files if not f.held_out])
    held_out_ids = encode(tokenizer, [f.text for f in files if f.held_out])
    print(f"{len(files)} files, {len(train_ids)} training and {len(held_out_ids)} held-out tokens", flush=True)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=N_CTX, n_embd=256, n_layer=4, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )
    start = time.time()
    train(model, train_ids, held_out_ids, args.tokens, args.rows)
    facts = {
        "held_out_ce": held_out_ce(model.half().float(), held_out_ids),
        "trigram_ce": trigram_ce(train_ids, held_out_ids),
        "train_tokens": len(train_ids), "held_out_tokens": len(held_out_ids),
        "tokens_seen": args.tokens, "hours": (time.time() - start) / 3600,
        "python": platform.python_version(), "perplexity": None,
    }
    facts["perplexity"] = math.exp(facts["held_out_ce"])
    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
