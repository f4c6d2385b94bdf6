"""Models of how a backbone pools high-resolution content into a token; learned in training, discarded afterwards.

Each maps [B, C, f*h, f*w] to [B, C, h, w]. FeatUp (arXiv 2403.10516, figure 3) and FeatSharp (arXiv 2502.16025). Where
the published versions pad with zeros, ours mirror the border, so that border tokens do not fade.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.device import usual_defaults
from featsharp.ops.padding import pad_border
from featsharp.registry import Registry


class Downsampler(nn.Module):
    """Base of all: [B, C, f*h, f*w] to [B, C, h, w]."""

    def kernels(self, x: Tensor) -> Tensor | None:
        """Compute the weights of each token for the K x K cells under it, [B, h, w, K, K]; they sum to one.

        [1, 1, 1, K, K] where they are the same for all tokens; None without parameters.
        """
        return None


DOWNSAMPLERS: Registry[Downsampler] = Registry("downsampler")


@usual_defaults()
def create_downsampler(name: str, embed_dim: int, factor: int, kernel_size: int = 9) -> Downsampler:
    """Build a downsampler by name ("attention", "simple" or "area").

    A kernel smaller than the factor x factor cells of a token would leave some out, so it is at least as large.
    """
    return DOWNSAMPLERS[name].factory(embed_dim, factor, max(kernel_size, factor))


@DOWNSAMPLERS.register("area", "mean over factor x factor cells, no parameters")
class AreaDownsampler(Downsampler):
    """Mean over each factor x factor cell: the parameter-free reference."""

    def __init__(self, embed_dim: int, factor: int, kernel_size: int = 0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)


@DOWNSAMPLERS.register("simple", "one learned blur kernel for all channels and positions")
class SimpleDownsampler(Downsampler):
    """A K x K blur kernel, non-negative and summing to one, applied at stride ``factor``.

    It starts close to the mean of the factor x factor cells (the published start is a box of K x K).
    """

    def __init__(self, embed_dim: int, factor: int, kernel_size: int = 9) -> None:
        super().__init__()
        self.factor = factor
        self.logits = nn.Parameter(torch.full((kernel_size, kernel_size), -4.0))
        first = max(kernel_size - factor, 0) // 2
        self.logits.data[first : first + factor, first : first + factor] = 1.0

    def kernel(self) -> Tensor:
        """Compute the blur kernel, [K, K]."""
        weight = F.softplus(self.logits)
        return weight / weight.sum()

    def kernels(self, x: Tensor) -> Tensor:
        return self.kernel()[None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel().to(x.dtype)
        padded = pad_cells(x, kernel.shape[0], self.factor)
        # One shared kernel, but a depthwise convolution: backward is twice as fast as with channels as images.
        return F.conv2d(padded, kernel.expand(x.shape[1], 1, -1, -1), stride=self.factor, groups=x.shape[1])


@DOWNSAMPLERS.register("attention", "a K x K kernel predicted for every token from the features under it")
class AttentionDownsampler(Downsampler):
    """Every output token is a convex mix of the (blurred) features in the K x K window around it.

    With zero filters the weights are ``softmax(logit_bias)`` everywhere: a simple downsampler.

    Args:
        embed_dim: Channels C.
        factor: Stride f.
        kernel_size: K.
        dropout: Probability that a tap is left out of the softmax; in training mode only.
    """

    def __init__(self, embed_dim: int, factor: int, kernel_size: int = 9, dropout: float = 0.2) -> None:
        super().__init__()
        self.factor = factor
        self.kernel_size = kernel_size
        self.dropout = dropout
        # The published filters have a common offset of 1, which cancels in the softmax but dominates masked logits.
        self.saliency = nn.Conv2d(embed_dim, kernel_size**2, kernel_size, stride=factor)
        nn.init.normal_(self.saliency.weight, std=0.01)
        assert self.saliency.bias is not None
        nn.init.normal_(self.saliency.bias, std=0.01)
        self.logit_bias = nn.Parameter(0.1 * torch.randn(kernel_size**2, 1, 1))

    @property
    def blur(self) -> Tensor:
        """Blur of the map before the taps are read: a Gaussian on 5 x 5 cells with a sum of one."""
        position = torch.arange(-2.0, 3.0, dtype=torch.float32, device=self.logit_bias.device)
        taps = torch.exp(-(position**2) / 0.5**0.5)
        kernel = taps[:, None] * taps
        return (kernel / kernel.sum()).to(self.logit_bias.dtype)

    def kernels(self, x: Tensor) -> Tensor:
        """See :meth:`Downsampler.kernels`; they are applied to the blurred map."""
        k = self.kernel_size
        return self._weights(x).unflatten(1, (k, k)).permute(0, 3, 4, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        channels, k = x.shape[1], self.kernel_size
        weights = self._weights(x)
        flat = pad_border(x.flatten(0, 1)[:, None], (2, 2, 2, 2), "replicate")
        blurred = F.conv2d(flat, self.blur[None, None].to(x.dtype)).reshape_as(x)
        blurred = pad_cells(blurred, k, self.factor)
        rows, cols = weights.shape[-2:]
        out = x.new_zeros(x.shape[0], channels, rows, cols)
        # One tap at a time: unfolding would hold K^2 / f^2 copies of the map.
        for tap in range(k * k):
            dy, dx = divmod(tap, k)
            piece = blurred[..., dy : dy + rows * self.factor : self.factor, dx : dx + cols * self.factor : self.factor]
            out = out + weights[:, tap : tap + 1] * piece[..., :rows, :cols]
        return out

    def _weights(self, x: Tensor) -> Tensor:
        """Compute the softmax over the taps of every token, [B, K^2, h, w]."""
        logits = self.saliency(pad_cells(x, self.kernel_size, self.factor)) + self.logit_bias
        if self.training and self.dropout > 0:
            dropped = torch.rand_like(logits) < self.dropout
            # A token without any tap left keeps all.
            logits = logits.masked_fill(dropped & ~dropped.all(1, keepdim=True), float("-inf"))
        return logits.softmax(1)


def pad_cells(x: Tensor, kernel_size: int, factor: int) -> Tensor:
    """Pad so that a K x K window at stride ``factor`` is centred on the factor x factor cells of every token.

    Borders are mirrored, and repeated where the map is smaller than the mirror.
    """
    total = max(kernel_size - factor, 0)
    before, after = total // 2, total - total // 2
    mode = "reflect" if max(before, after) < min(x.shape[-2:]) else "replicate"
    return pad_border(x, (before, after, before, after), mode)
