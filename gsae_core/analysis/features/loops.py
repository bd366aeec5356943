"""The compiled loops of the feature index.

Arrays are NumPy's, in C order. A loop over features works on those from `first` to `last` - 1, so
that threads may share the work; (d_sae + 1,) `offsets` say where each feature's firings begin in
`token` and `value` (nnz,), the strongest first.
"""

import numpy as np

from gsae_core.sae.sparse.loops import BLOCK, compiled


@compiled
def largest_in_rows(h, sign, own, who, best):
    """Write each row's largest of sign h, best first; of equals the lower column is first.

    `own` is as in `logit_effects.largest_in_rows`. `who` and `best` (rows, k) become the columns
    and sign h there; only what is above `best` is taken: -inf takes all.
    """
    k, columns = who.shape[1], h.shape[1]
    for t in range(h.shape[0]):
        row, mine = h[t], -1 if own < 0 else own + t
        floor = best[t, k - 1]
        for start in range(0, columns, BLOCK):
            hits, stop = 0, min(start + BLOCK, columns)
            for j in range(start, stop):
                hits += sign * row[j] > floor
            if not hits:
                continue
            for j in range(start, stop):
                score = sign * row[j]
                if score > floor and j != mine:
                    at = k - 1
                    while at > 0 and score > best[t, at - 1]:
                        best[t, at], who[t, at] = best[t, at - 1], who[t, at - 1]
                        at -= 1
                    best[t, at], who[t, at] = score, j
                    floor = best[t, k - 1]


@compiled
def scatter(latent, position, value, cursor, token, out):
    """Write some firings to `token` and `out` of all: the second half of a counting sort.

    `cursor` (d_sae,) says where each feature's next one goes, and is moved on.
    """
    for e in range(latent.shape[0]):
        at = cursor[latent[e]]
        token[at], out[at] = position[e], value[e]
        cursor[latent[e]] = at + 1


@compiled
def describe(first, last, offsets, value, sums, squares, histogram):
    """Write the sums of features' values and of their squares, and their histograms.

    The histogram (d_sae, bins) is zero before; edges are NumPy's linspace(0, max, bins + 1).
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
    """Write the vocabulary's tokens with most of each feature's summed value, and their shares.

    `ids` (positions,); `tokens` (d_sae, k) is -1 before.
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
            # Best first; of equals the lower token.
            at = k
            while at > 0 and (
                tokens[i, at - 1] < 0
                or share > shares[i, at - 1]
                or (share == shares[i, at - 1] and t < tokens[i, at - 1])
            ):
                at -= 1
            for rank in range(k - 1, at, -1):
                tokens[i, rank], shares[i, rank] = tokens[i, rank - 1], shares[i, rank - 1]
            if at < k:
                tokens[i, at], shares[i, at] = t, share


@compiled
def companions(first, last, offsets, token, row_offsets, latent, fired, stride, who, both):
    """Write who fires on the same tokens as each feature, by Jaccard index.

    `row_offsets` and `latent` say which features fire, token by token; `fired` (d_sae,), float64,
    counts firings on every `stride`-th token. `who`, -1 before, and `both` (d_sae, k) become the
    features and on how many tokens both fire.
    """
    k, d_sae = who.shape[1], fired.shape[0]
    counts, scores = np.zeros(d_sae, np.int32), np.zeros((1, d_sae))
    for i in range(first, last):
        if offsets[i] == offsets[i + 1]:
            continue
        counts[:] = 0
        for e in range(offsets[i], offsets[i + 1]):
            position = token[e]
            if position % stride:
                continue
            for r in range(row_offsets[position], row_offsets[position + 1]):
                counts[latent[r]] += 1
        for j in range(d_sae):
            # At most 1 below: a feature that is silent on these tokens shares none of them.
            scores[0, j] = counts[j] / max(fired[i] + fired[j] - counts[j], 1.0)
        # From 0: a feature that shares no token is no companion.
        largest_in_rows(scores, 1.0, i, who[i : i + 1], np.zeros((1, k)))
        for rank in range(k):
            if who[i, rank] >= 0:
                both[i, rank] = counts[who[i, rank]]
