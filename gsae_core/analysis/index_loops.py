"""The loops of the feature index, compiled: scatter by feature, statistics, companions.

Arrays are NumPy's, in C order; each loop releases the interpreter lock and works on a range of
features, so that threads may share the work.
"""

import numpy as np

from gsae_core.sae.loops import compiled


@compiled
def scatter(latent, place, value, cursor, token, out):
    """Write entries to where their feature's next one goes: the second half of a counting sort.

    Args:
        latent, place, value: (n,), entries in any order.
        cursor: (d_sae,), where each feature's next entry goes; moved on.
        token, out: of all entries.
    """
    for e in range(latent.shape[0]):
        at = cursor[latent[e]]
        token[at], out[at] = place[e], value[e]
        cursor[latent[e]] = at + 1


@compiled
def describe(first, last, offsets, value, sums, squares, histogram):
    """Write sums and histograms of features first to last - 1, whose values are sorted.

    Args:
        offsets: (d_sae + 1,).
        value: (nnz,), strongest first within a feature.
        sums, squares: (d_sae,) in float64: of the values, of their squares.
        histogram: (d_sae, bins), all zero before; edges are NumPy's linspace(0, max, bins + 1).
    """
    bins = histogram.shape[1]
    for i in range(first, last):
        start, stop = offsets[i], offsets[i + 1]
        if start == stop:
            continue
        top = np.float64(value[start])
        step = top / bins
        total, power = 0.0, 0.0
        for e in range(start, stop):
            v = np.float64(value[e])
            total += v
            power += v * v
            j = min(int(v / step), bins - 1)
            # The quotient rounds; the edges themselves decide.
            while j > 0 and v < j * step:
                j -= 1
            while j < bins - 1 and v >= (j + 1) * step:
                j += 1
            histogram[i, j] += 1
        sums[i], squares[i] = total, power


@compiled
def top_tokens(first, last, offsets, token, value, ids, n_vocabulary, tokens, shares):
    """Write the vocabulary's tokens on which features fire most, by summed activation.

    Args:
        ids: (places,).
        tokens: (d_sae, k), all -1 before.
        shares: (d_sae, k), their share of the feature's summed activation.
    """
    k = tokens.shape[1]
    sums, touched = np.zeros(n_vocabulary), np.empty(n_vocabulary, np.int64)
    for i in range(first, last):
        n, total = 0, 0.0
        for e in range(offsets[i], offsets[i + 1]):
            t = np.int64(ids[token[e]])
            if sums[t] == 0.0:
                touched[n] = t
                n += 1
            sums[t] += value[e]
            total += value[e]
        for c in range(n):
            t = touched[c]
            share = sums[t] / total
            sums[t] = 0.0
            _insert(tokens[i], shares[i], t, share, k)


@compiled
def companions(first, last, offsets, token, row_offsets, latent, fired, stride, who, both):
    """Write who fires on the same tokens as features first to last - 1, by Jaccard index.

    Args:
        token: (nnz,), of the feature-major codes.
        row_offsets, latent: the token-major codes.
        fired: (d_sae,), firings on every `stride`-th place.
        who: (d_sae, k), all -1 before.
        both: (d_sae, k), tokens on which both fire.
    """
    k, d_sae = who.shape[1], fired.shape[0]
    counts, touched = np.zeros(d_sae, np.int64), np.empty(d_sae, np.int64)
    scores = np.empty(k)
    for i in range(first, last):
        n = 0
        for e in range(offsets[i], offsets[i + 1]):
            place = token[e]
            if place % stride:
                continue
            for r in range(row_offsets[place], row_offsets[place + 1]):
                j = np.int64(latent[r])
                if counts[j] == 0:
                    touched[n] = j
                    n += 1
                counts[j] += 1
        scores[:] = 0.0
        for c in range(n):
            j = touched[c]
            if j != i:
                _insert(who[i], scores, j, counts[j] / (fired[i] + fired[j] - counts[j]), k)
        for rank in range(k):
            if who[i, rank] >= 0:
                both[i, rank] = counts[who[i, rank]]
        for c in range(n):
            counts[touched[c]] = 0


@compiled
def _insert(who, scores, candidate, score, k):
    """Put a candidate into a list kept best first; of equals the lower number is first."""
    at = k
    while at > 0 and (
        who[at - 1] < 0
        or score > scores[at - 1]
        or (score == scores[at - 1] and candidate < who[at - 1])
    ):
        at -= 1
    if at == k:
        return
    for rank in range(k - 1, at, -1):
        who[rank], scores[rank] = who[rank - 1], scores[rank - 1]
    who[at], scores[at] = candidate, score
