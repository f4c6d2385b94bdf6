"""A backbone outside the graphs of ``torch.compile``. Importing this loads the compiler, which takes seconds."""

import torch
from torch import Tensor

from featsharp.backbones.base import BackboneOutput
from featsharp.backbones.wrapped import WrappedBackbone


class UncompiledBackbone(WrappedBackbone):
    """A backbone that ``torch.compile`` leaves out of its graphs, as compiling it takes minutes."""

    @torch.compiler.disable
    def forward(self, images: Tensor) -> BackboneOutput:
        """See :meth:`Backbone.forward`."""
        return self.backbone(images)
