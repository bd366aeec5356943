"""Device code: from activations to active entries. Needs Triton: import it inside functions."""

from typing import no_type_check

import triton
import triton.language as tl

# `no_type_check` keeps run-time type checkers away from code that is parsed, never called.


@triton.jit
@no_type_check
def encode_tiles(
    xc,
    W,
    bias,
    n_open,
    tile_begin,
    tile_count,
    count_by_row,
    count_by_latent,
    product,
    local,
    n_rows,
    d_in,
    d_sae,
    capacity,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Encode a tile of rows x latents; append what is active to `product` and `local`.

    Pre-activations live in registers alone. A tile claims its stretch of the buffers with one
    atomic addition; stretches land in any order, and `place_entries` undoes that.
    """
    n_row_tiles = tl.cdiv(n_rows, ROWS)
    n_latent_tiles = tl.cdiv(d_sae, LATENTS)
    # GROUP row tiles walk the dictionary together: their part of xc stays in L2, and each tile of
    # W is read from memory once for all of them.
    per_group = GROUP * n_latent_tiles
    first = (tl.program_id(0) // per_group) * GROUP
    n_here = tl.minimum(n_row_tiles - first, GROUP)
    within = tl.program_id(0) % per_group
    row_tile = first + within % n_here
    latent_tile = within // n_here

    t = row_tile * ROWS + tl.arange(0, ROWS)
    i = latent_tile * LATENTS + tl.arange(0, LATENTS)
    k = tl.arange(0, DEPTH)
    x_at = xc + t.to(tl.int64)[:, None] * d_in + k[None, :]
    W_at = W + k.to(tl.int64)[:, None] * d_sae + i[None, :]
    h = tl.zeros([ROWS, LATENTS], dtype=tl.float32)
    for done in range(0, d_in, DEPTH):
        left = k < d_in - done
        a = tl.load(x_at, mask=(t < n_rows)[:, None] & left[None, :], other=0.0)
        b = tl.load(W_at, mask=left[:, None] & (i < d_sae)[None, :], other=0.0)
        h = tl.dot(a, b, h, input_precision=PRECISION)
        x_at += DEPTH
        W_at += DEPTH * d_sae

    # The tile is picked over in two halves: whole, its ranks would not fit into registers.
    HALF: tl.constexpr = LATENTS // 2
    low, high = tl.split(tl.permute(tl.reshape(h, (ROWS, 2, HALF)), (0, 2, 1)))
    column = tl.arange(0, HALF)
    i_low = latent_tile * LATENTS + column
    open_low = _opened(low, bias, t, i_low, n_rows, d_sae)
    open_high = _opened(high, bias, t, i_low + HALF, n_rows, d_sae)
    per_row_low = tl.sum(open_low, 1)
    per_row = per_row_low + tl.sum(open_high, 1)
    n_tile = tl.sum(per_row, 0)
    begin = tl.atomic_add(n_open, n_tile.to(tl.int64), sem="relaxed")
    # Past the capacity entries are dropped, yet counted: the total says that they were.
    begin = tl.minimum(begin, capacity).to(tl.int32)
    tile = row_tile * n_latent_tiles + latent_tile
    tl.store(tile_begin + tile, begin)
    tl.store(tile_count + tile, n_tile)
    row_cell = t.to(tl.int64) * n_latent_tiles + latent_tile
    tl.store(count_by_row + row_cell, per_row, mask=t < n_rows)
    latent_cell = i_low.to(tl.int64) * n_row_tiles + row_tile
    tl.store(count_by_latent + latent_cell, tl.sum(open_low, 0), mask=i_low < d_sae)
    latent_cell += HALF * n_row_tiles
    tl.store(count_by_latent + latent_cell, tl.sum(open_high, 0), mask=i_low < d_sae - HALF)

    begin += tl.cumsum(per_row, 0) - per_row
    none = tl.zeros_like(per_row)
    _append(product, local, low, open_low, begin, none, column, capacity, ROWS, LATENTS)
    _append(
        product, local, high, open_high, begin, per_row_low, column + HALF, capacity, ROWS, LATENTS
    )


@triton.jit
@no_type_check
def _opened(h, bias, t, i, n_rows, d_sae):
    threshold = tl.load(bias + i, mask=i < d_sae, other=0.0)
    opened = h + threshold[None, :] > 0
    return (opened & (t < n_rows)[:, None] & (i < d_sae)[None, :]).to(tl.int32)


@triton.jit
@no_type_check
def _append(
    product,
    local,
    h,
    opened,
    begin,
    before,
    column,
    capacity,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
):
    rank = before[:, None] + tl.cumsum(opened, 1) - opened
    slot = begin[:, None] + rank
    # Rank within the tile's row, row and latent within the tile: at most 8 bits each, in one word.
    word = (rank * ROWS + tl.arange(0, ROWS)[:, None]) * LATENTS + column[None, :]
    kept = (opened > 0) & (slot < capacity)
    tl.store(product + slot, h, mask=kept)
    tl.store(local + slot, word, mask=kept)


@triton.jit
@no_type_check
def place_entries(
    product,
    local,
    tile_begin,
    tile_count,
    row_cells,
    latent_cells,
    fits,
    bias,
    gain,
    b_mag,
    theta,
    latent,
    gate,
    magnitude,
    row_by_latent,
    place_by_latent,
    n_row_tiles,
    n_latent_tiles,
    TIED: tl.constexpr,
    GAIN: tl.constexpr,
    JUMPS: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Move a tile's entries to where they belong: by row and latent, and by latent and row."""
    tile = tl.program_id(0)
    row_tile = tile // n_latent_tiles
    latent_tile = tile % n_latent_tiles
    begin = tl.load(tile_begin + tile)
    end = begin + tl.load(tile_count + tile) * tl.load(fits)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        live = at < end
        word = tl.load(local + at, mask=live, other=0)
        h = tl.load(product + at, mask=live, other=0.0)
        column = word % LATENTS
        # Its rank among those of its latent: how many came before it. With 32 of 16384 latents
        # active a tile has 32 entries, so that comparing each with each is next to nothing.
        above = tl.zeros([ENTRIES], dtype=tl.int32)
        for other in range(begin, start + ENTRIES, ENTRIES):
            earlier = other + tl.arange(0, ENTRIES)
            theirs = tl.load(local + earlier, mask=earlier < end, other=0) % LATENTS
            met = (theirs[None, :] == column[:, None]) & (earlier[None, :] < at[:, None])
            above += tl.sum(met.to(tl.int32), 1)

        t = row_tile * ROWS + (word // LATENTS) % ROWS
        i = latent_tile * LATENTS + column
        row_cell = t.to(tl.int64) * n_latent_tiles + latent_tile
        place = tl.load(row_cells + row_cell, mask=live, other=0) + word // (LATENTS * ROWS)
        latent_cell = i.to(tl.int64) * n_row_tiles + row_tile
        turned = tl.load(latent_cells + latent_cell, mask=live, other=0) + above
        tl.store(latent + place, i, mask=live)
        g = h + tl.load(bias + i, mask=live, other=0.0)
        tl.store(gate + place, g, mask=live)
        if JUMPS:
            fires = g > tl.load(theta + i, mask=live, other=0.0)
            tl.store(magnitude + place, tl.where(fires, g, 0.0), mask=live)
        if TIED:
            if GAIN:
                h *= tl.load(gain + i, mask=live, other=0.0)
            m = tl.maximum(h + tl.load(b_mag + i, mask=live, other=0.0), 0.0)
            tl.store(magnitude + place, m, mask=live)
        tl.store(row_by_latent + turned, t, mask=live)
        tl.store(place_by_latent + turned, place, mask=live)


@triton.jit
@no_type_check
def probe(out):
    """Store a one: whether anything runs at all."""
    tl.store(out, 1.0)
