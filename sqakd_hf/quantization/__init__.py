"""Tensor to codes to tensor: the mathematics, the quantizers, packing. Needs torch alone."""
