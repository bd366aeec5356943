"""The loops over active entries that torch has no operator for, compiled for the CPU by numba.

Each releases the interpreter lock, so threads may share a batch, and takes NumPy arrays in C order.
The first call in a new installation compiles (a second or two a loop); the result is kept on disk.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

OPTIONS: dict[str, Any] = {
    "nogil": True,
    # Sums may be reordered, as in a matrix product; infinities and NaN are not assumed away.
    "fastmath": {"reassoc", "contract", "nsz"},
    # Python's own check for a zero divisor keeps a loop from being vectorised: ten times the time.
    "error_model": "numpy",
}

# Entries compared at once. Most blocks of a sparse row are empty and cost two instructions.
BLOCK = 32


def compiled(function: Callable[..., Any]) -> Any:
    """Return `function` compiled, from the disk where it was compiled before."""
    # Tests wrap every function in a type check, which numba can neither read nor needs.
    plain = inspect.unwrap(function)
    try:
        return njit(cache=True, **OPTIONS)(plain)
    except RuntimeError:
        # Neither the package's folder nor the user's can be written: compile in every process.
        return njit(**OPTIONS)(plain)


@compiled
def pick_above(h, above, latent, value, ends):
    """Write where h > above, row by row, and what h is there; return how many entries there are.

    Args:
        h: (rows, d_sae).
        above: (d_sae,), the threshold of each latent.
        latent, value: room for rows * d_sae entries; a few slots past the last one are written too.
        ends: (rows,), becomes the end of each row's entries.
    """
    n, whole = 0, h.shape[1] // BLOCK * BLOCK
    for t in range(h.shape[0]):
        row = h[t]
        for start in range(0, whole, BLOCK):
            hits = 0
            for j in range(start, start + BLOCK):
                hits += row[j] > above[j]
            if hits:
                for j in range(start, start + BLOCK):
                    # Always written, kept only if it counts: no branch to mispredict.
                    latent[n], value[n] = j, row[j]
                    n += row[j] > above[j]
        for j in range(whole, h.shape[1]):
            if row[j] > above[j]:
                latent[n], value[n] = j, row[j]
                n += 1
        ends[t] = n
    return n


@compiled
def add_rows(first, last, latent, weight, W, total):
    """Add to `total`, (width,), weight[e] * W[latent[e]] of entries first to last - 1.

    Four rows at a time: a sum is then read and written once for four products, and four rows are on
    their way from memory together. Half the time of one by one.
    """
    e = first
    while e + 4 <= last:
        a, b, c, d = W[latent[e]], W[latent[e + 1]], W[latent[e + 2]], W[latent[e + 3]]
        p, q, r, s = weight[e], weight[e + 1], weight[e + 2], weight[e + 3]
        for j in range(total.shape[0]):
            total[j] += p * a[j] + q * b[j] + r * c[j] + s * d[j]
        e += 4
    while e < last:
        a, p = W[latent[e]], weight[e]
        for j in range(total.shape[0]):
            total[j] += p * a[j]
        e += 1


@compiled
def add_rows_to_both(first, last, latent, m, g, W, out, aux):
    """`add_rows` of `m` to `out` and of `g` to `aux`, with each row read once."""
    e = first
    while e + 4 <= last:
        a, b, c, d = W[latent[e]], W[latent[e + 1]], W[latent[e + 2]], W[latent[e + 3]]
        p, q, r, s = m[e], m[e + 1], m[e + 2], m[e + 3]
        t, u, v, w = g[e], g[e + 1], g[e + 2], g[e + 3]
        for j in range(out.shape[0]):
            out[j] += p * a[j] + q * b[j] + r * c[j] + s * d[j]
            aux[j] += t * a[j] + u * b[j] + v * c[j] + w * d[j]
        e += 4
    add_rows(e, last, latent, m, W, out)
    add_rows(e, last, latent, g, W, aux)


@compiled
def dot_entries(first, last, latent, W, row, out):
    """Write <row, W[latent[e]]> to out[e] for entries first to last - 1, four at a time."""
    zero = row.dtype.type(0)
    e = first
    while e + 4 <= last:
        a, b, c, d = W[latent[e]], W[latent[e + 1]], W[latent[e + 2]], W[latent[e + 3]]
        p, q, r, s = zero, zero, zero, zero
        for j in range(row.shape[0]):
            p += row[j] * a[j]
            q += row[j] * b[j]
            r += row[j] * c[j]
            s += row[j] * d[j]
        out[e], out[e + 1], out[e + 2], out[e + 3] = p, q, r, s
        e += 4
    while e < last:
        a, p = W[latent[e]], zero
        for j in range(row.shape[0]):
            p += row[j] * a[j]
        out[e] = p
        e += 1


@compiled
def dot_entries_with_both(first, last, latent, W, row, other, out, aux):
    """`dot_entries` of `row` to `out` and of `other` to `aux`, with each row of W read once."""
    zero = row.dtype.type(0)
    e = first
    while e + 2 <= last:
        a, b = W[latent[e]], W[latent[e + 1]]
        p, q, r, s = zero, zero, zero, zero
        for j in range(row.shape[0]):
            p += row[j] * a[j]
            q += other[j] * a[j]
            r += row[j] * b[j]
            s += other[j] * b[j]
        out[e], aux[e], out[e + 1], aux[e + 1] = p, q, r, s
        e += 2
    dot_entries(e, last, latent, W, row, out)
    dot_entries(e, last, latent, W, other, aux)


@compiled
def dot_rows(first, last, offsets, latent, x, W, out):
    """Write <x_t, W_i> for every entry (t, i) of rows first to last - 1: the sampled product.

    Args:
        first, last: rows.
        offsets: (rows + 1,) of the whole batch.
        latent, out: (nnz,).
        x: (rows, width).
        W: (d_sae, width).
    """
    for t in range(first, last):
        dot_entries(offsets[t], offsets[t + 1], latent, W, x[t], out)


# Columns of `row_sums` in `decode_rows`, all sums over d_in.
X_POWER, X_HAT_POWER, X_DOT_X_HAT, ERROR_POWER = 0, 1, 2, 3
AUX_POWER, X_DOT_AUX, AUX_ERROR_POWER = 4, 5, 6
N_ROW_SUMS = 7


@compiled
def decode_rows(
    first, last, offsets, latent, m, g, W, b, x, scale, two, error, aux_error, dm, dg, sums
):
    """Decode rows first to last - 1 from m and from g, and come back: both errors, both gradients.

    A row's directions are read twice while they are in cache; no x_hat is stored.

    Args:
        first, last: rows.
        offsets: (rows + 1,) of the whole batch.
        latent, m: (nnz,).
        g: (nnz,); not read unless `two`.
        W: (d_sae, d_in).
        b: (d_in,).
        x: (rows, d_in).
        scale: 2 / B.
        two: whether there is a second reconstruction.
        error: (rows, d_in), becomes scale (m @ W + b - x).
        aux_error: the same of g, or (0, 0) where it is not to be kept.
        dm: (nnz,), becomes <error, W_i>.
        dg: (nnz,), becomes <aux error, W_i> if `two`.
        sums: (rows, N_ROW_SUMS) in float64.
    """
    width, zero = x.shape[1], x.dtype.type(0)
    keep = aux_error.shape[0] > 0
    out, aux = np.empty(width, x.dtype), np.empty(width, x.dtype)
    for t in range(first, last):
        row = x[t]
        for j in range(width):
            out[j] = b[j]
            aux[j] = b[j]
        if two:
            add_rows_to_both(offsets[t], offsets[t + 1], latent, m, g, W, out, aux)
        else:
            add_rows(offsets[t], offsets[t + 1], latent, m, W, out)
        power, hat, along, off = 0.0, zero, zero, zero
        for j in range(width):
            exact = np.float64(row[j])  # FVU subtracts |sum x|^2 / n from the sum of these.
            power += exact * exact
            hat += out[j] * out[j]
            along += row[j] * out[j]
            out[j] -= row[j]
            off += out[j] * out[j]
            out[j] *= scale
            error[t, j] = out[j]
        sums[t, X_POWER], sums[t, X_HAT_POWER], sums[t, X_DOT_X_HAT] = power, hat, along
        sums[t, ERROR_POWER] = off
        hat, along, off = zero, zero, zero
        if two:
            for j in range(width):
                hat += aux[j] * aux[j]
                along += row[j] * aux[j]
                aux[j] -= row[j]
                off += aux[j] * aux[j]
                aux[j] *= scale
        if keep:
            aux_error[t] = aux
        sums[t, AUX_POWER], sums[t, X_DOT_AUX], sums[t, AUX_ERROR_POWER] = hat, along, off
        if two:
            dot_entries_with_both(offsets[t], offsets[t + 1], latent, W, out, aux, dm, dg)
        else:
            dot_entries(offsets[t], offsets[t + 1], latent, W, out, dm)


@compiled
def sum_columns(x, out):
    """Add every row of `x`, (rows, width), to `out`, (width,), in the precision of `out`."""
    for t in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[j] += x[t, j]
