"""The image at the grid that a guided upsampler needs it on."""

import torch
import torch.nn.functional as F

from featsharp.layers.guidance import pool_guidance


def test_guidance_is_averaged_over_cells():
    image = torch.randn(1, 3, 12, 20)
    torch.testing.assert_close(pool_guidance(image, (3, 4)), F.avg_pool2d(image, (4, 5)))
    assert torch.equal(pool_guidance(image, (12, 20)), image)


def test_guidance_from_a_small_image_is_enlarged():
    image = torch.randn(1, 3, 4, 5)
    expected = F.interpolate(image, (8, 10), mode="bilinear", align_corners=False)
    assert torch.equal(pool_guidance(image, (8, 10)), expected)
    assert pool_guidance(image, (3, 10)).shape == (1, 3, 3, 10)
