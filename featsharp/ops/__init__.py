"""Tensors in, tensors out: the operations that upsamplers share. They know no model and need torch only."""
