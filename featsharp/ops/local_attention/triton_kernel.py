"""Local attention as Triton kernels: inputs are read, the output is written, nothing in between touches memory.

A program owns a tile of 8 x 8 queries (or keys, for their gradients) of one head and walks over the tile's surroundings
in steps of 64 cells, with a running softmax. Gradients of keys and values are gathered from the queries that see them,
so the kernels need no atomic additions.

Under ``TRITON_INTERPRET=1`` the same kernels run on the CPU, slowly: that is how they are tested without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from featsharp.ops.windows import border_cells

SIDE = 8  # queries or keys along a side of a tile
STEP = 64  # cells of the surroundings at a time
BORDERS = {"clip": 0, "reflect": 1, "replicate": 2, "zeros": 3, "shift": 4}


@triton.jit
def _cell(position, length, BORDER: tl.constexpr, K: tl.constexpr):
    """The cell to read for a position along an axis, and whether that is a real one; as ``border_cells``."""
    inside = (position >= 0) & (position < length)
    cell = position
    if BORDER == 1:
        period = tl.maximum(2 * (length - 1), 1)
        cell = position % period
        cell = tl.where(cell < 0, cell + period, cell)
        cell = tl.minimum(cell, period - cell)
    if BORDER == 1 or BORDER == 2:
        inside = position == position
    if BORDER == 4:
        cell = tl.where(inside, position, tl.where(position < 0, position + K, position - K))
        inside = (cell >= 0) & (cell < length)
    return tl.minimum(tl.maximum(cell, 0), length - 1), inside


@triton.jit
def _offset(y, x, row, col):
    """Offset of (y, x), in numbers; a map may have more than 32 bits count."""
    return y.to(tl.int64) * row + x * col


@triton.jit
def _rows(pointer, offsets, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr, start, DOT: tl.constexpr):
    """[rows, BLOCK] channels from ``start`` on, of the rows at ``offsets``; zeros where there is nothing."""
    channel = start + tl.arange(0, BLOCK)
    mask = mask[:, None] & (channel < SIZE)[None]
    return tl.load(pointer + offsets[:, None] + channel[None], mask=mask, other=0.0).to(DOT)


@triton.jit
def _scores(q, k, bias_pointer, qy, qx, ky, kx, real, F: tl.constexpr, K: tl.constexpr, BORDER: tl.constexpr):
    """Scores [queries, keys] with bias, -inf outside of the windows; the window entries; what lies within them.

    (qy, qx) are positions of queries, (ky, kx) of keys, which may be beyond the border.
    """
    i = ky[None] - qy[:, None] // F + K // 2
    j = kx[None] - qx[:, None] // F + K // 2
    within = (i >= 0) & (i < K) & (j >= 0) & (j < K)
    if BORDER == 0 or BORDER == 4:
        within = within & real[None]
    entry = tl.where(within, i * K + j, 0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") + tl.load(bias_pointer + entry)
    return tl.where(within, scores, float("-inf")), entry, within


@triton.jit
def _softmax_of(scores, log_sum):
    """Weights from scores and the logarithm of their sum; rows without any key get none."""
    return tl.where(scores > float("-inf"), tl.exp(scores - log_sum[:, None]), 0.0)


@triton.jit
def _forward_kernel(
    q_ptr, qb, qr, qc, qn, k_ptr, kb, kr, kc, kn, v_ptr, vb, vr, vc, vn, bias_ptr,
    out_ptr, ob, orow, oc, on, oe, QH, QW, H, W,
    F: tl.constexpr, K: tl.constexpr, BORDER: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    SPAN: tl.constexpr, DOT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(QW, SIDE)
    top, left = tl.program_id(0) // tiles * SIDE, tl.program_id(0) % tiles * SIDE
    value_heads = HEADS // SHARE
    image, value_head = (tl.program_id(1) // value_heads).to(tl.int64), tl.program_id(1) % value_heads
    place = tl.arange(0, SIDE * SIDE)
    qy, qx = top + place // SIDE, left + place % SIDE
    here = (qy < QH) & (qx < QW)
    out = tl.zeros([SIDE * SIDE, BE], tl.float32)
    for share in range(SHARE):
        head = value_head * SHARE + share
        q = _rows(q_ptr + image * qb + head * qn, _offset(qy, qx, qr, qc), here, D, BD, 0, DOT)
        highest = tl.full([SIDE * SIDE], float("-inf"), tl.float32)
        total = tl.zeros([SIDE * SIDE], tl.float32)
        sums = tl.zeros([SIDE * SIDE, BE], tl.float32)
        for start in range(0, SPAN * SPAN, STEP):
            cell = start + tl.arange(0, STEP)
            ky, kx = top // F - K // 2 + cell // SPAN, left // F - K // 2 + cell % SPAN
            y, real_y = _cell(ky, H, BORDER, K)
            x, real_x = _cell(kx, W, BORDER, K)
            real = real_y & real_x
            k = _rows(k_ptr + image * kb + head * kn, _offset(y, x, kr, kc), real, D, BD, 0, DOT)
            v = _rows(
                v_ptr + image * vb + value_head * vn, _offset(y, x, vr, vc), real, E, BE, tl.program_id(2) * BE, DOT
            )
            beyond = cell >= SPAN * SPAN  # the last step may run past the surroundings
            ky = tl.where(beyond, -(2**30), ky)
            scores, _, _ = _scores(q, k, bias_ptr + head * K * K, qy, qx, ky, kx, real, F, K, BORDER)
            new = tl.maximum(highest, tl.max(scores, 1))
            shift = tl.where(new > float("-inf"), new, 0.0)  # no key so far: exp(-inf - 0) = 0
            weights = tl.exp(scores - shift[:, None])
            fade = tl.exp(highest - shift)
            total = total * fade + tl.sum(weights, 1)
            sums = sums * fade[:, None] + tl.dot(weights.to(DOT), v, input_precision="ieee")
            highest = new
        out += sums / tl.where(total > 0, total, 1.0)[:, None]
    channel = tl.program_id(2) * BE + tl.arange(0, BE)
    offsets = _offset(qy, qx, orow, oc)[:, None] + channel[None] * oe
    tl.store(out_ptr + image * ob + value_head * on + offsets, out / SHARE, here[:, None] & (channel < E)[None])


@triton.jit
def _weight_gradients(
    v_ptr, v_offsets, real, g_ptr, g_offsets, here, ROWS: tl.constexpr, COLS: tl.constexpr,
    E: tl.constexpr, BE: tl.constexpr, SHARE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """<gradient of the output, value> for queries x keys, of one of SHARE heads."""
    products = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, E, BE):
        v = _rows(v_ptr, v_offsets, real, E, BE, start, DOT)
        g = _rows(g_ptr, g_offsets, here, E, BE, start, DOT)
        products += tl.dot(g, tl.trans(v), input_precision="ieee")
    return products / SHARE


@triton.jit
def _statistics_kernel(
    q_ptr, qb, qr, qc, qn, k_ptr, kb, kr, kc, kn, v_ptr, vb, vr, vc, vn, bias_ptr,
    g_ptr, gb, gr, gc, gn, ge, log_sum_ptr, mean_ptr, QH, QW, H, W,
    F: tl.constexpr, K: tl.constexpr, BORDER: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    SPAN: tl.constexpr, DOT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Per query: logarithm of the softmax's sum, and the mean of its weights' gradients."""
    tiles = tl.cdiv(QW, SIDE)
    top, left = tl.program_id(0) // tiles * SIDE, tl.program_id(0) % tiles * SIDE
    image, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    place = tl.arange(0, SIDE * SIDE)
    qy, qx = top + place // SIDE, left + place % SIDE
    here = (qy < QH) & (qx < QW)
    q = _rows(q_ptr + image * qb + head * qn, _offset(qy, qx, qr, qc), here, D, BD, 0, DOT)
    highest = tl.full([SIDE * SIDE], float("-inf"), tl.float32)
    total = tl.zeros([SIDE * SIDE], tl.float32)
    mean = tl.zeros([SIDE * SIDE], tl.float32)
    for start in range(0, SPAN * SPAN, STEP):
        cell = start + tl.arange(0, STEP)
        ky, kx = top // F - K // 2 + cell // SPAN, left // F - K // 2 + cell % SPAN
        y, real_y = _cell(ky, H, BORDER, K)
        x, real_x = _cell(kx, W, BORDER, K)
        real = real_y & real_x
        k = _rows(k_ptr + image * kb + head * kn, _offset(y, x, kr, kc), real, D, BD, 0, DOT)
        ky = tl.where(cell >= SPAN * SPAN, -(2**30), ky)
        scores, _, _ = _scores(q, k, bias_ptr + head * K * K, qy, qx, ky, kx, real, F, K, BORDER)
        gradients = _weight_gradients(
            v_ptr + image * vb + head // SHARE * vn, _offset(y, x, vr, vc), real,
            g_ptr + image * gb + head // SHARE * gn, _offset(qy, qx, gr, gc), here,
            SIDE * SIDE, STEP, E, BE, SHARE, DOT,
        )  # fmt: skip
        new = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new > float("-inf"), new, 0.0)
        weights = tl.exp(scores - shift[:, None])
        fade = tl.exp(highest - shift)
        total = total * fade + tl.sum(weights, 1)
        mean = mean * fade + tl.sum(weights * gradients, 1)
        highest = new
    total = tl.where(total > 0, total, 1.0)
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    target = ((image * HEADS + head) * QH + qy) * QW + qx
    tl.store(log_sum_ptr + target, highest + tl.log(total), here)
    tl.store(mean_ptr + target, mean / total, here)


@triton.jit
def _query_kernel(
    q_ptr, qb, qr, qc, qn, k_ptr, kb, kr, kc, kn, v_ptr, vb, vr, vc, vn, bias_ptr,
    g_ptr, gb, gr, gc, gn, ge, log_sum_ptr, mean_ptr, dq_ptr, db, dr, dc, dn, dd, scores_ptr, QH, QW, H, W,
    F: tl.constexpr, K: tl.constexpr, BORDER: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    SPAN: tl.constexpr, DOT: tl.constexpr, BE: tl.constexpr, STORE_SCORES: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and of their scores where the bias wants them."""
    tiles = tl.cdiv(QW, SIDE)
    top, left = tl.program_id(0) // tiles * SIDE, tl.program_id(0) % tiles * SIDE
    image, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    place = tl.arange(0, SIDE * SIDE)
    qy, qx = top + place // SIDE, left + place % SIDE
    here = (qy < QH) & (qx < QW)
    q = _rows(q_ptr + image * qb + head * qn, _offset(qy, qx, qr, qc), here, D, BD, 0, DOT)
    source = ((image * HEADS + head) * QH + qy) * QW + qx
    log_sum = tl.load(log_sum_ptr + source, here, other=0.0)
    mean = tl.load(mean_ptr + source, here, other=0.0)
    dq = tl.zeros([SIDE * SIDE, BD], tl.float32)
    for start in range(0, SPAN * SPAN, STEP):
        cell = start + tl.arange(0, STEP)
        ky, kx = top // F - K // 2 + cell // SPAN, left // F - K // 2 + cell % SPAN
        y, real_y = _cell(ky, H, BORDER, K)
        x, real_x = _cell(kx, W, BORDER, K)
        real = real_y & real_x
        k = _rows(k_ptr + image * kb + head * kn, _offset(y, x, kr, kc), real, D, BD, 0, DOT)
        ky = tl.where(cell >= SPAN * SPAN, -(2**30), ky)
        scores, entry, within = _scores(q, k, bias_ptr + head * K * K, qy, qx, ky, kx, real, F, K, BORDER)
        gradients = _weight_gradients(
            v_ptr + image * vb + head // SHARE * vn, _offset(y, x, vr, vc), real,
            g_ptr + image * gb + head // SHARE * gn, _offset(qy, qx, gr, gc), here,
            SIDE * SIDE, STEP, E, BE, SHARE, DOT,
        )  # fmt: skip
        d_scores = _softmax_of(scores, log_sum) * (gradients - mean[:, None])
        dq += tl.dot(d_scores.to(DOT), k, input_precision="ieee")
        if STORE_SCORES:
            tl.store(scores_ptr + source[:, None] * K * K + entry, d_scores, within & here[:, None])
    channel = tl.arange(0, BD)
    offsets = _offset(qy, qx, dr, dc)[:, None] + channel[None] * dd
    tl.store(dq_ptr + image * db + head * dn + offsets, dq, here[:, None] & (channel < D)[None])


@triton.jit
def _key_kernel(
    q_ptr, qb, qr, qc, qn, k_ptr, kb, kr, kc, kn, v_ptr, vb, vr, vc, vn, bias_ptr,
    g_ptr, gb, gr, gc, gn, ge, log_sum_ptr, mean_ptr, dk_ptr, db, dr, dc, dn, dd, QH, QW, H, W, halo,
    F: tl.constexpr, K: tl.constexpr, BORDER: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    SPAN: tl.constexpr, DOT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, with separate ones for those beyond the border."""
    tiles = tl.cdiv(W + 2 * halo, SIDE)
    top, left = tl.program_id(0) // tiles * SIDE - halo, tl.program_id(0) % tiles * SIDE - halo
    image, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    place = tl.arange(0, SIDE * SIDE)
    ky, kx = top + place // SIDE, left + place % SIDE
    wanted = (ky < H + halo) & (kx < W + halo)
    y, real_y = _cell(ky, H, BORDER, K)
    x, real_x = _cell(kx, W, BORDER, K)
    real = real_y & real_x & wanted
    k = _rows(k_ptr + image * kb + head * kn, _offset(y, x, kr, kc), real, D, BD, 0, DOT)
    dk = tl.zeros([SIDE * SIDE, BD], tl.float32)
    SEEN: tl.constexpr = (SIDE + K - 1) * F  # queries that see keys of the tile, along an axis
    for start in range(0, SEEN * SEEN, STEP):
        query = start + tl.arange(0, STEP)
        qy, qx = (top - K // 2) * F + query // SEEN, (left - K // 2) * F + query % SEEN
        here = (qy >= 0) & (qy < QH) & (qx >= 0) & (qx < QW) & (query < SEEN * SEEN)
        qy, qx = tl.where(here, qy, 0), tl.where(here, qx, 0)
        q = _rows(q_ptr + image * qb + head * qn, _offset(qy, qx, qr, qc), here, D, BD, 0, DOT)
        source = ((image * HEADS + head) * QH + qy) * QW + qx
        log_sum = tl.load(log_sum_ptr + source, here, other=0.0)
        mean = tl.load(mean_ptr + source, here, other=0.0)
        scores, _, _ = _scores(q, k, bias_ptr + head * K * K, qy, qx, ky, kx, real, F, K, BORDER)
        gradients = _weight_gradients(
            v_ptr + image * vb + head // SHARE * vn, _offset(y, x, vr, vc), real,
            g_ptr + image * gb + head // SHARE * gn, _offset(qy, qx, gr, gc), here,
            STEP, SIDE * SIDE, E, BE, SHARE, DOT,
        )  # fmt: skip
        d_scores = _softmax_of(scores, log_sum) * (gradients - mean[:, None])
        d_scores = tl.where(here[:, None], d_scores, 0.0)
        dk += tl.dot(tl.trans(d_scores.to(DOT)), q, input_precision="ieee")
    channel = tl.arange(0, BD)
    offsets = _offset(ky + halo, kx + halo, dr, dc)[:, None] + channel[None] * dd
    tl.store(dk_ptr + image * db + head * dn + offsets, dk, wanted[:, None] & (channel < D)[None])


@triton.jit
def _value_kernel(
    q_ptr, qb, qr, qc, qn, k_ptr, kb, kr, kc, kn, v_ptr, vb, vr, vc, vn, bias_ptr,
    g_ptr, gb, gr, gc, gn, ge, log_sum_ptr, mean_ptr, dv_ptr, db, dr, dc, dn, dd, QH, QW, H, W, halo,
    F: tl.constexpr, K: tl.constexpr, BORDER: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    SPAN: tl.constexpr, DOT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradients of values, with separate ones for those beyond the border."""
    tiles = tl.cdiv(W + 2 * halo, SIDE)
    top, left = tl.program_id(0) // tiles * SIDE - halo, tl.program_id(0) % tiles * SIDE - halo
    value_heads = HEADS // SHARE
    image, value_head = (tl.program_id(1) // value_heads).to(tl.int64), tl.program_id(1) % value_heads
    place = tl.arange(0, SIDE * SIDE)
    ky, kx = top + place // SIDE, left + place % SIDE
    wanted = (ky < H + halo) & (kx < W + halo)
    y, real_y = _cell(ky, H, BORDER, K)
    x, real_x = _cell(kx, W, BORDER, K)
    real = real_y & real_x & wanted
    dv = tl.zeros([SIDE * SIDE, BE], tl.float32)
    SEEN: tl.constexpr = (SIDE + K - 1) * F
    for share in range(SHARE):
        head = value_head * SHARE + share
        k = _rows(k_ptr + image * kb + head * kn, _offset(y, x, kr, kc), real, D, BD, 0, DOT)
        for start in range(0, SEEN * SEEN, STEP):
            query = start + tl.arange(0, STEP)
            qy, qx = (top - K // 2) * F + query // SEEN, (left - K // 2) * F + query % SEEN
            here = (qy >= 0) & (qy < QH) & (qx >= 0) & (qx < QW) & (query < SEEN * SEEN)
            qy, qx = tl.where(here, qy, 0), tl.where(here, qx, 0)
            q = _rows(q_ptr + image * qb + head * qn, _offset(qy, qx, qr, qc), here, D, BD, 0, DOT)
            log_sum = tl.load(log_sum_ptr + ((image * HEADS + head) * QH + qy) * QW + qx, here, other=0.0)
            scores, _, _ = _scores(q, k, bias_ptr + head * K * K, qy, qx, ky, kx, real, F, K, BORDER)
            weights = tl.where(here[:, None], _softmax_of(scores, log_sum), 0.0)
            g = _rows(
                g_ptr + image * gb + value_head * gn, _offset(qy, qx, gr, gc), here, E, BE, tl.program_id(2) * BE, DOT
            )
            dv += tl.dot(tl.trans(weights.to(DOT)), g, input_precision="ieee")
    channel = tl.program_id(2) * BE + tl.arange(0, BE)
    offsets = _offset(ky + halo, kx + halo, dr, dc)[:, None] + channel[None] * dd
    tl.store(dv_ptr + image * db + value_head * dn + offsets, dv / SHARE, wanted[:, None] & (channel < E)[None])


def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> Tensor:
    """[B, fH, fW, N or 1, E]."""
    call = _Call(query, key, value, bias, window, border)
    out = torch.empty(*query.shape[:3], *value.shape[3:], dtype=value.dtype, device=value.device)
    block = min(128, _power(value.shape[4]))
    grid = (call.query_tiles, query.shape[0] * value.shape[3], triton.cdiv(value.shape[4], block))
    _forward_kernel[grid](*call.maps(), out, *out.stride(), *call.sizes, **call.constants, BE=block)
    return out


def scratch_bytes(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> int:
    """Bytes of the copies of inputs whose channels are not contiguous; :func:`forward` takes no others."""
    return sum(x.numel() * x.itemsize for x in (query, key, value) if x.stride(-1) != 1)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    out: Tensor,
    window: int,
    border: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last only where ``needed``."""
    bias_too = needed[3]
    call = _Call(query, key, value, bias, window, border)
    images, height, width, heads, _ = query.shape
    grad = call.rows(grad)
    block = min(64, _power(value.shape[4]))
    log_sum = query.new_empty(images, heads, height, width, dtype=torch.float32)
    mean = torch.empty_like(log_sum)
    per_head = (call.query_tiles, images * heads)
    arguments = (*call.maps(), grad, *grad.stride(), log_sum, mean)
    _statistics_kernel[per_head](*arguments, *call.sizes, **call.constants, BE=block)

    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    scores = query.new_zeros(images, heads, height, width, window**2 if bias_too else 0, dtype=torch.float32)
    _query_kernel[per_head](
        *arguments, d_query, *d_query.stride(), scores, *call.sizes, **call.constants, BE=block, STORE_SCORES=bias_too
    )
    d_bias = scores.sum((0, 2, 3)).view_as(bias).to(bias.dtype) if bias_too else torch.zeros_like(bias)

    # Keys beyond the border have separate gradients, which are then added to the cells that they mirror.
    halo = window // 2 if border in ("reflect", "replicate", "shift") else 0
    padded = (images, key.shape[1] + 2 * halo, key.shape[2] + 2 * halo)
    tiles = triton.cdiv(padded[1], SIDE) * triton.cdiv(padded[2], SIDE)
    d_key = key.new_empty(*padded, *key.shape[3:], dtype=torch.float32)
    _key_kernel[(tiles, images * heads)](
        *arguments, d_key, *d_key.stride(), *call.sizes, halo, **call.constants, BE=block
    )
    d_value = value.new_empty(*padded, *value.shape[3:], dtype=torch.float32)
    chunks = triton.cdiv(value.shape[4], block)
    _value_kernel[(tiles, images * value.shape[3], chunks)](
        *arguments, d_value, *d_value.stride(), *call.sizes, halo, **call.constants, BE=block
    )
    d_key, d_value = (_fold(x, halo, border, window) for x in (d_key, d_value))
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_bias


class _Call:
    """Arguments that all kernels of one call share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> None:
        self.query, self.key, self.value = (self.rows(x) for x in (query, key, value))
        self.bias = bias.float().contiguous()
        _, height, width, heads, dim = query.shape
        self.query_tiles = triton.cdiv(height, SIDE) * triton.cdiv(width, SIDE)
        self.sizes = (height, width, key.shape[1], key.shape[2])
        factor = height // key.shape[1]
        self.constants = {
            "F": factor,
            "K": window,
            "BORDER": BORDERS[border],
            "HEADS": heads,
            "SHARE": heads // value.shape[3],
            "D": dim,
            "E": value.shape[4],
            "BD": _power(dim),
            "SIDE": SIDE,
            "STEP": STEP,
            # Cells that the queries of a tile can see, along an axis.
            "SPAN": (SIDE - 1) // factor + (1 if SIDE % factor == 0 or factor % SIDE == 0 else 2) + window - 1,
            "DOT": _product_type(query, key, value),
        }

    @staticmethod
    def rows(x: Tensor) -> Tensor:
        """Make the channels contiguous, all that the kernels need."""
        return x if x.stride(-1) == 1 else x.contiguous()

    def maps(self) -> tuple[object, ...]:
        q, k, v = self.query, self.key, self.value
        return (q, *q.stride()[:4], k, *k.stride()[:4], v, *v.stride()[:4], self.bias)


def _product_type(*maps: Tensor) -> tl.dtype:
    """The type of the factors of matrix products; sums are float32 always."""
    dtypes = {x.dtype for x in maps}
    if dtypes == {torch.float16}:
        return tl.float16
    # The interpreter cannot multiply bfloat16.
    if dtypes == {torch.bfloat16} and not triton.knobs.runtime.interpret:
        return tl.bfloat16
    return tl.float32


def _power(size: int) -> int:
    """Round up to a power of two, at least 16, as matrix products of tiles need it."""
    return max(16, triton.next_power_of_2(size))


def _fold(x: Tensor, halo: int, border: str, window: int) -> Tensor:
    """Add the cells beyond the border of [B, H + 2 halo, W + 2 halo, N, C] to those that they repeat."""
    for axis in (1, 2):
        length = x.shape[axis] - 2 * halo
        if halo:
            cells, _ = border_cells(torch.arange(-halo, length + halo, device=x.device), length, border, window)
            shape = list(x.shape)
            shape[axis] = length
            x = x.new_zeros(shape).index_add_(axis, cells, x)
    return x
