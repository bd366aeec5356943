"""Loops over the entries of a latent, the codes transposed: how weights get their gradients."""

import numpy as np

from gsae_core.sae.loops import compiled

# Latents whose sums are turned into columns together: a cache line of float32.
TILE = 16


@compiled
def add_rows_in_order(first, last, order, row, weight, dense, total):
    """Add to `total`, (width,), weight[order[k]] * dense[row[k]] for places first to last - 1."""
    k = first
    while k + 4 <= last:
        a, b, c, d = dense[row[k]], dense[row[k + 1]], dense[row[k + 2]], dense[row[k + 3]]
        p, q = weight[order[k]], weight[order[k + 1]]
        r, s = weight[order[k + 2]], weight[order[k + 3]]
        for j in range(total.shape[0]):
            total[j] += p * a[j] + q * b[j] + r * c[j] + s * d[j]
        k += 4
    while k < last:
        a, p = dense[row[k]], weight[order[k]]
        for j in range(total.shape[0]):
            total[j] += p * a[j]
        k += 1


@compiled
def sort_by_latent(row_offsets, latent, offsets, order, row):
    """Write the transpose of the codes: a counting sort, rows ascending within a latent.

    Args:
        row_offsets: (rows + 1,).
        latent, order, row: (nnz,).
        offsets: (d_sae + 1,), all zero before.
    """
    for e in range(latent.shape[0]):
        offsets[latent[e] + 1] += 1
    for i in range(1, offsets.shape[0]):
        offsets[i] += offsets[i - 1]
    for t in range(row_offsets.shape[0] - 1):
        for e in range(row_offsets[t], row_offsets[t + 1]):
            place = offsets[latent[e]]
            order[place], row[place] = e, t
            offsets[latent[e]] = place + 1
    for i in range(offsets.shape[0] - 1, 0, -1):
        offsets[i] = offsets[i - 1]
    offsets[0] = 0


@compiled
def sum_rows(first, last, offsets, order, row, weight, dense, out, add):
    """Write to out[i], for latents first to last - 1, its entries' sum of weight * dense[t].

    Args:
        first, last: latents.
        offsets, order, row: the transposed codes.
        weight: (nnz,) in the order of the codes themselves.
        dense: (rows, d_in).
        out: (d_sae, d_in).
        add: whether to add to what `out` holds.
    """
    for i in range(first, last):
        total = out[i]
        if not add:
            total[:] = 0
        add_rows_in_order(offsets[i], offsets[i + 1], order, row, weight, dense, total)


@compiled
def sum_rows_into_columns(first, last, offsets, order, row, weight, dense, out):
    """Write to out[:, i] what `sum_rows` writes to out[i]; out: (d_in, d_sae)."""
    width = dense.shape[1]
    tile = np.empty((TILE, width), dense.dtype)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        for k in range(n):
            total = tile[k]
            total[:] = 0
            add_rows_in_order(
                offsets[start + k], offsets[start + k + 1], order, row, weight, dense, total
            )
        for j in range(width):
            for k in range(n):
                out[j, start + k] = tile[k, j]


@compiled
def sum_entries(offsets, order, value, out):
    """Write to out[i] the sum of `value` over the entries of latent i.

    Args:
        offsets, order: the transposed codes.
        value: (nnz,) in the order of the codes themselves.
        out: (d_sae,), in the precision of the sum.
    """
    for i in range(out.shape[0]):
        total = out.dtype.type(0)
        for place in range(offsets[i], offsets[i + 1]):
            total += value[order[place]]
        out[i] = total
