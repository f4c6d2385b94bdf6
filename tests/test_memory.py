"""Amounts of memory: reading them, counting them, predicting them."""

import pytest
import torch
from torch import nn

from featsharp.errors import ConfigError
from featsharp.layers.local_block import LocalBlock
from featsharp.memory import PeakMeter, format_memory, parse_memory, predict
from featsharp.ops.local_attention import blocked, local_attention


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5),
        ("5", 5),
        ("7 B", 7),
        ("2GiB", 2**31),
        ("1.5 GB", 1_500_000_000),
        ("800mib", 800 * 2**20),
        (" 3kB ", 3000),
    ],
)
def test_amounts(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 GB/s", "-1", "0", "0.2 B", "1e9", True, 2.5j, "2 parsecs", None])
def test_what_is_no_amount(text):
    with pytest.raises(ConfigError, match="amount of memory"):
        parse_memory(text)


def test_formatted_amounts_round_up():
    assert format_memory(1) == "1MiB"
    assert format_memory(2**21 + 1) == "3MiB"
    assert parse_memory(format_memory(2**30)) == 2**30


def test_the_meter_counts_what_is_alive():
    with PeakMeter() as meter:
        x = torch.zeros(1000)  # 4000 bytes
        y = x + 1
        assert meter.live == 8000
        del x
        assert meter.live == 4000
        z = y.double()
        del y
    assert (meter.live, meter.peak) == (8000, 12000)
    del z
    assert meter.live == 0


def test_the_meter_ignores_what_was_there_before():
    layer, x = nn.Linear(30, 20), torch.randn(50, 30)
    with torch.no_grad(), PeakMeter() as meter:
        view = layer.weight.t()[:, :3]
        out = layer(x)
        x.add_(1)
    assert meter.live == out.nbytes
    assert view.shape == (30, 3)


def test_a_prediction_equals_what_is_then_counted():
    block = LocalBlock(32, 16).eval()
    x = torch.randn(1, 9, 14, 32)
    with torch.no_grad():
        with PeakMeter() as meter:
            block(x)
        assert predict(block, x)[0] == meter.peak > 4 * x.nbytes


def test_predictions_inside_of_a_metered_computation_do_not_count():
    x = torch.randn(100, 100)
    with PeakMeter() as meter:
        assert predict(lambda x: x + 1, x)[0] == x.nbytes
    assert meter.peak == 0


def test_nothing_is_computed_and_nothing_allocated():
    x = torch.empty(1, device="cpu").expand(2**20, 2**20)
    size, result = predict(lambda x: x.double(), x)
    assert size == 2**43
    assert (result.shape, result.dtype) == ((2**20, 2**20), torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_the_memory_of_local_attention_that_is_hidden_in_the_operator_is_counted(size):
    """Blocks that do not fill the map cost padded copies, too."""
    x, bias = torch.randn(2, *size, 4, 8), torch.zeros(4, 5, 5)
    with torch.no_grad(), PeakMeter() as counted:
        out = local_attention(x, x, x, window=5)
    with torch.no_grad(), PeakMeter() as taken:
        blocked.forward(x, x, x, bias, 5, "clip")
    scratch = counted.peak - x.nbytes - bias.nbytes  # the scaled query and its bias are made outside
    assert taken.peak <= scratch <= out.nbytes + 1.3 * (taken.peak - out.nbytes)
