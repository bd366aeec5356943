"""Device code: from active entries to gradients. Needs Triton: import it inside functions.

Every sum runs in one fixed order, so that a step gives the same bits each time.
"""

from typing import no_type_check

import triton
import triton.language as tl

# `no_type_check` keeps run-time type checkers away from code that is parsed, never called.


@triton.jit
@no_type_check
def decode_rows(
    x,
    xc,
    W_dec,
    b_dec,
    W_mag_T,
    b_mag,
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
    AUX: tl.constexpr,
    UNFROZEN: tl.constexpr,
    UNTIED: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Decode a row through magnitudes and gates at once, then take <error, W_dec_i> of both.

    Both reconstructions and both errors of a row stay in registers, and the second walk over its
    directions finds them in cache. `row_sums` (rows, 7) is that of `loops.decode_rows`.
    """
    t = tl.program_id(0).to(tl.int64)
    begin = tl.load(row_offsets + t)
    end = tl.load(row_offsets + t + 1)
    d = tl.arange(0, WIDTH)
    inside = d < d_in
    here = t * d_in + d
    if UNTIED:
        centred = tl.load(xc + here, mask=inside, other=0.0)
    decoded = tl.zeros([WIDTH], dtype=tl.float32)
    decoded_aux = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        live = at < end
        i = tl.load(latent + at, mask=live, other=0)
        inner = i.to(tl.int64)[:, None] * d_in + d[None, :]
        read = live[:, None] & inside[None, :]
        w = tl.load(W_dec + inner, mask=read, other=0.0)
        if UNTIED:
            w_mag = tl.load(W_mag_T + inner, mask=read, other=0.0)
            m = tl.sum(w_mag * centred[None, :], 1) + tl.load(b_mag + i, mask=live, other=0.0)
            m = tl.where(live, tl.maximum(m, 0.0), 0.0)
            tl.store(magnitude + at, m, mask=live)
        else:
            m = tl.load(magnitude + at, mask=live, other=0.0)
        decoded += tl.sum(m[:, None] * w, 0)
        if AUX:
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
    if AUX:
        decoded_aux += bias
        e_aux = decoded_aux - truth
        tl.store(sums + 4, tl.sum(decoded_aux * decoded_aux, 0).to(tl.float64))
        tl.store(sums + 5, tl.sum(truth * decoded_aux, 0).to(tl.float64))
        tl.store(sums + 6, tl.sum(e_aux * e_aux, 0).to(tl.float64))
        e_aux *= scale
        if UNFROZEN:
            tl.store(error_aux + here, e_aux, mask=inside)

    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        live = at < end
        i = tl.load(latent + at, mask=live, other=0)
        inner = i.to(tl.int64)[:, None] * d_in + d[None, :]
        w = tl.load(W_dec + inner, mask=live[:, None] & inside[None, :], other=0.0)
        tl.store(slope + at, tl.sum(w * e[None, :], 1), mask=live)
        if AUX:
            tl.store(slope_aux + at, tl.sum(w * e_aux[None, :], 1), mask=live)


@triton.jit
@no_type_check
def sum_latents(
    xc,
    error,
    error_aux,
    latent_offsets,
    row_by_latent,
    place_by_latent,
    gate,
    magnitude,
    slope,
    slope_aux,
    gain,
    l1_weight,
    W_dec_sum,
    W_gate_sum_T,
    W_mag_sum_T,
    dm_sum,
    dm_m_sum,
    dg_sum,
    gate_sum,
    fired,
    gate_open,
    d_in,
    l1_slope,
    AUX: tl.constexpr,
    UNFROZEN: tl.constexpr,
    UNTIED: tl.constexpr,
    GAIN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Sum over one latent's entries, rows ascending: its rows of the weight gradients, its numbers.

    A program owns what it writes, so nothing is added atomically. A latent that fires on half the
    batch keeps its program busy for long; programs of other latents fill the device meanwhile.
    """
    i = tl.program_id(0).to(tl.int64)
    begin = tl.load(latent_offsets + i)
    end = tl.load(latent_offsets + i + 1)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = d < d_in
    if WEIGHTED:
        l1_slope *= tl.load(l1_weight + i)
    dec = tl.zeros([WIDTH], dtype=tl.float32)
    enc = tl.zeros([WIDTH], dtype=tl.float32)
    mag = tl.zeros([WIDTH], dtype=tl.float32)
    dm_part = tl.zeros([ENTRIES], dtype=tl.float32)
    dm_m_part = tl.zeros([ENTRIES], dtype=tl.float32)
    dg_part = tl.zeros([ENTRIES], dtype=tl.float32)
    gate_part = tl.zeros([ENTRIES], dtype=tl.float32)
    fired_part = tl.zeros([ENTRIES], dtype=tl.int32)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        live = at < end
        t = tl.load(row_by_latent + at, mask=live, other=0).to(tl.int64)
        place = tl.load(place_by_latent + at, mask=live, other=0)
        g = tl.load(gate + place, mask=live, other=0.0)
        m = tl.load(magnitude + place, mask=live, other=0.0)
        dm = tl.where(m > 0, tl.load(slope + place, mask=live, other=0.0), 0.0)
        dg = tl.where(live, l1_slope, 0.0)
        if AUX:
            dg += tl.load(slope_aux + place, mask=live, other=0.0)
        inner = t[:, None] * d_in + d[None, :]
        read = live[:, None] & inside[None, :]
        e = tl.load(error + inner, mask=read, other=0.0)
        dec += tl.sum(m[:, None] * e, 0)
        if UNFROZEN:
            e_aux = tl.load(error_aux + inner, mask=read, other=0.0)
            dec += tl.sum(g[:, None] * e_aux, 0)
        centred = tl.load(xc + inner, mask=read, other=0.0)
        if UNTIED:
            mag += tl.sum(dm[:, None] * centred, 0)
            dh = dg
        elif GAIN:
            dh = dg + dm * tl.load(gain + i)
        else:
            dh = dg + dm
        enc += tl.sum(dh[:, None] * centred, 0)
        dm_part += dm
        dm_m_part += dm * m
        dg_part += dg
        gate_part += g
        fired_part += (m > 0).to(tl.int32)

    here = i * d_in + d
    tl.store(W_dec_sum + here, dec, mask=inside)
    tl.store(W_gate_sum_T + here, enc, mask=inside)
    if UNTIED:
        tl.store(W_mag_sum_T + here, mag, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(dm_sum + i, tl.sum(dm_part, 0))
        tl.store(dm_m_sum + i, tl.sum(dm_m_part, 0))
        tl.store(dg_sum + i, tl.sum(dg_part, 0))
        tl.store(gate_sum + i, tl.sum(gate_part, 0))
        tl.store(fired + i, tl.sum(fired_part, 0).to(tl.int64))
        tl.store(gate_open + i, (end - begin).to(tl.int64))


@triton.jit
@no_type_check
def sum_windows(
    latent_offsets,
    place_by_latent,
    gate,
    slope,
    theta,
    slope_sum,
    n_near,
    half,
    ENTRIES: tl.constexpr,
):
    """Sum over one latent's entries within `half` of its threshold: the slope, and how many."""
    i = tl.program_id(0).to(tl.int64)
    begin = tl.load(latent_offsets + i)
    end = tl.load(latent_offsets + i + 1)
    threshold = tl.load(theta + i)
    slope_part = tl.zeros([ENTRIES], dtype=tl.float32)
    near_part = tl.zeros([ENTRIES], dtype=tl.float32)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        live = at < end
        place = tl.load(place_by_latent + at, mask=live, other=0)
        z = tl.load(gate + place, mask=live, other=0.0)
        near = live & (tl.abs(z - threshold) < half)
        slope_part += tl.load(slope + place, mask=near, other=0.0)
        near_part += near.to(tl.float32)
    tl.store(slope_sum + i, tl.sum(slope_part, 0))
    tl.store(n_near + i, tl.sum(near_part, 0))
