"""Adam on the sphere, compiled: projection, step and norm in one pass over each row."""

import numpy as np

from gsae_core.sae.loops import compiled


@compiled
def adam_on_sphere(first, last, W, grad, mean, square, rate, new1, new2, root, eps):
    """Move unit rows first to last - 1 of W by Adam, along the sphere, in one pass over each.

    The gradient loses its component along the row, Adam takes its step, the row is scaled back to
    norm one.

    Args:
        first, last: rows.
        W, grad, mean, square: (d_sae, d_in): weights, their gradient, Adam's two moments.
        rate: learning rate / (1 - beta1^t); like all numbers here in the precision of W, for an
            integer beside it would lift the whole loop to float64.
        new1, new2: 1 - beta1 and 1 - beta2, the share of the new in each moment.
        root: sqrt(1 - beta2^t).
        eps: added to the root of the second moment.
    """
    width, zero = W.shape[1], W.dtype.type(0)
    for i in range(first, last):
        w, g, m, v = W[i], grad[i], mean[i], square[i]
        along = zero
        for j in range(width):
            along += w[j] * g[j]
        norm = zero
        for j in range(width):
            g[j] -= along * w[j]
            m[j] += (g[j] - m[j]) * new1
            v[j] += (g[j] * g[j] - v[j]) * new2
            w[j] -= rate * m[j] / (np.sqrt(v[j]) / root + eps)
            norm += w[j] * w[j]
        norm = np.sqrt(norm)
        for j in range(width):
            w[j] /= norm
