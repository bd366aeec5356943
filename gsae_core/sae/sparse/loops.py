"""The loops over active entries that torch has no operator for, compiled for the CPU by numba.

Each releases the interpreter lock, so threads may share a batch (rows, latents or entries `first`
to `last` - 1), and takes NumPy arrays in C order. The first call in a new installation compiles (a
second or two a loop); the result is kept on disk. Shapes, where a docstring does not say otherwise:

    h                       (rows, d_sae)   products with the encoder
    x, dense                (rows, d_in)
    W, W_dec                (d_sae, d_in)
    above, b                (d_sae,)
    latent, m, g, weight    (nnz,)          of the entries
    offsets                 where each row's (or latent's) entries begin; one more at the end
    ends                    (rows,)         written: where each row's entries end
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from gsae_core.sae import metrics

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
    """Return `function` compiled with `OPTIONS`, from the disk where it was before."""
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

    `latent` and `value` have room for rows * d_sae; slots past the last entry are written too.
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

    Four rows at a time, so that a sum is read and written once for four products: half the time.
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
def decode_rows(
    first, last, offsets, latent, m, g, W, b, x, scale, two, error, aux_error, dm, dg, sums
):
    """Decode rows first to last - 1 from m, and if `two` from g; write errors and gradients.

        error = scale (m @ W + b - x)    aux_error the same of g, unless it has no rows
        dm_i  = <error, W_i>             dg_i the same of aux_error

    `sums`, float64, has the columns of `metrics.stats_from_rows`. A row's directions are read twice
    while they are in cache; no x_hat is stored.
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
        sums[t, metrics.X_POWER], sums[t, metrics.X_HAT_POWER] = power, hat
        sums[t, metrics.X_DOT_X_HAT], sums[t, metrics.ERROR_POWER] = along, off
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
        sums[t, metrics.AUX_POWER], sums[t, metrics.X_DOT_AUX] = hat, along
        sums[t, metrics.AUX_ERROR_POWER] = off
        if two:
            dot_entries_with_both(offsets[t], offsets[t + 1], latent, W, out, aux, dm, dg)
        else:
            dot_entries(offsets[t], offsets[t + 1], latent, W, out, dm)


# Latents whose sums are turned into columns together: a cache line of float32.
TILE = 16


@compiled
def sort_by_latent(row_offsets, latent, offsets, order, row):
    """Write the fields of `ByLatent`, `offsets` being zero before: a counting sort."""
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
def sum_rows(first, last, offsets, row, weight, dense, out, add):
    """Write, or `add`, to out[i] latent i's sum of weight * dense[row]; entries by latent."""
    for i in range(first, last):
        total = out[i]
        if not add:
            total[:] = 0
        add_rows(offsets[i], offsets[i + 1], row, weight, dense, total)


@compiled
def sum_rows_into_columns(first, last, offsets, row, weight, dense, out):
    """Write to out[:, i] what `sum_rows` writes to out[i]; out: (d_in, d_sae)."""
    width = dense.shape[1]
    tile = np.empty((TILE, width), dense.dtype)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        for k in range(n):
            total = tile[k]
            total[:] = 0
            add_rows(offsets[start + k], offsets[start + k + 1], row, weight, dense, total)
        for j in range(width):
            for k in range(n):
                out[j, start + k] = tile[k, j]


@compiled
def sum_entries(offsets, order, value, out):
    """Write to out[i] the sum of `value`, in the order of the codes, over latent i's entries."""
    for i in range(out.shape[0]):
        total = out.dtype.type(0)
        for place in range(offsets[i], offsets[i + 1]):
            total += value[order[place]]
        out[i] = total


@compiled
def _cut(latent, value, n, k):
    """Move the k largest of n, of equals the earlier, to the front, in order; return the least."""
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

    Latents ascend within a row, and of equal values those of lower latents are taken. A `b` of -inf
    leaves a latent out. `latent` and `value` have room for rows * k entries.
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


@compiled
def _bfloat16(bits):
    """Return the float32 that the bits of a bfloat16 stand for."""
    # numba's shift of a uint32 is a uint64.
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@compiled
def _bits_of_bfloat16(bits):
    """Return the bits of the nearest bfloat16 (ties to even) to a float32 given by its bits."""
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)


@compiled
def round_columns(first, last, W, rows, row_bits, half, off, length):
    """Write columns first to last - 1 of W, (d_in, d_sae), as `rows`, and to `half` as bfloat16.

    `row_bits` is the memory of `rows` as uint32, `half` holds bits as uint16. Of each column `off`
    becomes the norm of what rounding changed, and `length` that of what it left.
    """
    for start in range(first, last, TILE):
        stop = min(start + TILE, last)
        for j in range(W.shape[0]):
            for i in range(start, stop):
                rows[i, j] = W[j, i]
        for i in range(start, stop):
            row, bits, out = rows[i], row_bits[i], half[i]
            changed, left = np.float32(0), np.float32(0)
            for j in range(W.shape[0]):
                rounded = _bits_of_bfloat16(bits[j])
                out[j] = rounded
                value = _bfloat16(rounded)
                changed += (row[j] - value) * (row[j] - value)
                left += value * value
            off[i], length[i] = np.sqrt(changed), np.sqrt(left)


@compiled
def _may_exceed(bits, bound, above):
    """Return whether a number within bound + |h| / 256 of a bfloat16 h may be above `above`."""
    h = _bfloat16(bits)
    return h + (bound + abs(h) * np.float32(1 / 256)) > above


@compiled
def pick_candidates(h, above, row_slack, row_slack_2, slack, slack_2, latent, ends):
    """Write where h, bits of bfloat16, may stand for a number above `above`; return how many.

    Each h is off by at most row_slack[t] * slack[i] + row_slack_2[t] * slack_2[i] + |h| / 256.
    """
    n, whole = 0, h.shape[1] // BLOCK * BLOCK
    for t in range(h.shape[0]):
        row, a, b = h[t], row_slack[t], row_slack_2[t]
        for start in range(0, whole, BLOCK):
            hits = 0
            for j in range(start, start + BLOCK):
                hits += _may_exceed(row[j], a * slack[j] + b * slack_2[j], above[j])
            if hits:
                for j in range(start, start + BLOCK):
                    latent[n] = j
                    n += _may_exceed(row[j], a * slack[j] + b * slack_2[j], above[j])
        for j in range(whole, h.shape[1]):
            if _may_exceed(row[j], a * slack[j] + b * slack_2[j], above[j]):
                latent[n] = j
                n += 1
        ends[t] = n
    return n


@compiled
def keep_above(x, W, above, latent, value, ends):
    """Write entries' products, keep those above their latent's threshold; return how many stay."""
    n = start = 0
    for t in range(ends.shape[0]):
        end = ends[t]
        dot_entries(start, end, latent, W, x[t], value)
        for e in range(start, end):
            i, v = latent[e], value[e]
            if v > above[i]:
                latent[n], value[n] = i, v
                n += 1
        start, ends[t] = end, n
    return n
