"""Device code of the sparse step. Needs Triton: import it inside functions."""

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
        h = tl.dot(a, b, h, input_precision="ieee")
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
    _append(product, local, low, open_low, begin, none, column, capacity)
    _append(product, local, high, open_high, begin, per_row_low, column + HALF, capacity)


@triton.jit
@no_type_check
def _opened(h, bias, t, i, n_rows, d_sae):
    threshold = tl.load(bias + i, mask=i < d_sae, other=0.0)
    opened = h + threshold[None, :] > 0
    return (opened & (t < n_rows)[:, None] & (i < d_sae)[None, :]).to(tl.int32)


@triton.jit
@no_type_check
def _append(product, local, h, opened, begin, before, column, capacity):
    ROWS: tl.constexpr = h.shape[0]
    LATENTS: tl.constexpr = 2 * h.shape[1]
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
    place_by_latent,
    row_by_latent,
    n_row_tiles,
    n_latent_tiles,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Move a tile's entries to where they belong: by row and latent, and by latent and row.

    `theta` is a JumpReLU SAE's; `b_mag` and maybe a `gain` are a Gated SAE's; else None.
    """
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
        if theta is not None:
            fires = g > tl.load(theta + i, mask=live, other=0.0)
            tl.store(magnitude + place, tl.where(fires, g, 0.0), mask=live)
        if b_mag is not None:
            if gain is not None:
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


@triton.jit
@no_type_check
def decode_rows(
    x,
    W_dec,
    b_dec,
    row_offsets,
    latent,
    gate,
    magnitude,
    error,
    error_aux,
    slope,
    slope_aux,
    row_sums,
    d_in,
    scale,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Decode a row through magnitudes and gates at once, then take <error, W_dec_i> of both.

    All of a row stays in registers, and the second walk over its directions finds them in cache.
    `row_sums` (rows, 7) is that of `loops.decode_rows`. Without an auxiliary term `slope_aux` is
    None, and `error_aux` also where the dictionary does not learn it.
    """
    t = tl.program_id(0).to(tl.int64)
    begin = tl.load(row_offsets + t)
    end = tl.load(row_offsets + t + 1)
    d = tl.arange(0, WIDTH)
    inside = d < d_in
    here = t * d_in + d
    decoded = tl.zeros([WIDTH], dtype=tl.float32)
    decoded_aux = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        live = at < end
        i = tl.load(latent + at, mask=live, other=0)
        inner = i.to(tl.int64)[:, None] * d_in + d[None, :]
        read = live[:, None] & inside[None, :]
        w = tl.load(W_dec + inner, mask=read, other=0.0)
        m = tl.load(magnitude + at, mask=live, other=0.0)
        decoded += tl.sum(m[:, None] * w, 0)
        if slope_aux is not None:
            g = tl.load(gate + at, mask=live, other=0.0)
            decoded_aux += tl.sum(g[:, None] * w, 0)

    truth = tl.load(x + here, mask=inside, other=0.0)
    bias = tl.load(b_dec + d, mask=inside, other=0.0)
    decoded += bias
    e = decoded - truth
    sums = row_sums + t * 7
    # The variance of x is a difference of large sums, hence float64.
    exact = truth.to(tl.float64)
    tl.store(sums + 0, tl.sum(exact * exact, 0))
    tl.store(sums + 1, tl.sum(decoded * decoded, 0).to(tl.float64))
    tl.store(sums + 2, tl.sum(truth * decoded, 0).to(tl.float64))
    tl.store(sums + 3, tl.sum(e * e, 0).to(tl.float64))
    e *= scale
    tl.store(error + here, e, mask=inside)
    if slope_aux is not None:
        decoded_aux += bias
        e_aux = decoded_aux - truth
        tl.store(sums + 4, tl.sum(decoded_aux * decoded_aux, 0).to(tl.float64))
        tl.store(sums + 5, tl.sum(truth * decoded_aux, 0).to(tl.float64))
        tl.store(sums + 6, tl.sum(e_aux * e_aux, 0).to(tl.float64))
        e_aux *= scale
        if error_aux is not None:
            tl.store(error_aux + here, e_aux, mask=inside)

    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        live = at < end
        i = tl.load(latent + at, mask=live, other=0)
        inner = i.to(tl.int64)[:, None] * d_in + d[None, :]
        w = tl.load(W_dec + inner, mask=live[:, None] & inside[None, :], other=0.0)
        tl.store(slope + at, tl.sum(w * e[None, :], 1), mask=live)
        if slope_aux is not None:
            tl.store(slope_aux + at, tl.sum(w * e_aux[None, :], 1), mask=live)


@triton.jit
@no_type_check
def sum_latents(
    xc,
    error,
    error_aux,
    slope,
    slope_aux,
    latent_offsets,
    place_by_latent,
    row_by_latent,
    gate,
    magnitude,
    gain,
    l1_weight,
    theta,
    W_dec_sum,
    W_gate_sum_T,
    sums,
    counts,
    d_in,
    l1_slope,
    half_window,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Sum over one latent's entries, rows ascending: its rows of the weight gradients, its numbers.

    A program owns what it writes, so nothing is added atomically. While one works long on a latent
    that fires on half the batch, others fill the device. `theta` is a JumpReLU SAE's, whose slopes
    within `half_window` of it are summed and counted; else None.
    """
    i = tl.program_id(0).to(tl.int64)
    begin = tl.load(latent_offsets + i)
    end = tl.load(latent_offsets + i + 1)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = d < d_in
    if l1_weight is not None:
        l1_slope *= tl.load(l1_weight + i)
    if theta is not None:
        threshold = tl.load(theta + i)
    dec = tl.zeros([WIDTH], dtype=tl.float32)
    enc = tl.zeros([WIDTH], dtype=tl.float32)
    dm_part = tl.zeros([ENTRIES], dtype=tl.float32)
    dm_m_part = tl.zeros([ENTRIES], dtype=tl.float32)
    dg_part = tl.zeros([ENTRIES], dtype=tl.float32)
    gate_part = tl.zeros([ENTRIES], dtype=tl.float32)
    fired_part = tl.zeros([ENTRIES], dtype=tl.int32)
    window_part = tl.zeros([ENTRIES], dtype=tl.float32)
    near_part = tl.zeros([ENTRIES], dtype=tl.float32)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        live = at < end
        t = tl.load(row_by_latent + at, mask=live, other=0).to(tl.int64)
        place = tl.load(place_by_latent + at, mask=live, other=0)
        g = tl.load(gate + place, mask=live, other=0.0)
        m = tl.load(magnitude + place, mask=live, other=0.0)
        df = tl.load(slope + place, mask=live, other=0.0)
        dm = tl.where(m > 0, df, 0.0)
        if theta is not None:
            near = live & (tl.abs(g - threshold) < half_window)
            window_part += tl.where(near, df, 0.0)
            near_part += near.to(tl.float32)
        dg = tl.where(live, l1_slope, 0.0)
        if slope_aux is not None:
            dg += tl.load(slope_aux + place, mask=live, other=0.0)
        inner = t[:, None] * d_in + d[None, :]
        read = live[:, None] & inside[None, :]
        e = tl.load(error + inner, mask=read, other=0.0)
        dec += tl.sum(m[:, None] * e, 0)
        if error_aux is not None:
            e_aux = tl.load(error_aux + inner, mask=read, other=0.0)
            dec += tl.sum(g[:, None] * e_aux, 0)
        centred = tl.load(xc + inner, mask=read, other=0.0)
        dh = dg + (dm if gain is None else dm * tl.load(gain + i))
        enc += tl.sum(dh[:, None] * centred, 0)
        dm_part += dm
        dm_m_part += dm * m
        dg_part += dg
        gate_part += g
        fired_part += (m > 0).to(tl.int32)

    here = i * d_in + d
    tl.store(W_dec_sum + here, dec, mask=inside)
    tl.store(W_gate_sum_T + here, enc, mask=inside)
    if tl.program_id(1) == 0:
        d_sae = tl.num_programs(0)
        tl.store(sums + i, tl.sum(dm_part, 0))
        tl.store(sums + d_sae + i, tl.sum(dm_m_part, 0))
        tl.store(sums + 2 * d_sae + i, tl.sum(dg_part, 0))
        tl.store(sums + 3 * d_sae + i, tl.sum(gate_part, 0))
        if theta is not None:
            tl.store(sums + 4 * d_sae + i, tl.sum(window_part, 0))
            tl.store(sums + 5 * d_sae + i, tl.sum(near_part, 0))
        tl.store(counts + i, tl.sum(fired_part, 0).to(tl.int64))
        tl.store(counts + d_sae + i, (end - begin).to(tl.int64))
