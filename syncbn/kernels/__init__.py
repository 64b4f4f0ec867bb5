"""Arithmetic of batch normalization on one rank: no process group is known here.

Each module has the same functions. ``reference`` is the ground truth in plain formulas, ``aten`` the fast composition
of PyTorch's own operators for any device.
"""

from syncbn.kernels.aten import gradient_sums, input_gradient, moments, normalize, relu_gradient

__all__ = ["gradient_sums", "input_gradient", "moments", "normalize", "relu_gradient"]
