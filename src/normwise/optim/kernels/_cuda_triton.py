# Triton types these functions itself. What it decides at compile time stands in an if of its own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: SIM102, SIM108
"""One step for many tensors on a CUDA device, compiled by Triton.

A weight in memory order is an array ``(outer, slices, inner)``: slices of ``outer·inner`` entries.
Programs share out a list of chunks, which together hold all weights. There are these kernels:

``prepare``     counts the steps, and computes the numbers of this step from what only the device
                may know: step counts, tensor learning rates, the scale of the loss.
``flat_pass``   is the whole step of weights without slices.
``first_pass``  reads w, g, m, v; writes m, v; sums ⟨w, u⟩, ‖w‖², … while a slice is in registers,
                and writes ``w ← α·w − σ·u``: decay and projection are both multiples of w.
``decide``      adds up what the first pass found of a weight: slices that several programs shared,
                and in ``"auto"`` whether the gate opens.
``finish``      computes α and σ of slices that lie on several ranks, from exchanged sums.
``second_pass`` writes the weights that the first could not, and corrects those that it wrote on a
                wrong guess of the gate, as ``_cpu_numba`` explains.

``flat_pass`` and ``first_pass`` are compiled and launched for each form of tile that the weights
need, some eight at most. The last two are for ``"auto"``, and for slices too long for one program.
Sums are made in float32 within a tile and in float64 across tiles; in float64 at once where float32
would over- or underflow. The few numbers of a slice are float64 throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tables are int64; entries marked with ° are the bits of a float64.
# Entries of the state of a step: first what ``prepare`` makes,
GRAD = tl.constexpr(0)  # ° what gradients are multiplied by
SCALE = tl.constexpr(1)  # ° of the loss
SKIP = tl.constexpr(2)  # 1 if a gradient is not finite
NOISE = tl.constexpr(3)  # steps taken, for stochastic rounding
# then what the host sends: numbers °,
LR = tl.constexpr(4)
WEIGHT_DECAY = tl.constexpr(5)
DECAY_SCALE = tl.constexpr(6)
WD_RATIO = tl.constexpr(7)
SIGN = tl.constexpr(8)  # of the gradient
LOG_BETA1 = tl.constexpr(9)
LOG_BETA2 = tl.constexpr(10)
M_KEEP = tl.constexpr(11)
M_ADD = tl.constexpr(12)
V_KEEP = tl.constexpr(13)
V_ADD = tl.constexpr(14)
LOOK_AHEAD = tl.constexpr(15)
EPS = tl.constexpr(16)
DELTA = tl.constexpr(17)
GUARD = tl.constexpr(18)
ADDRESSES = tl.constexpr(19)
# and five addresses for each tensor.
W = tl.constexpr(0)
G = tl.constexpr(1)
M = tl.constexpr(2)
V = tl.constexpr(3)
COUNT = tl.constexpr(4)
ADDRESS_COLUMNS = tl.constexpr(5)
# Columns of the table of tensors.
SLICES = tl.constexpr(0)
INNER = tl.constexpr(1)
LENGTH = tl.constexpr(2)  # entries of a slice
MODE = tl.constexpr(3)
FIRST = tl.constexpr(4)  # its chunks
LAST = tl.constexpr(5)
PIECES = tl.constexpr(6)  # programs that share a slice; 0 if slices stay whole
SLOT = tl.constexpr(7)  # its slices in the table of slices
GUESS = tl.constexpr(8)  # the decision to act on before it is made
ACTED = tl.constexpr(9)  # the guess that the first pass acted on
DECISION = tl.constexpr(10)
REVISIT = tl.constexpr(11)
STEP = tl.constexpr(12)  # ° σ
DENOMINATOR = tl.constexpr(13)  # ° 1/√(1 − β2^t)
DECAY = tl.constexpr(14)  # ° of a weight that is not projected
DECAY_PROJECTED = tl.constexpr(15)  # °
BY_LAYER_COEFFICIENT = tl.constexpr(16)  # °
TOTALS = tl.constexpr(17)  # ° four sums as of a chunk, and whether a channel shuts the gate
TENSOR_COLUMNS = tl.constexpr(22)
# Columns of the tables of chunks.
TENSOR = tl.constexpr(0)
SLICE = tl.constexpr(1)  # its first slice
BEGIN = tl.constexpr(2)  # its entries of a slice, or of the memory of a weight
END = tl.constexpr(3)
OPEN = tl.constexpr(4)  # whether all its channels open the gate
SAFE = tl.constexpr(5)  # whether all of it was written on the guess
WU = tl.constexpr(6)  # ° sums over the chunk; z is the gradient in "auto", else u
WW = tl.constexpr(7)  # °
WZ = tl.constexpr(8)  # °
ZZ = tl.constexpr(9)  # °
CHUNK_COLUMNS = tl.constexpr(10)
# Columns of the table of slices °: α and σ; or in "auto" the coefficient of the radial part; and of
# slices that lie on several ranks four sums, in the order of the chunks'.
KEEP = tl.constexpr(0)
COEFFICIENT = tl.constexpr(0)
ADD = tl.constexpr(1)
SLICE_COLUMNS = tl.constexpr(2)
SUMS = tl.constexpr(2)
SPLIT_SLICE_COLUMNS = tl.constexpr(6)
# Modes: what a weight's slices are for.
FREE = tl.constexpr(0)
EXPLICIT = tl.constexpr(1)
FIXED = tl.constexpr(2)
AUTO = tl.constexpr(3)
# Decisions of the gate; the first guess is UNKNOWN, on which nothing is written.
UNKNOWN = tl.constexpr(-1)
SHUT = tl.constexpr(0)
BY_CHANNEL = tl.constexpr(1)
BY_LAYER = tl.constexpr(2)
# Aligned rows begin and end at multiples of so many entries: 16 bytes of bfloat16.
ALIGNMENT = tl.constexpr(8)
# How a step is taken: flags of ``how``. (The interpreter wants them on the left of &.)
ADAM = tl.constexpr(1)
NESTEROV = tl.constexpr(2)
BUFFERED = tl.constexpr(4)
LR_IN_BUFFER = tl.constexpr(8)
SCALED = tl.constexpr(16)  # gradients are to be divided by the scale of the loss
STOCHASTIC = tl.constexpr(32)
GATED = tl.constexpr(64)  # the view is "auto"
LR_ON_DEVICE = tl.constexpr(128)
WEIGHT_DECAY_ON_DEVICE = tl.constexpr(256)
SPLIT = tl.constexpr(512)  # slices lie on several ranks: nothing is written before an exchange
# Parts of ``decide``: what it adds up here, and what it decides; between them ranks exchange.
ADD_UP = tl.constexpr(1)
DECIDE = tl.constexpr(2)


@triton.jit
def _get(table, column):
    """A float64 of a table."""
    return tl.load((table + column).to(tl.pointer_type(tl.float64), bitcast=True))


@triton.jit
def _slice(slices, number, how: tl.constexpr):
    """Where in the table of slices a slice is."""
    if SPLIT & how:
        at = slices + number * SPLIT_SLICE_COLUMNS
    else:
        at = slices + number * SLICE_COLUMNS
    return at


@triton.jit
def _set(table, column, value, mask=None):
    tl.store((table + column).to(tl.pointer_type(tl.float64), bitcast=True), value, mask)


@triton.jit
def _address(state, tensor, column, dtype: tl.constexpr, aligned: tl.constexpr):
    at = tl.load(state + ADDRESSES + tensor * ADDRESS_COLUMNS + column)
    pointer = at.to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["count"])
def prepare(
    state,
    tensors,
    lr_at,
    weight_decay_at,
    scale_at,
    found_inf_at,
    count,
    how: tl.constexpr,
    block: tl.constexpr,
):
    """Count the steps; fill in the factors of each tensor."""
    lr, weight_decay = _get(state, LR), _get(state, WEIGHT_DECAY)
    if LR_ON_DEVICE & how:
        lr = tl.load(lr_at).to(tl.float64)
    if WEIGHT_DECAY_ON_DEVICE & how:
        weight_decay = tl.load(weight_decay_at).to(tl.float64)
    taken = 1
    if SCALED & how:
        taken = (tl.load(found_inf_at) == 0).to(tl.int32)

    i = tl.program_id(0) * block + tl.arange(0, block)
    mask = i < count
    about = tensors + i * TENSOR_COLUMNS
    decay = lr * _get(state, DECAY_SCALE) * weight_decay
    zero = tl.zeros([block], tl.float64)
    _set(about, DECAY, zero + (1 - decay), mask)
    _set(about, DECAY_PROJECTED, zero + (1 - decay * _get(state, WD_RATIO)), mask)
    if ADAM & how:
        at = tl.load(state + ADDRESSES + i * ADDRESS_COLUMNS + COUNT, mask, other=0)
        at = at.to(tl.pointer_type(tl.float32))
        step = tl.load(at, mask, other=0) + taken
        tl.store(at, step, mask)
        # It is 0 yet if the first step is skipped.
        t = tl.maximum(step, 1.0).to(tl.float64)
        _set(about, STEP, lr / (1 - tl.exp(t * _get(state, LOG_BETA1))), mask)
        correction = tl.sqrt(1 - tl.exp(t * _get(state, LOG_BETA2)))
        _set(about, DENOMINATOR, 1 / correction, mask)
    elif LR_IN_BUFFER & how:
        _set(about, STEP, zero + 1, mask)
    else:
        _set(about, STEP, zero + lr, mask)

    if tl.program_id(0) == 0:
        grad = _get(state, SIGN)
        if LR_IN_BUFFER & how:
            grad = grad * lr
        _set(state, GRAD, grad)
        tl.store(state + SKIP, 1 - taken)
        tl.store(state + NOISE, tl.load(state + NOISE) + 1)
        if SCALED & how:
            _set(state, SCALE, tl.load(scale_at).to(tl.float64))


@triton.jit
def _direction(
    state,
    about,
    tensor,
    at,
    mask,
    update: tl.constexpr,
    aligned: tl.constexpr,
    how: tl.constexpr,
    dtype: tl.constexpr,
    compute: tl.constexpr,
):
    """The gradient, and the direction u; with ``update`` the moments go on to this step.

    Adam's u is m̂/(√v̂ + eps), with m̂ one step ahead for Nesterov; the step size has 1/(1 − β1^t).
    SGD's is p, or g + μp for Nesterov, with the buffer p ← μp + (1 − dampening)g.
    """
    # All is asked of memory before anything is written, since what is read after a write waits.
    g_at = _address(state, tensor, G, dtype, aligned) + at
    sign, m_add = _get(state, GRAD).to(compute), _get(state, M_ADD).to(compute)
    look_ahead = _get(state, LOOK_AHEAD).to(compute)
    if BUFFERED & how:
        m_at = _address(state, tensor, M, compute, aligned) + at
    if ADAM & how:
        v_at = _address(state, tensor, V, compute, aligned) + at
        v_keep, v_add = _get(state, V_KEEP).to(compute), _get(state, V_ADD).to(compute)
        denominator, eps = _get(about, DENOMINATOR).to(compute), _get(state, EPS).to(compute)
    g = tl.load(g_at, mask, other=0)
    if BUFFERED & how:
        m = tl.load(m_at, mask, other=0)
    if ADAM & how:
        v = tl.load(v_at, mask, other=0)
    if SCALED & how:
        if update:
            g = (g.to(compute) / _get(state, SCALE).to(compute)).to(dtype)
            tl.store(g_at, g, mask)
    g = g.to(compute) * sign
    if BUFFERED & how:
        if update:
            if ADAM & how:
                m = m + m_add * (g - m)
            else:
                m = _get(state, M_KEEP).to(compute) * m + m_add * g
            tl.store(m_at, m, mask)
        u = m
        if NESTEROV & how:
            if ADAM & how:
                u = m + look_ahead * (g - m)
            else:
                u = g + look_ahead * m
    else:
        u = m_add * g
    if ADAM & how:
        if update:
            v = v_keep * v + v_add * g * g
            tl.store(v_at, v, mask)
        # What is masked must not become 0/0.
        u = tl.where(mask, u / (tl.sqrt(v) * denominator + eps), 0.0)
    return g, u


@triton.jit
def _rounded(w, at, state, tensor, seed, how: tl.constexpr, dtype: tl.constexpr):
    """w as an entry to store; if STOCHASTIC, as _base.round_stochastically rounds."""
    if STOCHASTIC & how:
        low: tl.constexpr = 0xFFFF if dtype == tl.bfloat16 else 0x1FFF
        stream = seed + tl.load(state + NOISE).to(tl.int32) * 65537 + tensor.to(tl.int32)
        noise = tl.randint(stream, at.to(tl.int32)).to(tl.int32, bitcast=True)
        bits = w.to(tl.int32, bitcast=True) + (noise & low)
        rounded = (bits & ~low).to(tl.float32, bitcast=True)
        if dtype == tl.float16:
            # Its subnormal numbers are the multiples of 2^-24.
            uniform = (noise & 0xFFFFFF).to(tl.float32) * 2.0**-24
            subnormal = tl.floor(w * 2.0**24 + uniform) * 2.0**-24
            rounded = tl.where(tl.abs(w) < 2.0**-14, subnormal, rounded)
        w = tl.where(tl.abs(w) < float("inf"), rounded, w)
    return w.to(dtype)


@triton.jit
def _combined(w, u, keep, add, compute: tl.constexpr):
    """keep·w + add·u."""
    new = keep.to(compute) * w + add.to(compute) * u
    # For a tiny weight the coefficient of the radial part is beyond float32; c·w is not.
    if tl.max(tl.reshape((tl.abs(keep) > 1e30).to(tl.int32), [keep.numel]), 0) > 0:
        new = (keep * w.to(tl.float64) + add * u.to(tl.float64)).to(compute)
    return new


@triton.jit
def _sums(w, u, z, row, fixed, compute: tl.constexpr):
    """⟨w, u⟩, ‖w‖², ⟨w, z⟩, ‖z‖² of each row, in float64; ``row`` says where there is one.

    If ``fixed``, the way back to a norm is made of ‖u‖² − ⟨w, u⟩²/‖w‖², in which float32 has no
    digits left where u is nearly radial.
    """
    wu, ww = tl.sum(w * u, 1).to(tl.float64), tl.sum(w * w, 1).to(tl.float64)
    wz, zz = tl.sum(w * z, 1).to(tl.float64), tl.sum(z * z, 1).to(tl.float64)
    if compute == tl.float32:
        # Of ⟨w, u⟩ no look at what underflowed is needed: it is below 1e-37, so 1e-17·‖w‖².
        exact = (ww > 1e-20) & (ww < 1e30) & (zz > 1e-20) & (zz < 1e30)
        exact = exact & (tl.abs(wu) < 1e30) & (tl.abs(wz) < 1e30)
        exact = exact & ((wz * wz < 0.9 * ww * zz) | (fixed == 0))
        if tl.min((exact | (row == 0)).to(tl.int32), 0) == 0:
            x, y, t = w.to(tl.float64), u.to(tl.float64), z.to(tl.float64)
            wu, ww, wz, zz = tl.sum(x * y, 1), tl.sum(x * x, 1), tl.sum(x * t, 1), tl.sum(t * t, 1)
    return wu, ww, wz, zz


@triton.jit
def _is_orthogonal(wz, ww, zz, guard, gate):
    """Whether projection._guarded_cosine < gate: |⟨w, g⟩|/(max(‖w‖, eps)·max(‖g‖, eps)) < gate.

    In squares, because a root and a quotient in float64 take as long as the whole of a short slice.
    """
    least = guard * guard
    bound = gate * gate * tl.maximum(ww, least) * tl.maximum(zz, least)
    return wz * wz < tl.where(wz == 0, gate, bound)


@triton.jit
def _radial_coefficient(wu, ww, eps):
    """c such that c·w is the radial part of u, shrunk as projection._shrinkage does."""
    positive = tl.where(ww == 0, 1.0, ww)
    norm = tl.sqrt(positive)
    left = norm / (norm + eps)
    return tl.where(ww == 0, 0.0, wu / positive * (left * left))


@triton.jit
def _explicit_factors(wu, ww, uu, step, decay_projected, is_fixed):
    """α and σ of slices in a View, with the norm put back if it is fixed."""
    positive = tl.where(ww == 0, 1.0, ww)
    coefficient = wu / positive
    # ‖w − σ(u − cw)‖² = ‖w‖² + σ²(‖u‖² − ⟨w, u⟩²/‖w‖²), as w and u − cw are orthogonal.
    moved = step * step * (uu - coefficient * wu)
    back = tl.sqrt(positive / (positive + tl.where(moved < 0, 0.0, moved)))
    back = tl.where(ww == 0, 0.0, back)
    back = tl.where(is_fixed, back, 1.0)
    return (decay_projected + step * coefficient) * back, step * back


@triton.jit
def _keep_of_gate(coefficient, decision, layer, step, decay, decay_projected):
    """α of slices in "auto", for a decision and the coefficients of the two views."""
    c = tl.where(decision == BY_LAYER, layer, coefficient)
    return tl.where(decision == SHUT, decay, decay_projected + step * c)


@triton.jit
def _is_safe(coefficient, guess, step, decay, decay_projected):
    """Whether slices may be written on a guess: see _cpu_numba._is_safe."""
    shut = 0.0 * coefficient + decay
    projected = decay_projected + step * coefficient
    near = (shut >= 0.5) & (shut <= 2) & (projected >= 0.5) & (projected <= 2)
    return near & ((guess == SHUT) | (guess == BY_CHANNEL))


@triton.jit(do_not_specialize=["seed"])
def flat_pass(
    state,
    tensors,
    chunks,
    seed,
    block: tl.constexpr,
    aligned: tl.constexpr,
    how: tl.constexpr,
    dtype: tl.constexpr,
    compute: tl.constexpr,
):
    """The whole step of a run of memory in a weight without slices."""
    if SCALED & how:
        if tl.load(state + SKIP) != 0:
            return
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    tensor, begin, end = tl.load(chunk + TENSOR), tl.load(chunk + BEGIN), tl.load(chunk + END)
    about = tensors + tensor * TENSOR_COLUMNS
    if aligned:
        begin, end = tl.multiple_of(begin, ALIGNMENT), tl.multiple_of(end, ALIGNMENT)
    at = begin + tl.arange(0, block)
    mask = at < end
    w_at = _address(state, tensor, W, dtype, aligned) + at
    decay, step = _get(about, DECAY).to(compute), _get(about, STEP).to(compute)
    w = tl.load(w_at, mask, other=0).to(compute)
    _, u = _direction(state, about, tensor, at, mask, True, aligned, how, dtype, compute)
    w = decay * w - step * u
    tl.store(w_at, _rounded(w, at, state, tensor, seed, how, dtype), mask)


@triton.jit(do_not_specialize=["seed"])
def first_pass(
    state,
    tensors,
    chunks,
    slices,
    seed,
    rows: tl.constexpr,
    columns: tl.constexpr,
    looped: tl.constexpr,
    strided: tl.constexpr,
    aligned: tl.constexpr,
    how: tl.constexpr,
    dtype: tl.constexpr,
    compute: tl.constexpr,
):
    """Take the step of some slices: the rows of one tile or, if ``looped``, of several."""
    if SCALED & how:
        if tl.load(state + SKIP) != 0:
            return
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    tensor = tl.load(chunk + TENSOR)
    about = tensors + tensor * TENSOR_COLUMNS
    begin, end = tl.load(chunk + BEGIN), tl.load(chunk + END)
    length, inner, n = tl.load(about + LENGTH), tl.load(about + INNER), tl.load(about + SLICES)
    if aligned:
        begin, end = tl.multiple_of(begin, ALIGNMENT), tl.multiple_of(end, ALIGNMENT)
        length = tl.multiple_of(length, ALIGNMENT)
    s = tl.load(chunk + SLICE) + tl.arange(0, rows)
    row = s < n
    w_at = _address(state, tensor, W, dtype, aligned)
    fixed = row & (s * 0 + tl.load(about + MODE) == FIXED)
    pieces, step = tl.load(about + PIECES), _get(about, STEP)
    decay_projected = _get(about, DECAY_PROJECTED)
    if GATED & how:
        decay, layer = _get(about, DECAY), _get(about, BY_LAYER_COEFFICIENT)
        guess, slot = tl.load(about + GUESS), tl.load(about + SLOT)
        eps, guard, delta = _get(state, EPS), _get(state, GUARD), _get(state, DELTA)

    wu = tl.zeros([rows], tl.float64)
    ww = tl.zeros([rows], tl.float64)
    wz = tl.zeros([rows], tl.float64)
    zz = tl.zeros([rows], tl.float64)
    if looped:
        for start in range(begin, end, columns):
            c = start + tl.arange(0, columns)
            at = _places(s, c, length, inner, n, strided)
            mask = row[:, None] & (c < end)[None, :]
            w = tl.load(w_at + at, mask, other=0).to(compute)
            g, u = _direction(state, about, tensor, at, mask, True, aligned, how, dtype, compute)
            x0, x1, x2, x3 = _sums(w, u, g if GATED & how else u, row, fixed, compute)
            wu += x0
            ww += x1
            wz += x2
            zz += x3
    else:
        c = tl.arange(0, columns)
        at = _places(s, c, length, inner, n, strided)
        mask = row[:, None] & (c < end)[None, :]
        w = tl.load(w_at + at, mask, other=0).to(compute)
        g, u = _direction(state, about, tensor, at, mask, True, aligned, how, dtype, compute)
        wu, ww, wz, zz = _sums(w, u, g if GATED & how else u, row, fixed, compute)

    whole = row & (s * 0 + pieces == 0)
    if SPLIT & how:
        at_sums = _slice(slices, tl.load(about + SLOT) + s, how) + SUMS
        _set(at_sums, 0, wu, whole)
        _set(at_sums, 1, ww, whole)
        _set(at_sums, 2, wz, whole)
        _set(at_sums, 3, zz, whole)
    elif GATED & how:
        guess = s * 0 + guess
        coefficient = _radial_coefficient(wu, ww, eps)
        at_slot = _slice(slices, slot + s, how)
        gate = delta / tl.sqrt(length.to(tl.float64))
        is_open = _is_orthogonal(wz, ww, zz, guard, gate) | (row == 0)
        # In half precision what was rounded away cannot be corrected.
        write = whole & _is_safe(coefficient, guess, step, decay, decay_projected)
        write = write & (dtype == compute)
        keep = _keep_of_gate(coefficient, guess, layer, step, decay, decay_projected)
        add = tl.zeros([rows], tl.float64) - step
        _set(at_slot, COEFFICIENT, coefficient, whole)
        tl.store(chunk + OPEN, tl.min(is_open.to(tl.int64), 0))
        tl.store(chunk + SAFE, tl.min((write | (row == 0)).to(tl.int64), 0))
    else:
        write = whole
        keep, add = _explicit_factors(wu, ww, zz, step, decay_projected, fixed)
        add = -add
    if (GATED & how) or looped:
        _set(chunk, WU, tl.sum(wu, 0))
        _set(chunk, WW, tl.sum(ww, 0))
        _set(chunk, WZ, tl.sum(wz, 0))
        _set(chunk, ZZ, tl.sum(zz, 0))

    if not (SPLIT & how):
        if looped:
            if pieces == 0:
                for start in range(begin, end, columns):
                    c = start + tl.arange(0, columns)
                    at = _places(s, c, length, inner, n, strided)
                    mask = row[:, None] & (c < end)[None, :]
                    _, u = _direction(
                        state, about, tensor, at, mask, False, aligned, how, dtype, compute
                    )
                    mask = mask & write[:, None]
                    w = tl.load(w_at + at, mask, other=0).to(compute)
                    w = _combined(w, u, keep[:, None], add[:, None], compute)
                    tl.store(w_at + at, _rounded(w, at, state, tensor, seed, how, dtype), mask)
        else:
            w = _combined(w, u, keep[:, None], add[:, None], compute)
            mask = mask & write[:, None]
            tl.store(w_at + at, _rounded(w, at, state, tensor, seed, how, dtype), mask)


@triton.jit
def _places(s, c, length, inner, n, strided: tl.constexpr):
    """Where in memory entries c of slices s are."""
    if strided:
        outer = c // inner
        at = (outer * (n * inner) + c - outer * inner)[None, :] + (s * inner)[:, None]
    else:
        at = (s * length)[:, None] + c[None, :]
    return at


@triton.jit
def decide(
    state,
    tensors,
    chunks,
    slices,
    how: tl.constexpr,
    block: tl.constexpr,
    parts: tl.constexpr,
):
    """Add up what the first pass found of a weight; decide its gate; say if it needs a second.

    The decision is that of projection.gated_radial.
    """
    if SCALED & how:
        if tl.load(state + SKIP) != 0:
            return
    about = tensors + tl.program_id(0).to(tl.int64) * TENSOR_COLUMNS
    mode, pieces, n = tl.load(about + MODE), tl.load(about + PIECES), tl.load(about + SLICES)
    first, last = tl.load(about + FIRST), tl.load(about + LAST)
    if mode == FREE:
        return
    guard, eps, delta = _get(state, GUARD), _get(state, EPS), _get(state, DELTA)
    length = tl.load(about + LENGTH).to(tl.float64)
    gate = delta / tl.sqrt(length)
    if ADD_UP & parts:
        wu = 0.0 * gate
        ww = 0.0 * gate
        wz = 0.0 * gate
        zz = 0.0 * gate
        is_open = (n * 0 + 1).to(tl.int64)
        safe = is_open
        if pieces > 0:
            for s in range(n):
                a, b, c, d, _, _ = _added_up(
                    chunks, first + s * pieces, first + (s + 1) * pieces, block
                )
                slot = _slice(slices, tl.load(about + SLOT) + s, how)
                if SPLIT & how:
                    _set(slot, SUMS, a)
                    _set(slot, SUMS + 1, b)
                    _set(slot, SUMS + 2, c)
                    _set(slot, SUMS + 3, d)
                elif GATED & how:
                    _set(slot, COEFFICIENT, _radial_coefficient(a, b, eps))
                    is_open = is_open & _is_orthogonal(c, b, d, guard, gate).to(tl.int64)
                    wu += a
                    ww += b
                    wz += c
                    zz += d
                else:
                    keep, step = _explicit_factors(
                        a, b, d, _get(about, STEP), _get(about, DECAY_PROJECTED), mode == FIXED
                    )
                    _set(slot, KEEP, keep)
                    _set(slot, ADD, -step)
            tl.store(about + REVISIT, is_open * 0 + 1)
            safe = is_open * 0
        elif GATED & how:
            wu, ww, wz, zz, is_open, safe = _added_up(chunks, first, last, block)
        if GATED & how:
            _set(about, TOTALS, wu)
            _set(about, TOTALS + 1, ww)
            _set(about, TOTALS + 2, wz)
            _set(about, TOTALS + 3, zz)
            # A weight without a gradient shuts nothing.
            _set(about, TOTALS + 4, ((is_open == 0) & (zz > 0)).to(tl.float64))
            tl.store(about + REVISIT, (safe == 0).to(tl.int64))
    if (GATED & how) and (DECIDE & parts) and not (SPLIT & how):
        if parts == DECIDE:
            wu, ww = _get(about, TOTALS), _get(about, TOTALS + 1)
            wz, zz = _get(about, TOTALS + 2), _get(about, TOTALS + 3)
            is_open = (_get(about, TOTALS + 4) == 0).to(tl.int64)
            safe = 1 - tl.load(about + REVISIT)
        by_layer = (zz > 0) & _is_orthogonal(wz, ww, zz, guard, delta / tl.sqrt(length * n))
        by_channel = (zz > 0) & (is_open != 0)
        decision = tl.where(by_channel, BY_CHANNEL, tl.where(by_layer, BY_LAYER, SHUT))
        decision = decision.to(tl.int64)
        _set(about, BY_LAYER_COEFFICIENT, _radial_coefficient(wu, ww, eps))
        guess, before = tl.load(about + GUESS), tl.load(about + DECISION)
        revisit = (decision != guess) | (safe == 0)
        tl.store(about + REVISIT, revisit.to(tl.int64))
        tl.store(about + ACTED, guess)
        tl.store(about + DECISION, decision)
        # A random gradient passes the layer gate now and then; that says nothing of the next.
        settled = (decision == before) | (before == UNKNOWN)
        tl.store(about + GUESS, tl.where(settled, decision, guess))


@triton.jit
def finish(state, tensors, slices, how: tl.constexpr, block: tl.constexpr):
    """α and σ of slices that lie on several ranks, from sums that these have exchanged."""
    if SCALED & how:
        if tl.load(state + SKIP) != 0:
            return
    about = tensors + tl.program_id(0).to(tl.int64) * TENSOR_COLUMNS
    mode, n = tl.load(about + MODE), tl.load(about + SLICES)
    if mode == FREE:
        return
    tl.store(about + REVISIT, n * 0 + 1)
    for start in range(0, n, block):
        s = start + tl.arange(0, block)
        mask = s < n
        at = _slice(slices, tl.load(about + SLOT) + s, how)
        sums = (at + SUMS).to(tl.pointer_type(tl.float64), bitcast=True)
        wu, ww = tl.load(sums, mask, other=0), tl.load(sums + 1, mask, other=0)
        uu = tl.load(sums + 3, mask, other=0)
        fixed = mask & (s * 0 + mode == FIXED)
        keep, step = _explicit_factors(
            wu, ww, uu, _get(about, STEP), _get(about, DECAY_PROJECTED), fixed
        )
        _set(at, KEEP, keep, mask)
        _set(at, ADD, -step, mask)


@triton.jit
def _added_up(chunks, first, last, block: tl.constexpr):
    """The sums of some chunks, and whether all are open and safe."""
    wu = tl.zeros([block], tl.float64)
    ww = tl.zeros([block], tl.float64)
    wz = tl.zeros([block], tl.float64)
    zz = tl.zeros([block], tl.float64)
    is_open = tl.full([block], 1, tl.int64)
    safe = tl.full([block], 1, tl.int64)
    for start in range(first, last, block):
        i = start + tl.arange(0, block)
        mask = i < last
        chunk = chunks + i * CHUNK_COLUMNS
        sums = chunk.to(tl.pointer_type(tl.float64), bitcast=True)
        wu += tl.load(sums + WU, mask, other=0)
        ww += tl.load(sums + WW, mask, other=0)
        wz += tl.load(sums + WZ, mask, other=0)
        zz += tl.load(sums + ZZ, mask, other=0)
        is_open = is_open & tl.load(chunk + OPEN, mask, other=1)
        safe = safe & tl.load(chunk + SAFE, mask, other=1)
    return (
        tl.sum(wu, 0),
        tl.sum(ww, 0),
        tl.sum(wz, 0),
        tl.sum(zz, 0),
        tl.min(is_open, 0),
        tl.min(safe, 0),
    )


@triton.jit(do_not_specialize=["seed"])
def second_pass(
    state,
    tensors,
    runs,
    slices,
    seed,
    how: tl.constexpr,
    dtype: tl.constexpr,
    compute: tl.constexpr,
    block: tl.constexpr,
):
    """Write a run of memory of a weight that the first pass left, or wrote on a wrong guess."""
    if SCALED & how:
        if tl.load(state + SKIP) != 0:
            return
    run = runs + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    tensor = tl.load(run + TENSOR)
    about = tensors + tensor * TENSOR_COLUMNS
    if tl.load(about + REVISIT) == 0:
        return
    begin, end = tl.load(run + BEGIN), tl.load(run + END)
    for start in range(begin, end, block):
        at = start + tl.arange(0, block)
        mask = at < end
        s = (at // tl.load(about + INNER)) % tl.load(about + SLICES)
        values = _slice(slices, tl.load(about + SLOT) + s, how).to(
            tl.pointer_type(tl.float64), bitcast=True
        )
        if (GATED & how) and not (SPLIT & how):
            coefficient = tl.load(values + COEFFICIENT, mask, other=0)
            decision, acted = s * 0 + tl.load(about + DECISION), s * 0 + tl.load(about + ACTED)
            layer, step = _get(about, BY_LAYER_COEFFICIENT), _get(about, STEP)
            decay, decay_projected = _get(about, DECAY), _get(about, DECAY_PROJECTED)
            keep = _keep_of_gate(coefficient, decision, layer, step, decay, decay_projected)
            add = tl.zeros([block], tl.float64) - step
            if (dtype == compute) and tl.load(about + PIECES) == 0:
                written = _is_safe(coefficient, acted, step, decay, decay_projected)
                before = _keep_of_gate(coefficient, acted, layer, step, decay, decay_projected)
                mask = mask & ((written == 0) | (decision != acted))
                keep = tl.where(written, keep / before, keep)
                add = tl.where(written, (keep - 1) * step, add)
        else:
            keep, add = tl.load(values + KEEP, mask, other=0), tl.load(values + ADD, mask, other=0)
        _, u = _direction(state, about, tensor, at, mask, False, False, how, dtype, compute)
        w_at = _address(state, tensor, W, dtype, False) + at
        w = tl.load(w_at, mask, other=0).to(compute)
        w = _combined(w, u, keep, add, compute)
        tl.store(w_at, _rounded(w, at, state, tensor, seed, how, dtype), mask)
