"""The local filter: every backend against a loop in float64, forward and gradients; identities; bad input."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from featsharp.errors import ConfigError, InputError
from featsharp.memory import PeakMeter
from featsharp.ops.blocks import limit_chunks
from featsharp.ops.local_filter import blocked, local_filter
from featsharp.ops.windows import border_cells

BACKENDS = ["blocked", "reference"]
BORDERS = ["clip", "reflect", "replicate", "zeros", "shift"]


def loop(weights, value, border):
    """The formula, one query and window entry at a time."""
    batch, rows, cols, heads, window, _ = weights.shape
    factor = rows // value.shape[1]
    out = torch.zeros(batch, rows, cols, heads, value.shape[4], dtype=torch.float64)
    weights, value = weights.double(), value.double()

    @functools.cache
    def cell(place, length):
        """The index that stands for a place, and whether the map has it."""
        index, real = border_cells(torch.tensor([place]), length, border, window)
        return int(index), bool(real)

    for y, x, i, j in itertools.product(range(rows), range(cols), range(window), range(window)):
        row, real_row = cell(y // factor + i - window // 2, value.shape[1])
        col, real_col = cell(x // factor + j - window // 2, value.shape[2])
        if real_row and real_col:
            out[:, y, x] += weights[:, y, x, :, i, j, None] * value[:, row, col]
    return out


def inputs(size=(5, 7), factor=1, heads=2, window=3, channels=4, batch=2, dtype=torch.float32):
    weights = torch.randn(batch, factor * size[0], factor * size[1], heads, window, window)
    return weights.to(dtype), torch.randn(batch, *size, heads, channels).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(
    ("size", "factor", "window"), [((5, 7), 1, 3), ((4, 3), 2, 5), ((2, 9), 3, 3), ((1, 1), 2, 5), ((6, 5), 1, 7)]
)
def test_against_the_loop(backend, border, size, factor, window):
    weights, value = inputs(size, factor, window=window)
    out = local_filter(weights, value, border=border, backend=backend)
    assert out.shape == (2, factor * size[0], factor * size[1], 2, 4)
    torch.testing.assert_close(out, loop(weights, value, border).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_finite_differences(backend, border):
    weights, value = inputs((3, 5), 2, 1, 3, 2, 1, torch.float64)
    arguments = (weights.requires_grad_(), value.requires_grad_())

    def run(weights, value):
        return local_filter(weights, value, border=border, backend=backend)

    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


@pytest.mark.parametrize("chunk", [1, 2000, 2**21])
def test_chunks_of_any_size_and_views_as_input(chunk):
    weights, value = inputs((9, 13), 2, 3, 5, 6)
    weights = weights.permute(3, 4, 5, 0, 1, 2).contiguous().permute(3, 4, 5, 0, 1, 2)
    value = torch.cat([value, value], 4)[..., :6]
    results = []
    for backend in BACKENDS:
        w, v = weights.clone().requires_grad_(), value.clone().requires_grad_()
        with limit_chunks(chunk):
            out = local_filter(w, v, backend=backend)
            out.square().sum().backward()
        results.append((out, w.grad, v.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_sum_in_float32(backend, dtype):
    weights, value = inputs((8, 8), 2, window=7, dtype=dtype)
    out = local_filter(weights, value, backend=backend)
    assert out.dtype == dtype
    exact = local_filter(weights.double(), value.double(), backend="reference")
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_weight_for_all_is_a_convolution(backend):
    kernel, value = torch.randn(5, 5), torch.randn(1, 9, 6, 1, 3)
    out = local_filter(kernel.expand(1, 9, 6, 1, 5, 5), value, backend=backend)
    expected = F.conv2d(value[:, :, :, 0].permute(0, 3, 1, 2).transpose(0, 1), kernel[None, None], padding=2)
    torch.testing.assert_close(out[:, :, :, 0].permute(3, 0, 1, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["reflect", "replicate"])
def test_constants_stay_constant_under_weights_that_sum_to_one(backend, border):
    weights = torch.rand(1, 14, 10, 1, 5, 5).flatten(4).softmax(-1).unflatten(-1, (5, 5))
    out = local_filter(weights, torch.full((1, 7, 5, 1, 3), 2.5), border=border, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 2.5))


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_the_memory_that_is_hidden_in_the_operator_is_counted(size):
    weights, value = inputs(size, 2, 2, 5, 16)
    with torch.no_grad(), PeakMeter() as counted:
        out = local_filter(weights, value)
    with torch.no_grad(), PeakMeter() as taken:
        blocked.forward(weights, value, "clip")
    assert taken.peak <= counted.peak <= out.nbytes + 1.3 * (taken.peak - out.nbytes)


@pytest.mark.slow
def test_compiled_in_one_graph():
    weights, value = inputs((6, 5), 2)
    compiled = torch.compile(local_filter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights, value), local_filter(weights, value))
    torch.library.opcheck(
        torch.ops.featsharp.local_filter.default, (weights.requires_grad_(), value.requires_grad_(), "zeros", None)
    )


@pytest.mark.parametrize(
    ("weights", "value"),
    [
        ((1, 8, 8, 1, 3, 3), (1, 3, 4, 1, 2)),
        ((1, 8, 8, 1, 3, 5), (1, 4, 4, 1, 2)),
        ((1, 8, 8, 2, 3, 3), (1, 4, 4, 1, 2)),
        ((2, 8, 8, 1, 3, 3), (1, 4, 4, 1, 2)),
        ((1, 8, 4, 1, 3, 3), (1, 4, 4, 1, 2)),
        ((1, 8, 8, 9), (1, 4, 4, 2)),
    ],
)
def test_shapes_that_do_not_fit(weights, value):
    with pytest.raises(InputError, match=r"weights \[B, f\*H, f\*W, N, K, K\] and value \[B, H, W, N, E\]"):
        local_filter(torch.zeros(weights), torch.zeros(value))


def test_windows_borders_and_backends_that_do_not_exist():
    weights, value = inputs()
    with pytest.raises(ConfigError, match="must be odd; got 4"):
        local_filter(torch.zeros(1, 5, 5, 1, 4, 4), torch.zeros(1, 5, 5, 1, 2))
    with pytest.raises(ConfigError, match="unknown border 'mirror'"):
        local_filter(weights, value, border="mirror")
    with pytest.raises(ConfigError, match="unknown backend of local_filter 'triton'"):
        local_filter(weights, value, backend="triton")
