"""What a language model loses when it reads reconstructions instead of activations.

Per batch of sequences: one clean pass, one with zeros at the site, one for each SAE. All share what
ran before the site, and the SAEs are measured on the very activations that they replace.

Special positions (BOS, separators, padding: `mask` False) keep their clean activations in every
pass, zero ablation included, and no loss is averaged there: SAEs never train on them, and a
reconstruction of BOS's huge activation would drown what is measured. The paper does not say what it
did. Zeroing the same positions that an SAE replaces makes "always zero" recover exactly nothing.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.corpus import SequenceSet, TokenBatch
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.architectures import GatedSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.codes import encode_sparse, weighted_sums
from gsae_core.sae.deciles import NormDeciles
from gsae_core.sae.metrics import BatchStats, Metrics, stats_from_counts, sum_dtype
from gsae_core.threads import spread

Losses = tuple[Tensor, Tensor]
"""Loss and divergence of every counted prediction of a batch, each (n,)."""

# Logits computed at a time. On a CPU they should not leave the cache for long; a GPU wants work.
LOGITS_CPU, LOGITS_GPU = 2**22, 2**27

# Rounding of float32 losses: a smaller gap between two averages is noise, not ablation.
TINY_GAP = 1e-6


class Fidelity(NamedTuple):
    """Next-token losses in nats per token, averaged over the same predictions.

    A prediction counts when both the position it is made at and the token it predicts count.
    """

    ce_clean: float
    """Loss of the untouched model."""

    ce_sae: float
    """Loss when the model reads reconstructions."""

    ce_zero: float
    """Loss when the model reads zeros."""

    loss_recovered: float
    """Share of what zero ablation costs that the SAE gives back; 1 is perfect, never clipped.

    (ce_zero - ce_sae) / (ce_zero - ce_clean), arXiv:2404.16014v2, Eq. 5. It may exceed 1 or be
    negative. NaN where zero ablation costs less than a millionth of a nat: nothing to recover."""

    kl: float
    """KL(clean || spliced): nats that the model's predictions drifted, whatever the next token."""

    n_tokens: int
    """Predictions averaged; a little below the activations measured, as a sequence's last token
    has nothing left to predict."""


class Evaluation(NamedTuple):
    """One SAE on held-out sequences: the language model's losses, and the SAE's own metrics."""

    fidelity: Fidelity
    metrics: Metrics
    norms: NormDeciles
    """Lengths of reconstructions, by the length of what they reconstruct."""


def loss_recovered(*, ce_clean: float, ce_sae: float, ce_zero: float) -> float:
    """Return (ce_zero - ce_sae) / (ce_zero - ce_clean), arXiv:2404.16014v2, Eq. 5; never clipped.

    NaN where |ce_zero - ce_clean| is below `TINY_GAP`: a ratio of rounding errors.
    """
    gap = ce_zero - ce_clean
    return math.nan if abs(gap) < TINY_GAP else (ce_zero - ce_sae) / gap


def fidelity(
    model: LanguageModel,
    saes: Sequence[SAE],
    sequences: SequenceSet,
    *,
    layer: int,
    site: Site,
    n_tokens: int,
) -> list[Evaluation]:
    """Return the evaluation of each SAE, in order. See `evaluating`, which also shows progress."""
    steps = evaluating(model, saes, sequences, layer=layer, site=site, n_tokens=n_tokens)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def evaluating(
    model: LanguageModel,
    saes: Sequence[SAE],
    sequences: SequenceSet,
    *,
    layer: int,
    site: Site,
    n_tokens: int,
) -> Generator[int, None, list[Evaluation]]:
    """Evaluate `saes`, yielding the counted tokens done so far; return what `fidelity` returns.

    Losses are float32 within a token and float64 across, with one division at the end.

    Args:
        model: the language model, read at `layer` and `site`.
        saes: take raw activations (any training scale folded in).
        sequences: held out; taken from the start, whole.
        layer: block number, from 0.
        site: where in the block.
        n_tokens: counted tokens to stop after; all of `sequences` if it has fewer.

    Raises:
        InputError: if the site does not exist, an SAE has another width, or nothing can be
            predicted.
    """
    model.check(layer, site)
    clean, zero = _Losses(), _Losses()
    spliced, metrics = [_Losses() for _ in saes], [Metrics() for _ in saes]
    norms = [NormDeciles() for _ in saes]
    n_done = 0
    for ids, mask in _batches(model, sequences, n_tokens):
        splice = model.splice(ids, layer=layer, site=site)
        ids, mask = ids.to(model.device), mask.to(model.device)
        x = splice.x[mask]
        reference = _Reference(splice.logits, ids, mask)
        clean.add(reference.losses, None)

        def compared(x_hat: Tensor, splice=splice, mask=mask, reference=reference) -> Losses:
            return reference.compare(splice.run(_replace(splice.x, mask, x_hat)))

        def evaluated(i: int, x=x, compared=compared) -> Losses:
            if i == len(saes):
                return compared(torch.zeros_like(x))
            x_hat, stats = reconstruct(saes[i], x.to(saes[i].W_dec))
            metrics[i].add(stats)
            norms[i].add(x=x.to(x_hat), x_hat=x_hat)
            return compared(x_hat.to(x))

        # A thread an SAE costs a fifth less than products and sums that each wake every thread.
        side_by_side = spread if model.device.type == "cpu" else _in_turn
        for losses, found in zip(
            [*spliced, zero], side_by_side(evaluated, len(saes) + 1), strict=True
        ):
            losses.add(*found)
        n_done += int(mask.sum())
        yield n_done
    if clean.n == 0:
        raise InputError(
            "expected sequences with two counted tokens in a row, got none to predict; "
            "give more text or a longer context"
        )
    return [
        Evaluation(_fidelity(clean, losses, zero), measured, lengths)
        for losses, measured, lengths in zip(spliced, metrics, norms, strict=True)
    ]


@torch.no_grad()
def reconstruct(
    sae: SAE, x: Float[Tensor, "batch d_in"]
) -> tuple[Float[Tensor, "batch d_in"], BatchStats]:
    """Return x_hat and the sums behind every metric, those of each latent included.

    Through the active entries alone: besides the encoder's product all costs O(active * d_in).
    """
    codes = encode_sparse(sae, x)
    gated = isinstance(sae, GatedSAE)
    with torch.enable_grad():
        value = codes.magnitude.detach().requires_grad_()
        decoded = weighted_sums(sae.W_dec.detach(), codes.latent, value, codes.row_offsets)
    x_hat = decoded.detach() + sae.b_dec
    # The product's own derivative is the sampled product <x - x_hat, W_dec_i> on active entries.
    (toward_error,) = torch.autograd.grad(decoded, value, x - x_hat)
    x_hat_gate = None
    if gated:
        gate = weighted_sums(sae.W_dec, codes.latent, codes.gate, codes.row_offsets)
        x_hat_gate = gate + sae.b_dec

    fires = codes.magnitude > 0
    latent, f = codes.latent[fires], codes.magnitude[fires].to(sum_dtype(x.device))

    def per_latent(entries: Float[Tensor, " n_fired"]) -> Float[Tensor, " d_sae"]:
        return entries.new_zeros(sae.d_sae).index_add_(0, latent, entries)

    power = per_latent(f * f) * sae.W_dec.square().sum(1)
    stats = stats_from_counts(
        x=x,
        x_hat=x_hat,
        x_hat_gate=x_hat_gate,
        fired=torch.bincount(latent, minlength=sae.d_sae),
        gate_open=torch.bincount(codes.latent, minlength=sae.d_sae) if gated else None,
        latent_power=power,
        latent_aligned=power + per_latent(f * toward_error[fires]),
    )
    return x_hat, stats


class _Losses:
    """Running float64 sums of losses and divergences; read once, at the end."""

    def __init__(self) -> None:
        # Floats, not tensors: tensors that outlive a batch pin the heap between its large blocks,
        # and an evaluation on 65 k tokens that needs 0.7 GB grew to 4.2 GB (glibc).
        self.n = 0
        self._ce: list[float] = []
        self._kl: list[float] = []

    def add(self, ce: Float[Tensor, " n"], kl: Float[Tensor, " n"] | None) -> None:
        self.n += len(ce)
        dtype = sum_dtype(ce.device)
        self._ce.append(ce.sum(dtype=dtype).item())
        if kl is not None:
            self._kl.append(kl.sum(dtype=dtype).item())

    @property
    def ce(self) -> float:
        return math.fsum(self._ce) / self.n

    @property
    def kl(self) -> float:
        return math.fsum(self._kl) / self.n


class _Reference:
    """The clean predictions of a batch, with which spliced ones are compared."""

    @torch.inference_mode()
    def __init__(
        self,
        logits: Float[Tensor, "rows pos d_vocab"],
        ids: Int64[Tensor, "rows pos"],
        mask: Bool[Tensor, "rows pos"],
    ) -> None:
        self._counted = mask[:, :-1] & mask[:, 1:]
        self._targets = ids[:, 1:, None]
        self._log_p = logits[:, :-1].log_softmax(-1)
        self._p = self._log_p.exp()
        self.losses = self._losses(self._log_p)

    def _losses(self, log_q: Float[Tensor, "rows predictions d_vocab"]) -> Float[Tensor, " n"]:
        return -log_q.gather(-1, self._targets)[..., 0][self._counted]

    @torch.inference_mode()
    def compare(
        self, logits: Float[Tensor, "rows pos d_vocab"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return the loss and KL(clean || these) of every counted prediction, in nats."""
        log_q = logits[:, :-1].log_softmax(-1)
        losses = self._losses(log_q)
        # The difference before the product: equal predictions diverge by exactly 0. In place, for
        # a vocabulary's width of memory traffic costs as much as a block of the model.
        torch.sub(self._log_p, log_q, out=log_q)
        return losses, log_q.mul_(self._p).sum(-1)[self._counted]


def _in_turn(task: Callable[[int], Losses], n: int) -> list[Losses]:
    return [task(i) for i in range(n)]


def _replace(
    x: Float[Tensor, "rows pos d_in"],
    mask: Bool[Tensor, "rows pos"],
    x_hat: Float[Tensor, "counted d_in"],
) -> Float[Tensor, "rows pos d_in"]:
    """Return x with its counted positions replaced."""
    return x.masked_scatter(mask[..., None], x_hat)


def _batches(model: LanguageModel, sequences: SequenceSet, n_tokens: int) -> Iterator[TokenBatch]:
    """Yield the sequences up to and including the one in which token `n_tokens` is counted."""
    if not len(sequences):
        return
    budget = LOGITS_CPU if model.device.type == "cpu" else LOGITS_GPU
    per_row = sequences[0:1].ids.shape[1] * model.d_vocab
    rows, left = max(1, budget // per_row), n_tokens
    for start in range(0, len(sequences), rows):
        ids, mask = sequences[start : start + rows]
        counts = mask.sum(1)
        begun = int((counts.cumsum(0) - counts < left).sum())
        if begun == 0:
            return
        yield TokenBatch(ids[:begun], mask[:begun])
        left -= int(counts[:begun].sum())


def _fidelity(clean: _Losses, sae: _Losses, zero: _Losses) -> Fidelity:
    return Fidelity(
        ce_clean=clean.ce,
        ce_sae=sae.ce,
        ce_zero=zero.ce,
        loss_recovered=loss_recovered(ce_clean=clean.ce, ce_sae=sae.ce, ce_zero=zero.ce),
        kl=sae.kl,
        n_tokens=clean.n,
    )
