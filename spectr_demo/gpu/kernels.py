"""The Triton code: one program scores, selects and weighs for one token at one layer.

Where several programs share a token, each does that again: it is little beside what they multiply.

Axes: R rows, P projections of a bank, E experts of the bank, F experts of z, K selected, r rank.
Names in capitals are known when a kernel is compiled. BLOCK_* are powers of two.
"""
# mypy: allow-untyped-defs
# Triton's compiler reads these functions, and types them by what they are given.

import triton
import triton.language as tl

# `rules.MEASURES`, as compiled code reads them.
FIRST, OUTPUT = tl.constexpr(1), tl.constexpr(2)
# Keys: the value's order in the upper 32 bits, the place's in the lower ones.
LEAST, MOST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)
LOW = tl.constexpr(2**31 - 1)


@triton.jit
def _keys(values, places):
    """Integers, all different, whose order is that of float32 values. Of equal values the one with
    the lower place is the larger. NaN is the largest."""
    bits = values.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ LOW, bits)
    order = tl.where(values != values, LOW, order)
    return (order.to(tl.int64) << 32) | (places ^ LOW).to(tl.int64)


@triton.jit
def _values(keys):
    order = (keys >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ LOW, order).to(tl.float32, bitcast=True)


@triton.jit
def _places(keys):
    return (keys & LOW).to(tl.int32) ^ LOW


@triton.jit
def _best(keys, num, ROOM: tl.constexpr):
    """The largest `num` of keys (n,), falling, in ROOM slots; and the last of them alone."""
    slots = tl.arange(0, ROOM)
    best = tl.full((ROOM,), LEAST, tl.int64)
    last = tl.full((), MOST, tl.int64)
    for k in range(num):
        last = tl.max(tl.where(keys < last, keys, LEAST), axis=0)
        best = tl.where(slots == k, last, best)
    return best, last


@triton.jit
def _ids(kept, places, mask):
    """Places in the bank of the experts at these places of z."""
    ids = places
    if kept is not None:
        ids = tl.load(kept + places, mask=mask, other=0)
    return ids


@triton.jit
def _scores(
    z,
    ids,
    singular_values,
    measure,
    F,
    RANK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(BLOCK_F,) float32 what a router measures of z (F, r); and its first entry's size."""
    f = tl.arange(0, BLOCK_F)
    first = tl.abs(tl.load(z + f * RANK, mask=f < F, other=0).to(tl.float32))
    squares = tl.zeros((BLOCK_F,), tl.float32)
    # All of z at once would be too much for a program where there are many experts. It is read
    # before it is known what is measured: a load that waits for another one doubles the time.
    for start in range(0, RANK, BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        mask = (f < F)[:, None] & (i < RANK)[None, :]
        values = tl.load(z + f[:, None] * RANK + i[None, :], mask=mask, other=0).to(tl.float32)
        scaled = tl.where(measure == OUTPUT, RANK, 0)
        mask = (f < F)[:, None] & (i < scaled)[None, :]
        values *= tl.load(singular_values + ids[:, None] * RANK + i[None, :], mask=mask, other=1)
        squares += tl.sum(values * values, axis=1)
    return tl.where(measure == FIRST, first, tl.sqrt_rn(squares)), first


@triton.jit
def _choose(
    z,
    kept,
    singular_values,
    measure,
    top_k,
    filter,
    temperature,
    mean,
    std,
    constant,
    row,
    place,
    P: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROOM: tl.constexpr,
):
    """What one token chooses at one layer: z (F, r), kept (F,) or None.

    Returns the chosen experts in ROOM slots, as places in z, weights and scores, by falling score;
    those of a row that does not score are all experts. Then the range of slots that have a weight,
    and the weights of all experts of z, (BLOCK_F,).
    """
    f = tl.arange(0, BLOCK_F)
    slots = tl.arange(0, ROOM)
    ids = _ids(kept, f, f < F)
    layer = (row * P + place) * E  # of what each row has for each expert
    how, stop_of_row = tl.load(measure + row), tl.load(top_k + row)
    num_kept, divisor = tl.load(filter + row), tl.load(temperature + row)
    places = slots
    weights = tl.zeros((ROOM,), tl.float32)
    scores = tl.zeros((ROOM,), tl.float32)
    dense = tl.zeros((BLOCK_F,), tl.float32)
    start = 0
    stop = 0
    if how >= 0:
        singular_values += place * E * RANK
        values, first = _scores(z, ids, singular_values, how, F, RANK, BLOCK_F, BLOCK_R)
        if mean is not None:
            values -= tl.load(mean + layer + ids, mask=f < F, other=0)
            # On a GPU `/` is not rounded to nearest, and could choose another expert than torch.
            values = tl.div_rn(values, tl.load(std + layer + ids, mask=f < F, other=1))
        if num_kept < F:
            by_arrow = tl.where(f < F, _keys(first, f), LEAST)
            _, last_kept = _best(by_arrow, num_kept, 1)
            values = tl.where(by_arrow >= last_kept, values, -float("inf"))
        stop = stop_of_row
        keys = tl.where(f < F, _keys(values, f), LEAST)
        best, last = _best(keys, stop, ROOM)
        places = tl.where(slots < stop, _places(best), 0)
        scores = tl.where(slots < stop, _values(best), 0)
        weights = tl.where(slots < stop, 1.0, 0.0)
        dense = tl.where(keys >= last, 1.0, 0.0)
        if divisor > 0:
            # The lead is divided, not the score, whose rounding a low temperature would magnify.
            top = _values(tl.max(keys, axis=0))
            weights *= tl.exp(tl.where(slots < stop, scores - top, 0) / divisor)
            dense *= tl.exp(tl.where(keys >= last, values - top, 0) / divisor)
        total = tl.sum(weights, axis=0)
        weights, dense = tl.div_rn(weights, total), tl.div_rn(dense, total)
    elif constant is not None:
        constant += layer
        dense = tl.load(constant + ids, mask=f < F, other=0)
        weights = tl.load(constant + _ids(kept, slots, slots < F), mask=slots < F, other=0)
        start = tl.min(tl.where(dense != 0, f, F), axis=0)
        stop = tl.max(tl.where(dense != 0, f + 1, 0), axis=0)
    return places, weights, scores, start, stop, dense


@triton.jit
def _record(
    places_out, weights_out, scores_out, start, num, places, weights, scores, ROOM: tl.constexpr
):
    """Write the first `num` slots of what was chosen, from this place on."""
    slots = tl.arange(0, ROOM)
    out, mask = start + slots, slots < num
    tl.store(places_out + out, places.to(places_out.dtype.element_ty), mask=mask)
    tl.store(weights_out + out, weights, mask=mask)
    tl.store(scores_out + out, scores, mask=mask)


@triton.jit
def _merged(
    z,
    places,
    weights,
    start,
    stop,
    RANK: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """`sum_e w_e z_e` (BLOCK_RANK,) of the experts in these slots."""
    i = tl.arange(0, BLOCK_RANK)
    merged = tl.zeros((BLOCK_RANK,), tl.float32)
    for k in range(start, stop, BLOCK_EXPERTS):
        slots = k + tl.arange(0, BLOCK_EXPERTS)
        at = tl.minimum(slots, ROOM - 1)
        weight = tl.where(slots < stop, tl.gather(weights, at, 0), 0)
        mask = (weight != 0)[:, None] & (i < RANK)[None, :]
        rows = tl.gather(places, at, 0)[:, None] * RANK + i[None, :]
        values = tl.load(z + rows, mask=mask, other=0).to(tl.float32)
        merged += tl.sum(weight[:, None] * values, axis=0)
    return merged


@triton.jit
def _layer(row, ys, y_strides, Bs, COLUMNS: tl.constexpr, STARTS: tl.constexpr):
    """Of the layers of a bank, the one that has this block of columns: its place, the row of its y,
    its B, its number of columns, and which of its blocks this is.

    They are selected, not branched on: the compiler then knows what divides them all, and reads in
    vectors.
    """
    block = tl.program_id(1)
    place = 0
    first = 0
    num_columns = tl.full((), COLUMNS[0], tl.int32)
    y, B = ys[0] + row * y_strides[0], Bs[0]
    for p in tl.static_range(1, len(STARTS)):
        is_past = block >= STARTS[p]
        place = tl.where(is_past, p, place)
        first = tl.where(is_past, STARTS[p], first)
        num_columns = tl.where(is_past, COLUMNS[p], num_columns)
        y = tl.where(is_past, ys[p] + row * y_strides[p], y)
        B = tl.where(is_past, Bs[p], B)
    return place, y, B, num_columns, block - first


@triton.jit(do_not_specialize=["num_slots"])
def add_chosen(
    ys,
    y_strides,
    z,
    Bs,
    singular_values,
    measure,
    top_k,
    filter,
    temperature,
    is_merged,
    mean,
    std,
    constant,
    kept,
    places_out,
    weights_out,
    scores_out,
    step,
    num_slots,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STARTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`operators.add_chosen_`; a program for each row and BLOCK_D columns of a layer's y. COLUMNS:
    of each y; STARTS: the first program of each."""
    row = tl.program_id(0).to(tl.int64)
    place, y, B, num_columns, block = _layer(row, ys, y_strides, Bs, COLUMNS, STARTS)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < num_columns
    y += d
    before = tl.load(y, mask=inside, other=0)
    merges = tl.load(is_merged + row) != 0
    z += (row * P + place) * F * RANK
    if kept is not None:
        kept += (row * P + place) * F
    places, weights, scores, start, stop, _ = _choose(
        z,
        kept,
        singular_values,
        measure,
        top_k,
        filter,
        temperature,
        mean,
        std,
        constant,
        row,
        place,
        P,
        E,
        F,
        RANK,
        BLOCK_F,
        BLOCK_R,
        ROOM,
    )
    if places_out is not None:
        token = tl.load(step)
        is_recorded = (tl.load(measure + row) >= 0) & (token < num_slots) & (block == 0)
        num = tl.where(is_recorded, WIDTH, 0)
        layer = (row * num_slots + token) * P + place
        ids = _ids(kept, places, tl.arange(0, ROOM) < stop)
        _record(places_out, weights_out, scores_out, layer * WIDTH, num, ids, weights, scores, ROOM)

    merged = tl.zeros((BLOCK_RANK,), tl.float32)
    if merges:
        merged = _merged(z, places, weights, start, stop, RANK, ROOM, BLOCK_RANK, BLOCK_EXPERTS)

    total = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(start * RANK, stop * RANK, BLOCK_ROWS):
        rows = begin + tl.arange(0, BLOCK_ROWS)  # of the chosen experts' factors, one after another
        at, i = tl.minimum(rows // RANK, ROOM - 1), rows % RANK
        expert = tl.gather(places, at, 0)
        weight = tl.where(rows < stop * RANK, tl.gather(weights, at, 0), 0)
        mask = weight != 0
        if merges:
            values = tl.gather(merged, i, 0)
        else:
            values = tl.load(z + expert * RANK + i, mask=mask, other=0).to(tl.float32)
        rows_of_B = _ids(kept, expert, mask).to(tl.int64) * RANK + i
        at_B = B + rows_of_B[:, None] * num_columns + d[None, :]
        factors = tl.load(at_B, mask=mask[:, None] & inside[None, :], other=0)
        total += tl.sum((weight * values)[:, None] * factors.to(tl.float32), axis=0)
    total += before.to(tl.float32)
    tl.store(y, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def weigh(
    weighed,
    z,
    T,
    singular_values,
    measure,
    top_k,
    filter,
    temperature,
    is_merged,
    mean,
    std,
    constant,
    places_out,
    weights_out,
    scores_out,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROOM: tl.constexpr,
):
    """`operators.weigh`; a program for each token and layer."""
    token, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = token // T
    z += (token * P + place) * E * RANK
    weighed += (token * P + place) * E * RANK
    places, weights, scores, _, _, dense = _choose(
        z,
        None,
        singular_values,
        measure,
        top_k,
        filter,
        temperature,
        mean,
        std,
        constant,
        row,
        place,
        P,
        E,
        E,
        RANK,
        BLOCK_F,
        BLOCK_R,
        ROOM,
    )
    if places_out is not None:
        num = tl.where(tl.load(measure + row) >= 0, WIDTH, 0)
        layer = token * P + place
        _record(
            places_out, weights_out, scores_out, layer * WIDTH, num, places, weights, scores, ROOM
        )
    merges = tl.load(is_merged + row) != 0
    e = tl.arange(0, BLOCK_F)
    for start in range(0, RANK, BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        at = e[:, None] * RANK + i[None, :]
        inside = (e < E)[:, None] & (i < RANK)[None, :]
        values = tl.load(z + at, mask=inside & (dense != 0)[:, None], other=0).to(tl.float32)
        values *= dense[:, None]
        if merges:
            values = dense[:, None] * tl.sum(values, axis=0)[None, :]
        tl.store(weighed + at, values.to(weighed.dtype.element_ty), mask=inside)


@triton.jit
def project_kept(
    z,
    kept,
    x,
    x_stride,
    A,
    arrows,
    P: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    RANK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`operators.project_kept`; a program for each token, layer and kept expert."""
    layer, f = tl.program_id(0).to(tl.int64), tl.program_id(1)  # of all layers of all tokens
    token, place = layer // P, layer % P
    e = tl.arange(0, BLOCK_E)
    lengths = tl.abs(tl.load(arrows + layer * E + e, mask=e < E, other=0).to(tl.float32))
    _, last = _best(tl.where(e < E, _keys(lengths, e), LEAST), f + 1, 1)
    expert = _places(last)
    tl.store(kept + layer * F + f, expert)
    i, d = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_D)
    A += ((place * E + expert) * RANK + i[:, None]) * D
    x += token * x_stride
    total = tl.zeros((BLOCK_RANK, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = start + d < D
        value = tl.load(x + start + d, mask=mask, other=0).to(A.dtype.element_ty)
        factors = tl.load(A + start + d[None, :], mask=(i < RANK)[:, None] & mask[None, :], other=0)
        total += factors.to(tl.float32) * value.to(tl.float32)[None, :]
    out = z + (layer * F + f) * RANK + i
    tl.store(out, tl.sum(total, axis=1).to(z.dtype.element_ty), mask=i < RANK)
