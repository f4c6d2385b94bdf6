"""Parts of maps."""

import pytest
import torch

from featsharp.ops.boxes import Box, whole
from featsharp.ops.resize import enlarge, enlarge_chunk, resize, source_box


def test_boxes_grow_up_to_the_border():
    box = Box(1, 4, 5, 6)
    assert box.size == (3, 1)
    assert box.grow(2, (9, 7)) == Box(0, 6, 3, 7)
    assert box.relative_to(box.grow(2, (9, 7))) == Box(1, 4, 2, 3)
    assert whole((3, 4)) == Box(0, 3, 0, 4)


def test_cuts_are_views():
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    assert torch.equal(Box(1, 3, 2, 5).cut(x), x[:, :, 1:3, 2:5])
    assert torch.equal(Box(1, 2, 0, 3).cut_channels_last(x), x[:, 1:2, 0:3])
    assert Box(1, 3, 2, 5).cut(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 16, 1.5, 2.3])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3)])
def test_an_enlarged_chunk_equals_that_of_the_enlarged_map(factor, size):
    x = torch.randn(2, 3, *size)
    large = (round(factor * size[0]), round(factor * size[1]))
    expected = resize(x, large)
    for top in range(0, large[0], 3):
        for left in range(0, large[1], 4):
            box = Box(top, min(large[0], top + 4), left, min(large[1], left + 2))
            torch.testing.assert_close(enlarge(x, large, box), box.cut(expected), atol=2e-5, rtol=1e-5)
            # From nothing but the cells that it depends on.
            source = source_box(box, size, large)
            chunk = enlarge_chunk(source.cut(x), source, size, large, box)
            torch.testing.assert_close(chunk, box.cut(expected), atol=2e-5, rtol=1e-5)
            assert source.size[0] <= box.size[0] / factor + 4
