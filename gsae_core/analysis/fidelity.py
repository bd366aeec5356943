"""What a language model loses when it reads reconstructions instead of activations.

Per batch of sequences: one clean pass, one with zeros at the site, one for each SAE. All share what
ran before the site, and the SAEs are measured on the very activations that they replace.

The zero pass sets every position of the site to zero, BOS, separators and padding included, as the
paper's numbers show: zeroing Gemma-7B's last residual stream costs 12.4534 nats there, and a
uniform guess ln 256000 = 12.4529.

Special positions (`mask` False) keep their clean activations in an SAE's pass: SAEs never train on
them, and a reconstruction of BOS's huge activation would drown what is measured. The paper does not
say what it did. With `replace="all"` they read reconstructions too, and an SAE that always answers
zero recovers exactly nothing. Either way neither losses nor metrics count them.
"""

import functools
import itertools
import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis.outliers import OutlierCount, Outliers, stats_of
from gsae_core.config import Positions, Site
from gsae_core.errors import InputError
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest, check_finite
from gsae_core.lm.model import LanguageModel, Splice
from gsae_core.sae.architectures import GatedSAE
from gsae_core.sae.base import SAE, Normalised, PerEntry, PerLatent, Rows
from gsae_core.sae.metrics import BatchStats, Metrics, stats_from_counts, sum_dtype
from gsae_core.sae.sparse.codes import SparseCodes, encode_sparse
from gsae_core.text import Progress
from gsae_core.threads import on_one_core, spread


class Reference:
    """The clean predictions of a batch, and their `losses` (n,) in nats where they count."""

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
        self._excess = _excess(self._p)
        self.losses: Float[Tensor, " n"] = self._losses(self._log_p, self._excess)

    def _losses(self, log_q: Tensor, excess: Tensor) -> Float[Tensor, " n"]:
        return (excess - log_q.gather(-1, self._targets)[..., 0])[self._counted]

    @torch.inference_mode()
    def compare(
        self, logits: Float[Tensor, "rows pos d_vocab"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return the loss and KL(clean || these) of every counted prediction, in nats."""
        log_q = logits[:, :-1].log_softmax(-1)
        excess = _excess(log_q.exp())
        losses = self._losses(log_q, excess)
        # The difference before the product: equal predictions diverge by exactly 0. In place, for
        # a vocabulary's width of memory traffic costs as much as a block of the model.
        torch.sub(self._log_p, log_q, out=log_q)
        return losses, (log_q.mul_(self._p).sum(-1) + (excess - self._excess))[self._counted]


def _excess(p: Float[Tensor, "rows predictions d_vocab"]) -> Float[Tensor, "rows predictions"]:
    """Return ln of what probabilities add up to: 0, but for the rounding of log_softmax.

    On a CPU it adds small terms to its largest one by one: where a model is sure of its guess it
    loses 6e-7 nats at 4,096 tokens and 3e-5 at 256,000, always with the same sign, so that no
    average removes it. `sum` adds in a tree. Taken off, 8e-8 are left.
    """
    return p.sum(-1).to(sum_dtype(p.device)).log()


# Logits computed at a time. On a CPU they should not leave the cache for long; a GPU wants work.
LOGITS_CPU, LOGITS_GPU = 2**22, 2**27
VECTORS_AT_ONCE = 2**12  # of a folder; bounds the latents of a batch that are in memory
TINY_GAP = 1e-6  # nats between two averages of float32 losses: less is rounding, not ablation


class Fidelity(NamedTuple):
    """Next-token losses in nats per token, averaged over the same predictions.

    A prediction counts when both the position it is made at and the token it predicts count.
    """

    ce_clean: float
    ce_sae: float
    """Loss when the model reads reconstructions."""
    ce_zero: float
    kl: float
    """KL(clean || spliced): nats that the model's predictions drifted, over all next tokens."""
    n_tokens: int
    """Predictions averaged; a sequence's last token predicts none."""

    @property
    def loss_recovered(self) -> float:
        """The share of what zero ablation costs that the SAE gives back; never clipped.

        (ce_zero - ce_sae) / (ce_zero - ce_clean), arXiv:2404.16014v2, Eq. 5. NaN where zero
        ablation costs less than `TINY_GAP`.
        """
        gap = self.ce_zero - self.ce_clean
        return math.nan if abs(gap) < TINY_GAP else (self.ce_zero - self.ce_sae) / gap


# Bins of |x|, 0.27 % wide, from 2^-32 to 2^32; what lies beyond is counted in the last ones.
BINS_PER_OCTAVE, OCTAVES = 256, 32
N_BINS = 2 * OCTAVES * BINS_PER_OCTAVE
N_DECILES = 10


class Decile(NamedTuple):
    """A tenth of the tokens, by |x|."""

    norm: float
    """|x|, averaged over tokens."""
    ratio: float
    """|x_hat| / |x|, averaged over tokens: below 1 also where x_hat only leaves something out."""
    gamma: float
    """Relative reconstruction bias: sum |x_hat|^2 / sum x . x_hat, Eq. 10."""


class NormDeciles:
    """Running sums in fine bins of |x|, and the ten tenths they are cut into in the end.

    They take 0.7 MB however many tokens there are. Where the edge of a tenth falls inside a bin,
    the bin's sums are shared out in proportion to the tokens on each side, so that every tenth has
    as many tokens; only the order of tokens within that bin is not known.
    """

    def __init__(self) -> None:
        # Of each bin: tokens, |x|, |x_hat| / |x|, |x_hat|^2 and x . x_hat.
        self.sums: Float64[Tensor, "5 bins"] = torch.zeros(5, N_BINS, dtype=torch.float64)

    @torch.no_grad()
    def add(self, *, x: Rows, x_hat: Rows) -> None:
        """Add a batch; tokens with x = 0, which have no ratio, are left out."""
        dtype = sum_dtype(x.device)
        lengths = [torch.linalg.vector_norm(each, dim=1, dtype=dtype) for each in (x, x_hat)]
        # Three numbers a token leave the device; the bins are summed on the CPU, in order.
        numbers = torch.stack([*lengths, (x * x_hat).sum(1, dtype=dtype)]).cpu().double()
        norm, norm_hat, dot = numbers[:, numbers[0] > 0]
        bins = ((norm.log2() + OCTAVES) * BINS_PER_OCTAVE).long().clamp(0, N_BINS - 1)
        columns = (torch.ones_like(norm), norm, norm_hat / norm, norm_hat.square(), dot)
        for total, weights in zip(self.sums, columns, strict=True):
            total += torch.bincount(bins, weights=weights, minlength=N_BINS)

    def deciles(self) -> list[Decile]:
        """Return the tenths, shortest activations first; none if no token was measured."""
        sums = self.sums.numpy()
        counts, *columns = sums[:, sums[0] > 0]
        if not len(counts):
            return []
        seen = np.concatenate([[0.0], np.cumsum(counts)])
        edges = np.linspace(0.0, seen[-1], N_DECILES + 1)

        def tenths(column: Float64[np.ndarray, " bins"]) -> list[float]:
            total = np.concatenate([[0.0], np.cumsum(column)])
            return np.diff(np.interp(edges, seen, total)).tolist()

        tokens = float(seen[-1]) / N_DECILES
        return [
            Decile(norm / tokens, ratio / tokens, power / dot if dot else math.nan)
            for norm, ratio, power, dot in zip(*map(tenths, columns), strict=True)
        ]


class Evaluation(NamedTuple):
    """One SAE on held-out sequences."""

    fidelity: Fidelity
    metrics: Metrics
    norms: NormDeciles
    outliers: Outliers | None = None
    """None where the median was not given."""


def fidelity(
    model: LanguageModel,
    saes: Sequence[SAE],
    sequences: SequenceSet,
    *,
    layer: int,
    site: Site,
    n_tokens: int,
    replace: Positions = "counted",
    median_norm: float | int | None = None,
    max_norm_ratio: float | int | None = None,
) -> list[Evaluation]:
    """Return what `evaluating`, which takes the same, returns in the end.

    Raises:
        InputError: if the model has no such layer or site, an SAE is of another width, an
            activation is not finite, or nowhere two counted tokens follow each other.
    """
    steps = evaluating(
        model,
        saes,
        sequences,
        layer=layer,
        site=site,
        n_tokens=n_tokens,
        replace=replace,
        median_norm=median_norm,
        max_norm_ratio=max_norm_ratio,
    )
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
    replace: Positions = "counted",
    median_norm: float | int | None = None,
    max_norm_ratio: float | int | None = None,
) -> Generator[Progress, None, list[Evaluation]]:
    """Yield how many counted tokens are done; return the evaluation of each SAE, in order.

    Losses are float32 within a token and float64 across, with one division at the end.

    Args:
        saes: take raw activations (any training scale folded in).
        sequences: held out; taken from the start, whole.
        n_tokens: counted tokens to stop after.
        replace: positions at which the model reads reconstructions.
        median_norm: median of |x| at the site, by which `outliers` are told; None: they are not.
        max_norm_ratio: leave tokens longer than so many medians out of the metrics; the model reads
            them as it reads special positions, and losses count them. None keeps all.
    """
    model.check(layer, site)
    # Of each batch the sums of clean losses, then of losses and divergences of each SAE and zeros.
    # Floats, not tensors: tensors that outlive a batch pin the heap between its large blocks, and
    # an evaluation on 65 k tokens that needs 0.7 GB grew to 4.2 GB (glibc).
    sums: list[list[float]] = []
    of_saes, outliers = [_Sums() for _ in saes], OutlierCount(median_norm, max_norm_ratio)
    n_done, n_predictions, total = 0, 0, min(n_tokens, sequences.n_tokens)
    on_cpu = model.device.type == "cpu"

    rows = max(1, (LOGITS_CPU if on_cpu else LOGITS_GPU) // (sequences.n_ctx * model.d_vocab))
    n = n_sequences(sequences, n_tokens)
    for start in range(0, n, rows):
        ids, mask = sequences[start : min(n, start + rows)]

        begin = functools.partial(Splice, model, ids, layer=layer, site=site)
        # Where the passes run that it is compared with: else the identity would differ in rounding.
        splice = on_one_core(begin) if on_cpu else begin()
        ids, mask = ids.to(model.device), mask.to(model.device)
        x = splice.x.flatten(0, 1) if replace == "all" else splice.x[mask]
        check_finite(x, layer=layer, site=site, dtype=model.dtype)
        reference, at = Reference(splice.logits, ids, mask), mask
        long = outliers.see(splice.x[mask])
        if outliers.left_out:
            at = mask.clone()
            at[mask], long = ~long, long[~long]

        def evaluated(
            i: int, splice=splice, at=at, long=long, reference=reference
        ) -> Sequence[Tensor]:
            if i == len(saes):
                return reference.compare(splice.run(torch.zeros_like(splice.x)))
            read = of_saes[i].measure(saes[i], splice.x, at, long, replace)
            return reference.compare(splice.run(read))

        # A thread an SAE costs a fifth less than products and sums that each wake every thread.
        found = spread(evaluated, len(saes) + 1, on=model.device)
        numbers = (reference.losses, *itertools.chain.from_iterable(found))
        sums.append([each.sum(dtype=sum_dtype(each.device)).item() for each in numbers])
        n_predictions += len(reference.losses)
        n_done += int(mask.sum())
        yield Progress("evaluating", min(n_done, total), total, "token")
    if not n_predictions:
        raise InputError(
            "expected sequences with two counted tokens in a row, got none to predict; "
            "give more text or a longer context"
        )
    means = [math.fsum(column) / n_predictions for column in zip(*sums, strict=True)]
    ce_clean, *losses, ce_zero, _ = means
    return [
        own.evaluation(Fidelity(ce_clean, ce, ce_zero, kl, n_predictions), outliers)
        for ce, kl, own in zip(losses[::2], losses[1::2], of_saes, strict=True)
    ]


def evaluating_vectors(
    saes: Sequence[SAE],
    harvest: Harvest,
    *,
    n_tokens: int,
    median_norm: float | int | None = None,
    max_norm_ratio: float | int | None = None,
) -> Generator[Progress, None, list[Evaluation]]:
    """Do what `evaluating` does where there is no language model: losses and KL are NaN.

    `harvest` is of the held-out split.
    """
    of_saes, outliers = [_Sums() for _ in saes], OutlierCount(median_norm, max_norm_ratio)
    n, n_done = n_sequences(harvest.sequences, n_tokens), 0
    total = min(n_tokens, harvest.sequences.n_tokens)
    for found in harvest.vectors(np.arange(n)):
        for x in found.split(VECTORS_AT_ONCE):
            long = outliers.see(x)
            n_done += len(x)
            if outliers.left_out:
                x, long = x[~long], long[~long]

            def evaluated(i: int, x=x, long=long) -> None:
                of_saes[i].add(saes[i], x, long)

            spread(evaluated, len(saes), on=harvest.device)
            yield Progress("evaluating", min(n_done, total), total, "vector")
    nothing = Fidelity(*[math.nan] * 4, n_tokens=0)
    return [own.evaluation(nothing, outliers) for own in of_saes]


class _Sums:
    """Running sums of an SAE, and those of the outliers among its activations."""

    def __init__(self) -> None:
        self._metrics, self._norms, self._of_outliers = Metrics(), NormDeciles(), Metrics()

    def add(self, sae: SAE, x: Rows, long: Bool[Tensor, " tokens"]) -> Rows:
        """Add raw activations, of which some are outliers; return their reconstructions."""
        x = x.to(sae.W_dec)
        x_hat, stats = reconstruct(sae, x)
        self._metrics.add(stats)
        self._norms.add(x=x, x_hat=x_hat)
        if long.any():
            self._of_outliers.add(stats_of(x=x[long], x_hat=x_hat[long]))
        return x_hat

    def measure(self, sae: SAE, x: Tensor, mask: Tensor, long: Tensor, replace: str) -> Tensor:
        """Add what `mask` has of x (rows, pos, d_in); return what the model reads instead of x."""
        x_hat = self.add(sae, x[mask], long)
        read = x.masked_scatter(mask[..., None], x_hat.to(x))
        if replace == "all" and not mask.all():
            others, _ = reconstruct(sae, x[~mask].to(x_hat))
            read = read.masked_scatter(~mask[..., None], others.to(x))
        return read

    def evaluation(self, fidelity: Fidelity, outliers: OutlierCount) -> Evaluation:
        """Return what the sums come to."""
        told = outliers.told(self._metrics, self._of_outliers)
        return Evaluation(fidelity, self._metrics, self._norms, told)


@torch.no_grad()
def reconstruct(sae: SAE, x: Rows, codes: SparseCodes | None = None) -> tuple[Rows, BatchStats]:
    """Return x_hat and the sums behind every metric, those of each latent included.

    Of an SAE that normalises its inputs all compare raw activations, save those of each latent:
    they weigh tokens alike, as the SAE sees them. `codes`: those of `x`, if known.
    """
    seen, gated = sae.normalised(x), isinstance(sae, GatedSAE)
    codes = encode_sparse(sae, x) if codes is None else codes
    u_hat, toward_error = decoded(sae, seen, codes)
    x_hat = seen.undo(u_hat)
    x_hat_gate = seen.undo(_decode(sae, codes, codes.gate)) if gated else None

    fires = codes.magnitude > 0
    latent, f = codes.latent[fires], codes.magnitude[fires].to(sum_dtype(x.device))

    def per_latent(entries: Float[Tensor, " n_fired"]) -> PerLatent:
        return entries.new_zeros(sae.d_sae).index_add_(0, latent, entries)

    power = per_latent(f * f) * sae.W_dec.square().sum(1)
    stats = stats_from_counts(
        x=x,
        x_hat=x_hat,
        x_hat_gate=x_hat_gate,
        fired=torch.bincount(latent, minlength=sae.d_sae),
        gate_open=torch.bincount(codes.latent, minlength=sae.d_sae) if gated else None,
    )
    aligned = power + per_latent(f * toward_error[fires])
    return x_hat, stats._replace(latent_power=power, latent_aligned=aligned)


@torch.no_grad()
def decoded(sae: SAE, seen: Normalised, codes: SparseCodes) -> tuple[Rows, PerEntry]:
    """Return u_hat, and <u - u_hat, W_dec_i> of each active entry."""
    with torch.enable_grad():
        f = codes.magnitude.detach().requires_grad_()
        u_hat = _decode(sae, codes, f)
    # Its derivative to the weights is the sampled product <., W_dec_i>.
    return u_hat.detach(), torch.autograd.grad(u_hat, f, seen.u - u_hat.detach())[0]


def _decode(sae: SAE, codes: SparseCodes, weight: PerEntry) -> Rows:
    """Return each row's sum of weight * W_dec[latent] over its entries, plus b_dec."""
    return sae.b_dec.detach() + F.embedding_bag(
        codes.latent,
        sae.W_dec.detach(),
        codes.row_offsets,
        mode="sum",
        per_sample_weights=weight,
        include_last_offset=True,
    )


def n_sequences(sequences: SequenceSet, n_tokens: int) -> int:
    """Return how many sequences are measured: up to the one in which token `n_tokens` is."""
    before = sequences.counts.cumsum() - sequences.counts
    return int((before < n_tokens).sum())
