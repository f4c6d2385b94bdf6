"""One training step: views -> features -> losses -> gradients."""

import torch
from torch import Tensor

from featsharp.data.views import Views, base_view, render_views
from featsharp.errors import InputError
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.training.objective import Losses, MultiViewObjective

# Numbers in the warped maps that the objective holds at once: 512 MiB in float32.
MAX_WARPED_ELEMENTS = 2**27
# A token counts when at least this part of its pixels shows image.
TOKEN_COVERAGE = 0.99


def backward_step(
    encoder: SharpEncoder,
    objective: MultiViewObjective,
    views: Views,
    low_res_size: tuple[int, int],
    autocast_dtype: torch.dtype | None = None,
) -> Losses:
    """Add the gradients of one batch to ``encoder`` and ``objective``.

    The objective is differentiated down to a detached leaf of the high-resolution map, as many views at a time as
    memory allows; the gradient then runs once through the upsampler, however many views there are. The result equals
    the gradient of the whole.

    Args:
        encoder: In training mode; the backbone stays frozen.
        objective: What compares views.
        views: Canvases with pixels in [0, 1], on the encoder's device.
        low_res_size: (h, w) in pixels of the low-resolution pass and of the rendered views.
        autocast_dtype: Type of the upsampler's matrix products; None: that of its weights. The losses are computed in
            float32 either way.

    Raises:
        InputError: When the loss is not finite; nothing was changed but gradients.
    """
    base, base_mask = base_view(views)
    targets, token_masks = encode_views(encoder, views, low_res_size)
    with torch.autocast(base.device.type, autocast_dtype, enabled=autocast_dtype is not None):
        high_res = encoder.upsampler(encoder.input_conditioner(base), encoder.encode, low_res_size).high_res
    high_res = high_res.to(base.dtype)
    leaf = high_res.detach().requires_grad_()
    target_leaf = targets.detach().requires_grad_(targets.requires_grad)
    parts = []
    batch, count = views.homographies.shape[:2]
    for chosen in torch.arange(count).split(views_at_once(high_res)):

        def pick(x: Tensor, chosen: Tensor = chosen) -> Tensor:
            return x.unflatten(0, (batch, count))[:, chosen].flatten(0, 1)

        part = objective(leaf, base_mask, pick(target_leaf), pick(token_masks), views.homographies[:, chosen])
        # The losses are means over views, so each part counts by its share of them.
        part = Losses(*(value * (len(chosen) / count) for value in part))
        if not torch.isfinite(part.total):
            raise InputError(
                f"the training loss is {part.total.item()}; the backbone or the upsampler returns NaN or infinite "
                "features (lower the learning rate, or use float32)"
            )
        part.total.backward()
        parts.append(part)
    if high_res.requires_grad:
        high_res.backward(leaf.grad)
    if targets.requires_grad:
        targets.backward(target_leaf.grad)
    return Losses(*(torch.stack(values).sum().detach() for values in zip(*parts, strict=True)))


def views_at_once(high_res: Tensor) -> int:
    """How many warped copies of a batch of maps fit into MAX_WARPED_ELEMENTS, at least one."""
    return max(1, MAX_WARPED_ELEMENTS // high_res.numel())


def encode_views(encoder: SharpEncoder, views: Views, low_res_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the backbone says about every view: features [B*n, C, h, w] and token masks [B*n, 1, h, w]."""
    images, masks = render_views(views, low_res_size)
    features = encoder.encode(encoder.input_conditioner(images)).features
    grid = (features.shape[-2], features.shape[-1])
    return features, (resize(masks, grid) > TOKEN_COVERAGE).to(features.dtype)
