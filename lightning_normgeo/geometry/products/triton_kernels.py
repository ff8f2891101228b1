"""Kernels that read all weights once on a GPU, in one launch for weights of any number and shape; and one for bounds.

A table of addresses says where each weight, its gradient and its optimizer state are. A program reads one segment of
one row; a second kernel adds up the segments of long rows. Sums are float64, each taken by one program in a fixed
order, so results do not depend on what else runs. This module is imported by :mod:`.triton_launches` only.
"""

# no annotations of the future here: Triton reads those of kernels, and tl.constexpr has to be the object

import triton
import triton.language as tl


@triton.jit
def _source(addresses, which: tl.constexpr, passes, k, kind: tl.constexpr):
    """Pointer to a tensor of pass k."""
    return tl.load(addresses + which * passes + k).to(tl.pointer_type(kind))


@triton.jit(do_not_specialize=["passes", "programs"])
def weight_kernel(
    addresses,
    numbers,
    columns,
    first,
    pass_of,
    out,
    passes,
    programs,
    RULE: tl.constexpr,
    STATE: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of one segment: ‖W‖², ⟨W, g⟩, ‖g‖², ΣW⁴, and the products of the rule (0: none, 1: SGD, 2: Adam)."""
    program = tl.program_id(0)
    k = tl.load(pass_of + program)
    width = tl.load(columns + k)
    segments = tl.cdiv(width, SEGMENT)
    within = program - tl.load(first + k)
    begin = within % segments * SEGMENT
    end = tl.minimum(begin + SEGMENT, width)
    base = within // segments * width
    w_at = _source(addresses, 0, passes, k, WEIGHT) + base
    g_at = _source(addresses, 1, passes, k, GRADIENT) + base
    m_at = _source(addresses, 2, passes, k, FIRST) + base
    v_at = _source(addresses, 3, passes, k, SECOND) + base
    keep_at = _source(addresses, 4, passes, k, WEIGHT) + base
    unscale = tl.load(numbers + k)
    if RULE > 0:
        one = tl.load(numbers + passes + k)
        two = tl.load(numbers + 2 * passes + k)
        three = tl.load(numbers + 3 * passes + k)
    if RULE > 1:
        eps = tl.load(numbers + 4 * passes + k)
        by_gradient = tl.load(numbers + 5 * passes + k)
        by_mean = tl.load(numbers + 6 * passes + k)
        by_weight = tl.load(numbers + 7 * passes + k)
    ww = tl.zeros((BLOCK,), tl.float64)
    wg = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    quartic = tl.zeros((BLOCK,), tl.float64)
    a = tl.zeros((BLOCK,), tl.float64)
    b = tl.zeros((BLOCK,), tl.float64)
    c = tl.zeros((BLOCK,), tl.float64)
    whole = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        stored = tl.load(w_at + i, mask=inside, other=0.0)
        if KEEP:
            tl.store(keep_at + i, stored, mask=inside)
        x = stored.to(tl.float64)
        raw = tl.load(g_at + i, mask=inside, other=0.0).to(tl.float64)
        y = raw * unscale
        ww += x * x
        wg += x * y
        gg += y * y
        quartic += (x * x) * (x * x)
        if RULE == 1:
            z = tl.load(m_at + i, mask=inside, other=0.0).to(tl.float64)
            direction = one * raw + two * x + three * z
            a += x * z
            whole += direction * direction
        if RULE == 2:
            full = y + one * x
            denominator = three * (full * full)
            z = tl.zeros((BLOCK,), tl.float64)
            if STATE:
                z = tl.load(m_at + i, mask=inside, other=0.0).to(tl.float64)
                denominator += two * tl.load(v_at + i, mask=inside, other=0.0).to(tl.float64)
            rate = tl.where(inside, 1.0 / (tl.sqrt(denominator) + eps), 0.0)
            share = x * rate
            step = (by_gradient * y + by_mean * z + by_weight * x) * rate
            a += share * y
            b += share * z
            c += share * x
            whole += step * step
    tl.store(out + program, tl.sum(ww, 0))
    tl.store(out + programs + program, tl.sum(wg, 0))
    tl.store(out + 2 * programs + program, tl.sum(gg, 0))
    tl.store(out + 3 * programs + program, tl.sum(quartic, 0))
    if RULE == 1:
        tl.store(out + 4 * programs + program, tl.sum(a, 0))
        tl.store(out + 5 * programs + program, tl.sum(whole, 0))
    if RULE == 2:
        tl.store(out + 4 * programs + program, by_gradient * tl.sum(a, 0))
        tl.store(out + 5 * programs + program, by_mean * tl.sum(b, 0))
        tl.store(out + 6 * programs + program, by_weight * tl.sum(c, 0))
        tl.store(out + 7 * programs + program, tl.sum(whole, 0))


@triton.jit(do_not_specialize=["passes", "programs"])
def update_kernel(
    addresses,
    columns,
    first,
    pass_of,
    out,
    passes,
    programs,
    OLD: tl.constexpr,
    NEW: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of one segment of D = W⁺ - W: ‖W‖², ⟨W, D⟩, ‖D‖² and ‖D_⊥‖², which reads the segment a second time."""
    program = tl.program_id(0)
    k = tl.load(pass_of + program)
    width = tl.load(columns + k)
    segments = tl.cdiv(width, SEGMENT)
    within = program - tl.load(first + k)
    begin = within % segments * SEGMENT
    end = tl.minimum(begin + SEGMENT, width)
    base = within // segments * width
    old_at = _source(addresses, 0, passes, k, OLD) + base
    new_at = _source(addresses, 1, passes, k, NEW) + base
    ww = tl.zeros((BLOCK,), tl.float64)
    wd = tl.zeros((BLOCK,), tl.float64)
    dd = tl.zeros((BLOCK,), tl.float64)
    across = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        x = tl.load(old_at + i, mask=inside, other=0.0).to(tl.float64)
        change = tl.load(new_at + i, mask=inside, other=0.0).to(tl.float64) - x
        ww += x * x
        wd += x * change
        dd += change * change
    weight_sq = tl.sum(ww, 0)
    weight_update = tl.sum(wd, 0)
    radial = weight_update / tl.where(weight_sq > 0, weight_sq, 1.0)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        x = tl.load(old_at + i, mask=inside, other=0.0).to(tl.float64)
        change = tl.load(new_at + i, mask=inside, other=0.0).to(tl.float64) - x
        rest = change - radial * x
        across += rest * rest
    tl.store(out + program, weight_sq)
    tl.store(out + programs + program, weight_update)
    tl.store(out + 2 * programs + program, tl.sum(dd, 0))
    tl.store(out + 3 * programs + program, tl.sum(across, 0))


@triton.jit(do_not_specialize=["programs", "rows"])
def sum_kernel(
    parts,
    columns,
    first,
    first_row,
    pass_of_row,
    out,
    programs,
    rows,
    SUMS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the segments of one row."""
    row = tl.program_id(0)
    k = tl.load(pass_of_row + row)
    segments = tl.cdiv(tl.load(columns + k), SEGMENT)
    begin = tl.load(first + k) + (row - tl.load(first_row + k)) * segments
    for column in tl.static_range(SUMS):
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, segments, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(parts + column * programs + begin + i, mask=i < segments, other=0.0)
        tl.store(out + column * rows + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["programs", "rows"])
def join_kernel(
    parts,
    columns,
    first,
    first_row,
    pass_of_row,
    out,
    programs,
    rows,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Products of the update of one row from those of its segments, as ``folded_products`` joins them."""
    row = tl.program_id(0)
    k = tl.load(pass_of_row + row)
    segments = tl.cdiv(tl.load(columns + k), SEGMENT)
    begin = tl.load(first + k) + (row - tl.load(first_row + k)) * segments
    ww = tl.zeros((BLOCK,), tl.float64)
    wd = tl.zeros((BLOCK,), tl.float64)
    dd = tl.zeros((BLOCK,), tl.float64)
    across = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, segments, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < segments
        ww += tl.load(parts + begin + i, mask=inside, other=0.0)
        wd += tl.load(parts + programs + begin + i, mask=inside, other=0.0)
        dd += tl.load(parts + 2 * programs + begin + i, mask=inside, other=0.0)
        across += tl.load(parts + 3 * programs + begin + i, mask=inside, other=0.0)
    weight_sq = tl.sum(ww, 0)
    weight_update = tl.sum(wd, 0)
    radial = weight_update / tl.where(weight_sq > 0, weight_sq, 1.0)
    for start in range(0, segments, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < segments
        x = tl.load(parts + begin + i, mask=inside, other=0.0)
        y = tl.load(parts + programs + begin + i, mask=inside, other=0.0)
        own = y / tl.where(x > 0, x, 1.0) - radial
        across += own * own * x
    tl.store(out + row, weight_sq)
    tl.store(out + rows + row, weight_update)
    tl.store(out + 2 * rows + row, tl.sum(dd, 0))
    tl.store(out + 3 * rows + row, tl.sum(across, 0))


@triton.jit(do_not_specialize=["units"])
def rounding_kernel(terms, out, units, ROUNDOFF: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr):
    """Systematic floors of rounding, as ``systematic_floor`` computes them, from four terms and ‖W‖² of each unit."""
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    gradient = tl.load(terms + unit, mask=inside, other=0.0)
    momentum = tl.load(terms + units + unit, mask=inside, other=0.0)
    signed_decay = tl.load(terms + 2 * units + unit, mask=inside, other=0.0)
    quadratic = tl.load(terms + 3 * units + unit, mask=inside, other=0.0)
    weight_sq = tl.load(terms + 4 * units + unit, mask=inside, other=0.0)
    decay = tl.abs(signed_decay)
    arithmetic = 4 * ROUNDOFF * (tl.abs(gradient) + tl.abs(momentum) + decay + tl.abs(quadratic))
    whole = ROUNDOFF * weight_sq
    below = decay + tl.where(decay > 0, tl.abs(momentum), 0.0)
    above = whole * (4 * whole / tl.where(decay > TINY, decay, TINY))
    rounded = tl.where(below < whole, below, whole)  # unlike a minimum, NaN where ‖W‖² is
    rounded = tl.where(above < rounded, above, rounded)
    ratio = tl.where(quadratic > 0, weight_sq / tl.where(quadratic > 0, quadratic, 1.0), 0.0)
    ratio = tl.where(ratio < float("inf"), ratio, 0.0)
    along = tl.abs(gradient + momentum + 0.5 * signed_decay) + 0.5 * decay
    lattice = 2 * ROUNDOFF * tl.sqrt(ratio) * along
    tl.store(out + unit, arithmetic + rounded + lattice, mask=inside)
