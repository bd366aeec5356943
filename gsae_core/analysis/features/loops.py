"""The compiled loops of the feature index.

Arrays are NumPy's, in C order. A loop over features works on those from `first` to `last` - 1, so
that threads may share the work; (d_sae + 1,) `offsets` say where each feature's firings begin in
`token` and `value` (nnz,), the strongest first.
"""

from functools import partial

import numpy as np

from gsae_core.sae.sparse.loops import BLOCK, compiled


# Every rounding where it is written, as torch rounds.
@partial(compiled, fastmath=False)
def split(ends, latent, h, rules, counts, near_row, near_latent, near_margin, gate_open):
    """Split found products into what fires and what nearly does; return how many of each.

    Args:
        ends: (rows,), the end of each row's products.
        latent, h: the products; what fires is written over them, f in place of h.
        rules: the vectors of `collect.Rules`, and the band.
        counts: (rows,), becomes how many fire.
        near_row, near_latent, near_margin: room for as many as there are products.
        gate_open: (d_sae,), added to.
    """
    opens, gain, bias, least, edge, band = rules
    n, n_near, start, zero = 0, 0, 0, h.dtype.type(0)
    for t in range(ends.shape[0]):
        before = n
        for e in range(start, ends[t]):
            i, product = latent[e], h[e]
            if product > opens[i]:
                gate_open[i] += 1
                f = product * gain[i] + bias[i]
                if f > least[i]:
                    latent[n], h[n] = i, f
                    n += 1
                    continue
            margin = min(product - edge[i], zero)
            if margin > band[i]:
                near_row[n_near], near_latent[n_near] = t, i
                near_margin[n_near] = margin
                n_near += 1
        counts[t] = n - before
        start = ends[t]
    return n, n_near


@compiled
def keep_largest(margin, heaps, floor):
    """Keep the largest of each column of `margin` (rows, d_sae) in its heap (d_sae, rank).

    The smallest of a heap is its first, and in `floor`; both are -inf before the first call.
    """
    d_sae, rank = heaps.shape
    for t in range(margin.shape[0]):
        row = margin[t]
        for start in range(0, d_sae, BLOCK):
            hits, stop = 0, min(start + BLOCK, d_sae)
            for j in range(start, stop):
                hits += row[j] > floor[j]
            if not hits:
                continue
            for j in range(start, stop):
                if row[j] > floor[j]:
                    _sink(heaps[j], row[j], rank)
                    floor[j] = heaps[j, 0]


@compiled
def _sink(heap, value, rank):
    """Put a value in the place of a heap's smallest."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= rank:
            break
        if child + 1 < rank and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@compiled
def largest_in_rows(h, sign, own, who, best):
    """Write each row's largest of sign h, best first; of equals the lower column is first.

    Args:
        own: as in `logit_effects.largest_in_rows`.
        who, best: (rows, k), become the columns and sign h there. Only what is above `best` is
            taken: -inf takes all.
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

    Args:
        row_offsets, latent: which features fire, token by token.
        fired: (d_sae,) in float64, firings on every `stride`-th token.
        who, both: (d_sae, k), become the features and on how many tokens both fire; who is -1
            before.
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
