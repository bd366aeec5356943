"""The compiled loop that picks each row's largest latents while the row is in cache."""

import numpy as np

from gsae_core.sae.loops import BLOCK, compiled


@compiled
def _cut(latent, value, n, k):
    """Move the k largest of the first n entries to the front, in order; return the least of them.

    Of equal values the earlier ones stay.
    """
    least = np.partition(value[:n], n - k)[n - k]
    equals = k
    for e in range(n):
        equals -= value[e] > least
    kept = 0
    for e in range(n):
        equal = value[e] == least
        if value[e] > least or (equal and equals > 0):
            latent[kept], value[kept] = latent[e], value[e]
            kept += 1
            equals -= equal
    return least


@compiled
def pick_largest(h, b, k, latent, value, ends):
    """Write each row's k largest h + b, the positive ones alone; return how many entries there are.

    Latents ascend within a row, and of equal values those of lower latents are taken.

    Args:
        h: (rows, d_sae).
        b: (d_sae,), added to each row; -inf leaves a latent out.
        k: entries that a row may have, 1 or more.
        latent, value: room for rows * k entries.
        ends: (rows,), becomes the end of each row's entries.
    """
    n, whole, zero = 0, h.shape[1] // BLOCK * BLOCK, h.dtype.type(0)
    # All that exceeds the k-th largest so far; cut back to k whenever there are twice as many.
    room = 2 * k + BLOCK + 1
    some, best = np.empty(room, np.int64), np.empty(room, h.dtype)
    for t in range(h.shape[0]):
        row, least, m = h[t], zero, 0
        for start in range(0, whole, BLOCK):
            hits = 0
            for j in range(start, start + BLOCK):
                hits += row[j] + b[j] > least
            if hits:
                for j in range(start, start + BLOCK):
                    z = row[j] + b[j]
                    # Always written, kept only if it counts: no branch to mispredict.
                    some[m], best[m] = j, z
                    m += z > least
                if m > 2 * k:
                    least, m = _cut(some, best, m, k), k
        for j in range(whole, h.shape[1]):
            z = row[j] + b[j]
            some[m], best[m] = j, z
            m += z > least
        if m > k:
            _cut(some, best, m, k)
            m = k
        for e in range(m):
            latent[n + e], value[n + e] = some[e], best[e]
        n += m
        ends[t] = n
    return n
