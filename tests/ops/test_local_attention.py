"""Local attention against plain loops, dense masked attention, and its own promises about memory and dtypes."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from featsharp.errors import ConfigError, InputError
from featsharp.ops.blocks import limit_chunks
from featsharp.ops.local_attention import blocked, local_attention, reference

BACKENDS = ["blocked", "reference"]
BORDERS = ["clip", "reflect", "replicate", "zeros", "shift"]
# (height, width): smaller than the window, one pixel, one row, one column, a block and a bit, several blocks.
SIZES = [(2, 3), (1, 1), (1, 9), (11, 1), (9, 8), (5, 19)]


def loops(query, key, value, window, bias=None, scale=1.0, border="clip"):
    """The definition, one output at a time, in Python floats."""
    batch, height, width, heads, _ = query.shape
    rows, cols, value_heads, channels = value.shape[1:]
    factor, radius = height // rows, window // 2
    queries, keys, values, biases = (None if t is None else t.tolist() for t in (query, key, value, bias))
    out = torch.zeros(batch, height, width, value_heads, channels, dtype=torch.float64)
    for b, i, j, n in itertools.product(range(batch), range(height), range(width), range(heads)):
        scores, gathered = [], []
        for dy, dx in itertools.product(range(-radius, radius + 1), repeat=2):
            y, x = i // factor + dy, j // factor + dx
            inside = 0 <= y < rows and 0 <= x < cols
            if border == "reflect":
                y, x = bounce(y, rows), bounce(x, cols)
            elif border == "replicate":
                y, x = min(max(y, 0), rows - 1), min(max(x, 0), cols - 1)
            elif border == "shift":
                y, x = moved_in(y, rows, window), moved_in(x, cols, window)
                inside = y is not None and x is not None
            if border in ("clip", "shift") and not inside:
                continue
            offset = 0.0 if biases is None else biases[n][dy + radius][dx + radius]
            if border == "zeros" and not inside:
                scores.append(offset)
                gathered.append([0.0] * channels)
                continue
            dot = sum(p * q for p, q in zip(queries[b][i][j][n], keys[b][y][x][n], strict=True))
            scores.append(float(scale) * dot + offset)
            gathered.append(values[b][y][x][min(n, value_heads - 1)])
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        sums = [sum(w * v for w, v in zip(weights, channel, strict=True)) for channel in zip(*gathered, strict=True)]
        mean = torch.tensor(sums, dtype=torch.float64) / sum(weights)
        out[b, i, j, min(n, value_heads - 1)] += mean / (heads if value_heads < heads else 1)
    return out


def moved_in(position, length, window):
    """The cell a window further in; None where the map ends before."""
    position += window * ((position < 0) - (position >= length))
    return position if 0 <= position < length else None


def bounce(position, length):
    """Walk back and forth between the first and the last cell."""
    if length == 1:
        return 0
    while not 0 <= position < length:
        position = -position if position < 0 else 2 * (length - 1) - position
    return position


def inputs(batch, height, width, heads, key_dim, value_dim, dtype=torch.float64, factor=1, value_heads=None):
    return (
        torch.randn(batch, factor * height, factor * width, heads, key_dim, dtype=dtype),
        torch.randn(batch, height, width, heads, key_dim, dtype=dtype),
        torch.randn(batch, height, width, value_heads or heads, value_dim, dtype=dtype),
    )


@pytest.fixture(params=BACKENDS)
def attend(request):
    """The operation on one backend."""
    return partial(local_attention, backend=request.param)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_plain_loops(attend, size, border):
    query, key, value = inputs(2, *size, heads=2, key_dim=3, value_dim=2)
    bias, scale = torch.randn(2, 5, 5, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    out = attend(query, key, value, window=5, bias=bias, scale=scale, border=border)
    assert out.shape == value.shape
    torch.testing.assert_close(out, loops(query, key, value, 5, bias, scale, border), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("factor", [2, 3, 16])
def test_queries_may_be_finer_than_keys(attend, factor, border):
    query, key, value = inputs(1, 2, 3, heads=2, key_dim=3, value_dim=2, factor=factor)
    bias = torch.randn(2, 3, 3, dtype=torch.float64)
    out = attend(query, key, value, window=3, bias=bias, border=border)
    torch.testing.assert_close(out, loops(query, key, value, 3, bias, border=border), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", [(9, 12), (5, 7), (3, 6), (1, 2)])
def test_shifted_windows_are_those_of_neighbourhood_attention(attend, size):
    """A window of 5 x 5 moved back onto the map, with all cells of an axis that has fewer."""
    query, key, value = inputs(1, *size, heads=1, key_dim=3, value_dim=2, factor=2)
    out = attend(query, key, value, window=5, border="shift")
    for i, j in itertools.product(range(2 * size[0]), range(2 * size[1])):
        rows, cols = (
            slice(start, start + 5)
            for start in (max(0, min(at // 2 - 2, n - 5)) for at, n in zip((i, j), size, strict=True))
        )
        keys, values = (x[0, rows, cols, 0].flatten(0, 1) for x in (key, value))
        expected = (keys @ query[0, i, j, 0]).softmax(0) @ values
        torch.testing.assert_close(out[0, i, j, 0], expected, atol=1e-12, rtol=1e-12)


def test_heads_of_a_single_value_are_averaged(attend):
    query, key, value = inputs(2, 5, 9, heads=3, key_dim=3, value_dim=4, factor=2, value_heads=1)
    out = attend(query, key, value, window=3)
    assert out.shape == (2, 10, 18, 1, 4)
    torch.testing.assert_close(out, loops(query, key, value, 3), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("size", [(2, 3), (1, 9), (13, 6), (9, 19)])
@pytest.mark.parametrize(("factor", "heads", "value_heads", "window"), [(1, 2, 2, 7), (2, 1, 1, 5), (3, 2, 1, 3)])
def test_backends_agree_with_the_reference(border, size, factor, heads, value_heads, window):
    """Forward and every gradient, over several chunks of one batch."""
    tensors = inputs(3, *size, heads, 3, 5, factor=factor, value_heads=value_heads)
    tensors = [t.requires_grad_() for t in (*tensors, torch.randn(heads, window, window, dtype=torch.float64))]

    def run(backend):
        *maps, bias = tensors
        out = local_attention(*maps, window=window, bias=bias, scale=0.7, border=border, backend=backend)
        cotangent = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
        return out, *torch.autograd.grad(out, tensors, cotangent)

    expected = run("reference")
    for backend in BACKENDS[:-1]:
        torch.testing.assert_close(run(backend), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("window", [1, 3, 7, 11])
def test_any_odd_window_and_no_bias(attend, window):
    query, key, value = inputs(1, 4, 10, heads=1, key_dim=2, value_dim=1)
    for border in ("clip", "reflect"):
        out = attend(query, key, value, window=window, border=border)
        torch.testing.assert_close(out, loops(query, key, value, window, border=border), atol=1e-12, rtol=1e-12)


def test_window_of_one_returns_the_values(attend):
    query, key, value = inputs(2, 3, 10, heads=4, key_dim=3, value_dim=5)
    torch.testing.assert_close(attend(query, key, value, window=1), value)


def test_equals_dense_attention_with_a_window_mask(attend):
    query, key, value = inputs(2, 9, 13, heads=3, key_dim=4, value_dim=5)
    out = attend(query, key, value, window=7, scale=0.5)
    y, x = torch.arange(9).repeat_interleave(13), torch.arange(13).repeat(9)
    mask = ((y[:, None] - y).abs() <= 3) & ((x[:, None] - x).abs() <= 3)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)), attn_mask=mask, scale=0.5
    )
    torch.testing.assert_close(out, dense.transpose(1, 2).reshape(out.shape), atol=1e-12, rtol=1e-12)


def test_bias_entry_belongs_to_the_offset_of_its_key(attend):
    _, _, value = inputs(1, 6, 9, heads=2, key_dim=1, value_dim=1)
    nothing = torch.zeros(1, 6, 9, 2, 1, dtype=torch.float64)
    bias = torch.full((2, 3, 3), -1e4, dtype=torch.float64)
    bias[0, 0, 1] = bias[1, 1, 2] = 0  # head 0 looks one row up, head 1 one column to the right
    out = attend(nothing, nothing, value, window=3, bias=bias)
    torch.testing.assert_close(out[:, 1:, :, 0], value[:, :-1, :, 0])
    torch.testing.assert_close(out[:, :, :-1, 1], value[:, :, 1:, 1])


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("factor", "value_heads"), [(1, 2), (2, 1)])
def test_gradients(attend, border, factor, value_heads):
    tensors = inputs(1, 6, 3, heads=2, key_dim=2, value_dim=2, factor=factor, value_heads=value_heads)
    bias = torch.randn(2, 3, 3, dtype=torch.float64)
    scale = torch.tensor(0.6, dtype=torch.float64)

    def run(query, key, value, bias, scale):
        return attend(query, key, value, window=3, bias=bias, scale=scale, border=border)

    leaves = [t.requires_grad_() for t in (*tensors, bias, scale)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_chunks_change_neither_result_nor_gradients(attend):
    tensors = [t.requires_grad_() for t in inputs(3, 13, 10, heads=2, key_dim=3, value_dim=4)]

    def run():
        out = attend(*tensors, window=7)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    whole = run()
    with limit_chunks(1):
        torch.testing.assert_close(run(), whole, atol=1e-12, rtol=1e-12)
    with torch.no_grad(), limit_chunks(1):
        torch.testing.assert_close(attend(*tensors, window=7), whole[0].detach(), atol=1e-12, rtol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest memory that any operation inside returned; views count what they look at."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("module", [blocked, reference])
def test_memory_is_bounded_by_the_chunk_and_not_by_the_map(module):
    limit = 400_000
    query, key, value = inputs(1, 400, 16, 2, 2, 2, torch.float32)
    bias = torch.zeros(2, 7, 7)
    with LargestTensor() as watch, torch.no_grad(), limit_chunks(limit):
        out = module.forward(query, key, value, bias, 7, "clip")
        if module is blocked:
            module.backward(out, query, key, value, bias, out, 7, "clip", [True] * 4)
    gathered = 400 * 16 * 49 * 2 * 4  # what windows of the whole map would hold
    assert watch.largest <= limit < gathered / 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_size_of_windows_is_kept_for_the_backward_pass(backend):
    tensors = [t.requires_grad_() for t in inputs(1, 64, 16, 2, 2, 2, torch.float32)]
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        local_attention(*tensors, window=7, backend=backend)
    assert sum(kept.values()) <= 6 * tensors[0].numel()


def test_a_peaked_softmax_stays_finite(attend):
    query, key, value = inputs(1, 6, 10, heads=2, key_dim=4, value_dim=3, dtype=torch.float32)
    tensors = [t.requires_grad_() for t in (query, key, value)]
    for border in BORDERS:
        out = attend(*tensors, window=7, scale=1e6, border=border)
        out.sum().backward()
        assert out.isfinite().all()
        assert all(t.grad.isfinite().all() for t in tensors)
        # Nothing but a mean of values can come out.
        assert out.max() <= value.max() + 1e-5


def test_very_low_scores_do_not_let_keys_from_outside_in(attend):
    query, key, value = inputs(1, 3, 3, heads=1, key_dim=1, value_dim=1, dtype=torch.float32)
    low = attend(torch.ones_like(query), torch.full_like(key, -1e30), value, window=3)
    torch.testing.assert_close(low, attend(query * 0, key, value, window=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("border", BORDERS)
def test_dtypes(attend, dtype, border):
    exact = inputs(1, 9, 11, heads=2, key_dim=8, value_dim=4)
    bias = torch.randn(2, 7, 7)
    lower = [t.to(dtype) for t in exact]
    out = attend(*lower, window=7, bias=bias, scale=8**-0.5, border=border)
    assert out.dtype == dtype
    expected = attend(*(t.double() for t in lower), window=7, bias=bias, scale=8**-0.5, border=border)
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_non_contiguous_inputs(attend):
    query, key, value = inputs(2, 7, 9, heads=2, key_dim=3, value_dim=3)
    views = [t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for t in (query, key, value)]
    assert not any(t.is_contiguous() for t in views)
    torch.testing.assert_close(attend(*views, window=5), attend(query, key, value, window=5))


@pytest.mark.parametrize("border", ["clip", "reflect", "replicate", "shift"])
@pytest.mark.parametrize("size", [(1, 2), (6, 9)])
def test_constant_values_stay_constant(attend, size, border):
    query, key, _ = inputs(1, *size, heads=2, key_dim=3, value_dim=1)
    value = torch.full((1, *size, 2, 4), 2.5, dtype=torch.float64)
    torch.testing.assert_close(attend(query, key, value, window=7, border=border), value)


def test_images_of_a_batch_do_not_mix(attend):
    tensors = inputs(3, 6, 10, heads=2, key_dim=3, value_dim=2)
    out = attend(*tensors, window=5)
    alone = attend(*(t[1:2] for t in tensors), window=5)
    torch.testing.assert_close(out[1:2], alone)


@pytest.mark.parametrize("window", [0, -3, 4])
def test_even_windows_are_refused(window):
    with pytest.raises(ConfigError, match="must be odd"):
        local_attention(*inputs(1, 3, 3, 1, 1, 1), window=window)


def test_unknown_borders_are_refused():
    with pytest.raises(ConfigError, match="'wrap'; use 'clip' or 'reflect' or 'replicate' or 'zeros'"):
        local_attention(*inputs(1, 3, 3, 1, 1, 1), window=3, border="wrap")


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = inputs(1, 4, 5, heads=2, key_dim=3, value_dim=2)
    half = (query, key[:, :2], value[:, :2])  # f is 2 for rows and 1 for columns
    for wrong in [(query, key[:, :3], value), (query, key, value[:, :, :4]), (query[0], key[0], value[0]), half]:
        with pytest.raises(InputError, match=r"\[B, H, W, N, D\]"):
            local_attention(*wrong, window=3)
    with pytest.raises(InputError, match=r"\(2, 3, 3\); got \(3, 3\)"):
        local_attention(query, key, value, window=3, bias=torch.zeros(3, 3))


def test_compiles_to_one_graph_with_dynamic_sizes():
    torch._dynamo.reset()

    def run(query, key, value, bias):
        return local_attention(query, key, value, window=3, bias=bias, scale=0.5) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    bias = torch.randn(2, 3, 3, requires_grad=True)
    for size in [(5, 9), (4, 7), (11, 6)]:
        tensors = [t.requires_grad_() for t in inputs(1, *size, 2, 3, 4, torch.float32)]
        one, other = run(*tensors, bias), compiled(*tensors, bias)
        torch.testing.assert_close(other, one)
        expected = torch.autograd.grad(one.square().sum(), [*tensors, bias])
        torch.testing.assert_close(torch.autograd.grad(other.square().sum(), [*tensors, bias]), expected)


def test_the_operator_keeps_the_rules_of_torch_library():
    query, key, value = (t.requires_grad_() for t in inputs(1, 5, 6, 2, 3, 4, torch.float32, factor=2))
    bias = torch.randn(2, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.featsharp.local_attention, (query, key, value, bias, 3, "clip", None))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)])
def test_only_the_gradients_that_are_needed(wanted, heads):
    """Frozen features need none: what is left out must not change the others."""
    query, key, value = inputs(1, 7, 9, heads[0], 3, 5, torch.float32)
    tensors = [query, key, value[:, :, :, : heads[1]], torch.randn(heads[0], 5, 5)]
    grads = []
    for need in (range(4), wanted):
        leaves = [t.clone().requires_grad_(i in need) for i, t in enumerate(tensors)]
        local_attention(*leaves[:3], bias=leaves[3], window=5, backend="blocked").square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for i in range(4):
        assert (grads[1][i] is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(grads[1][i], grads[0][i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_float32_under_autocast(backend):
    query, key, value = inputs(1, 8, 8, 2, 4, 6, torch.float32)
    expected = local_attention(query, key, value, window=3, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(local_attention(query, key, value, window=3, backend=backend), expected)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_nothing_to_attend_to_is_refused(empty):
    size = [1, 3, 3, 2, 4]
    size[empty] = 0
    with pytest.raises(InputError, match="none of them 0"):
        local_attention(*(torch.zeros(size) for _ in range(3)), window=3)
