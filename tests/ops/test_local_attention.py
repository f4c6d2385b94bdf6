"""Local attention against plain loops, dense masked attention, and its own promises about memory and dtypes."""

import itertools
import math
from functools import partial

import pytest
import torch

from featsharp.errors import ConfigError, InputError
from featsharp.ops.local_attention import local_attention

# (height, width): smaller than the window, one pixel, one row, one column, a block and a bit, several blocks.
SIZES = [(2, 3), (1, 1), (1, 9), (11, 1), (9, 8), (5, 19)]


def loops(query, key, value, window, bias=None, scale=1.0, border="clip"):
    """The definition, one output at a time, in Python floats."""
    batch, height, width, heads, _ = query.shape
    out = torch.zeros(value.shape, dtype=torch.float64)
    radius = window // 2
    for b, i, j, n in itertools.product(range(batch), range(height), range(width), range(heads)):
        scores, values = [], []
        for dy, dx in itertools.product(range(-radius, radius + 1), repeat=2):
            y, x = i + dy, j + dx
            if border == "reflect":
                y, x = bounce(y, height), bounce(x, width)
            elif not (0 <= y < height and 0 <= x < width):
                continue
            dot = sum(p * q for p, q in zip(query[b, i, j, n].tolist(), key[b, y, x, n].tolist(), strict=True))
            offset = 0.0 if bias is None else float(bias[n, dy + radius, dx + radius])
            scores.append(float(scale) * dot + offset)
            values.append(value[b, y, x, n].double())
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        out[b, i, j, n] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return out


def bounce(position, length):
    """Walk back and forth between the first and the last cell."""
    if length == 1:
        return 0
    while not 0 <= position < length:
        position = -position if position < 0 else 2 * (length - 1) - position
    return position


def inputs(batch, height, width, heads, key_dim, value_dim, dtype=torch.float64):
    shape = (batch, height, width, heads)
    return (
        torch.randn(*shape, key_dim, dtype=dtype),
        torch.randn(*shape, key_dim, dtype=dtype),
        torch.randn(*shape, value_dim, dtype=dtype),
    )


@pytest.mark.parametrize("border", ["clip", "reflect"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_plain_loops(size, border):
    query, key, value = inputs(2, *size, heads=2, key_dim=3, value_dim=2)
    bias, scale = torch.randn(2, 5, 5, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    out = local_attention(query, key, value, window=5, bias=bias, scale=scale, border=border)
    assert out.shape == value.shape
    torch.testing.assert_close(out, loops(query, key, value, 5, bias, scale, border), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 7, 11])
def test_any_odd_window_and_no_bias(window):
    query, key, value = inputs(1, 4, 10, heads=1, key_dim=2, value_dim=1)
    for border in ("clip", "reflect"):
        out = local_attention(query, key, value, window=window, border=border)
        torch.testing.assert_close(out, loops(query, key, value, window, border=border), atol=1e-12, rtol=1e-12)


def test_window_of_one_returns_the_values():
    query, key, value = inputs(2, 3, 10, heads=4, key_dim=3, value_dim=5)
    torch.testing.assert_close(local_attention(query, key, value, window=1), value)


def test_equals_dense_attention_with_a_window_mask():
    query, key, value = inputs(2, 9, 13, heads=3, key_dim=4, value_dim=5)
    out = local_attention(query, key, value, window=7, scale=0.5)
    y, x = torch.arange(9).repeat_interleave(13), torch.arange(13).repeat(9)
    mask = ((y[:, None] - y).abs() <= 3) & ((x[:, None] - x).abs() <= 3)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)), attn_mask=mask, scale=0.5
    )
    torch.testing.assert_close(out, dense.transpose(1, 2).reshape(out.shape), atol=1e-12, rtol=1e-12)


def test_bias_entry_belongs_to_the_offset_of_its_key():
    _, _, value = inputs(1, 6, 9, heads=2, key_dim=1, value_dim=1)
    nothing = torch.zeros(1, 6, 9, 2, 1, dtype=torch.float64)
    bias = torch.full((2, 3, 3), -1e4, dtype=torch.float64)
    bias[0, 0, 1] = bias[1, 1, 2] = 0  # head 0 looks one row up, head 1 one column to the right
    out = local_attention(nothing, nothing, value, window=3, bias=bias)
    torch.testing.assert_close(out[:, 1:, :, 0], value[:, :-1, :, 0])
    torch.testing.assert_close(out[:, :, :-1, 1], value[:, :, 1:, 1])


@pytest.mark.parametrize("border", ["clip", "reflect"])
@pytest.mark.parametrize("max_band_scores", [1, 2**24])
def test_gradients(border, max_band_scores):
    tensors = [t.requires_grad_() for t in inputs(1, 9, 3, heads=2, key_dim=2, value_dim=1)]
    bias = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def attend(query, key, value, bias, scale):
        return local_attention(
            query, key, value, window=3, bias=bias, scale=scale, border=border, max_band_scores=max_band_scores
        )

    assert torch.autograd.gradcheck(attend, (*tensors, bias, scale), fast_mode=True)


@pytest.mark.parametrize("border", ["clip", "reflect"])
def test_bands_change_neither_result_nor_gradients(border):
    tensors = [t.requires_grad_() for t in inputs(2, 21, 10, heads=2, key_dim=3, value_dim=4)]
    bias = torch.randn(2, 7, 7, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 21, 10, 2, 4, dtype=torch.float64)

    def run(**options):
        out = local_attention(*tensors, window=7, bias=bias, scale=scale, border=border, **options)
        return out, torch.autograd.grad((out * weights).sum(), [*tensors, bias, scale])

    whole, whole_gradients = run()
    banded, banded_gradients = run(max_band_scores=1)
    torch.testing.assert_close(banded, whole, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(banded_gradients, whole_gradients, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        alone = local_attention(*tensors, window=7, bias=bias, scale=scale, border=border, max_band_scores=1)
    torch.testing.assert_close(alone, whole.detach(), atol=1e-13, rtol=1e-13)


def largest_tensor(function):
    """Elements of the largest tensor that any operation inside ``function`` returns, and of all kept for backward."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    # Expanded and repeated views take no memory.
                    self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
            return out

    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), Watch() as watch:
        function()
    return watch.largest, sum(kept.values())


def test_memory_is_bounded_by_the_band_and_not_by_the_map():
    limit = 200_000
    sizes = {}
    for height in (64, 256):
        tensors = [t.requires_grad_() for t in inputs(1, height, 16, 2, 2, 2, torch.float32)]
        sizes[height] = largest_tensor(partial(local_attention, *tensors, window=7, max_band_scores=limit))
    scores = 256 * 16 * 2 * 14**2  # of the whole larger map
    largest, kept = sizes[256]
    assert largest <= limit < scores / 4
    assert kept < scores / 4
    # What stays for the backward pass is the inputs: linear in pixels, without the factor of the window.
    assert kept < 5 * sizes[64][1]
    assert kept < 40 * 256 * 16


def test_a_peaked_softmax_stays_finite():
    query, key, value = inputs(1, 6, 10, heads=2, key_dim=4, value_dim=3, dtype=torch.float32)
    tensors = [t.requires_grad_() for t in (query, key, value)]
    for border in ("clip", "reflect"):
        out = local_attention(*tensors, window=7, scale=1e6, border=border)
        out.sum().backward()
        assert out.isfinite().all()
        assert all(t.grad.isfinite().all() for t in tensors)
        # Nothing but a mean of values can come out.
        assert out.max() <= value.max() + 1e-5


def test_very_low_scores_do_not_let_keys_from_outside_in():
    query, key, value = inputs(1, 3, 3, heads=1, key_dim=1, value_dim=1, dtype=torch.float32)
    low = local_attention(torch.ones_like(query), torch.full_like(key, -1e30), value, window=3)
    torch.testing.assert_close(low, local_attention(query * 0, key, value, window=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("border", ["clip", "reflect"])
def test_dtypes(dtype, border):
    exact = inputs(1, 9, 11, heads=2, key_dim=8, value_dim=4)
    bias = torch.randn(2, 7, 7)
    lower = [t.to(dtype) for t in exact]
    out = local_attention(*lower, window=7, bias=bias, scale=8**-0.5, border=border)
    assert out.dtype == dtype
    expected = local_attention(*(t.double() for t in lower), window=7, bias=bias, scale=8**-0.5, border=border)
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_non_contiguous_inputs():
    query, key, value = inputs(2, 7, 9, heads=2, key_dim=3, value_dim=3)
    views = [t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for t in (query, key, value)]
    assert not any(t.is_contiguous() for t in views)
    torch.testing.assert_close(local_attention(*views, window=5), local_attention(query, key, value, window=5))


@pytest.mark.parametrize("border", ["clip", "reflect"])
@pytest.mark.parametrize("size", [(1, 2), (6, 9)])
def test_constant_values_stay_constant(size, border):
    query, key, _ = inputs(1, *size, heads=2, key_dim=3, value_dim=1)
    value = torch.full((1, *size, 2, 4), 2.5, dtype=torch.float64)
    torch.testing.assert_close(local_attention(query, key, value, window=7, border=border), value)


def test_images_of_a_batch_do_not_mix():
    tensors = inputs(3, 6, 10, heads=2, key_dim=3, value_dim=2)
    out = local_attention(*tensors, window=5)
    alone = local_attention(*(t[1:2] for t in tensors), window=5)
    torch.testing.assert_close(out[1:2], alone)


@pytest.mark.parametrize("window", [0, -3, 4])
def test_even_windows_are_refused(window):
    with pytest.raises(ConfigError, match="must be odd"):
        local_attention(*inputs(1, 3, 3, 1, 1, 1), window=window)


def test_unknown_borders_are_refused():
    with pytest.raises(ConfigError, match="'wrap'; use 'clip' or 'reflect'"):
        local_attention(*inputs(1, 3, 3, 1, 1, 1), window=3, border="wrap")


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = inputs(1, 4, 5, heads=2, key_dim=3, value_dim=2)
    for wrong in [(query, key[:, :3], value), (query, key, value[:, :, :4]), (query[0], key[0], value[0])]:
        with pytest.raises(InputError, match=r"\[B, H, W, N, D\]"):
            local_attention(*wrong, window=3)
    with pytest.raises(InputError, match=r"\(2, 3, 3\); got \(3, 3\)"):
        local_attention(query, key, value, window=3, bias=torch.zeros(3, 3))
