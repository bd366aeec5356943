"""The compiled loops of the screened encode: rounding to bfloat16, candidates, survivors."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gsae_core.sae.latent_loops import TILE
from gsae_core.sae.loops import BLOCK, compiled


@intrinsic
def _float32_of_bits(typing_context: Any, bits: Any) -> Any:
    """Return the float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@compiled
def _bfloat16(bits):
    return _float32_of_bits(np.uint32(bits) << np.uint32(16))  # pyright: ignore[reportCallIssue]


@compiled
def _bits_of_bfloat16(bits):
    """Return the bits of the nearest bfloat16 (ties to even) to a float32 given by its bits."""
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)


@compiled
def round_columns(first, last, W, rows, row_bits, half, off, length):
    """Write columns first to last - 1 of W as rows, in float32 and rounded to bfloat16.

    Args:
        first, last: columns, i.e. latents.
        W: (d_in, d_sae).
        rows, row_bits: (d_sae, d_in), the columns; `row_bits` is the memory of `rows` as uint32.
        half: (d_sae, d_in), the bits of their bfloat16 as uint16.
        off: (d_sae,), becomes the norm of what rounding changed.
        length: (d_sae,), becomes the norm of what it left.
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
def pick_candidates(h, above, row_slack, row_slack_2, slack, slack_2, latent, ends):
    """Write where a bfloat16 h may stand for a number above `above`; return how many entries.

    h is off by at most row_slack[t] * slack[i] + row_slack_2[t] * slack_2[i] + |h| / 256.

    Args:
        h: (rows, d_sae), the bits of bfloat16 numbers as uint16.
        above: (d_sae,).
        row_slack, row_slack_2: (rows,).
        slack, slack_2: (d_sae,).
        latent: room for rows * d_sae entries; a few slots past the last one are written too.
        ends: (rows,), becomes the end of each row's entries.
    """
    n, whole = 0, h.shape[1] // BLOCK * BLOCK
    relative = np.float32(1 / 256)
    for t in range(h.shape[0]):
        row, a, b = h[t], row_slack[t], row_slack_2[t]
        for start in range(0, whole, BLOCK):
            hits = 0
            for j in range(start, start + BLOCK):
                value = _bfloat16(row[j])
                bound = a * slack[j] + b * slack_2[j] + abs(value) * relative
                hits += value + bound > above[j]
            if hits:
                for j in range(start, start + BLOCK):
                    value = _bfloat16(row[j])
                    bound = a * slack[j] + b * slack_2[j] + abs(value) * relative
                    latent[n] = j
                    n += value + bound > above[j]
        for j in range(whole, h.shape[1]):
            value = _bfloat16(row[j])
            bound = a * slack[j] + b * slack_2[j] + abs(value) * relative
            if value + bound > above[j]:
                latent[n] = j
                n += 1
        ends[t] = n
    return n


@compiled
def keep_above(ends, latent, value, above):
    """Drop, in place, the entries whose value is not above their latent's threshold.

    Returns how many are left. Args as for `pick_above`.
    """
    n = start = 0
    for t in range(ends.shape[0]):
        end = ends[t]
        for e in range(start, end):
            i, v = latent[e], value[e]
            if v > above[i]:
                latent[n], value[n] = i, v
                n += 1
        start, ends[t] = end, n
    return n
