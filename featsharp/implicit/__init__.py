"""FeatUp's implicit upsampler (arXiv 2403.10516): a small network that is fitted to one image."""

from featsharp.implicit.fit import FitConfig, Fitter
from featsharp.implicit.fitted import ImplicitFeatures, load_fit
from featsharp.implicit.upsampler import load_encoder

__all__ = ["FitConfig", "Fitter", "ImplicitFeatures", "load_encoder", "load_fit"]
