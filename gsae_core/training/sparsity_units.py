"""What a lambda means: from the units it is given in to those an SAE trains in, and to raw ones."""

from typing import NamedTuple

from gsae_core.config import SAESpec


class Sparsity(NamedTuple):
    """One lambda in the two units that matter, both against squared error summed over d_in."""

    coeff: float
    """Eq. 8's lambda for activations as the SAE trains on them; 0 for a TopK SAE: it has none."""

    raw: float
    """Eq. 8's lambda for raw activations: what gives the same SAE without any scaling."""


def sparsity_in_training_units(
    spec: SAESpec, *, d_in: int, scale: float, mean_square_norm: float
) -> Sparsity:
    """Return the lambda of Eq. 8 that `spec.sparsity` and `spec.loss_norm` stand for.

    Dividing the squared error by d_in, or by d_in E|x|^2 (arXiv:2404.16014v2, D.1.1), multiplies
    lambda by the same. With y = s x, latents of a unit-norm dictionary scale by s too, and
    |y - y_hat|^2 + lambda |f_y|_1 = s^2 (|x - x_hat|^2 + (lambda / s) |f_x|_1). Where lambda weighs
    the number of latents (JumpReLU), which no scale changes, the raw one is lambda / s^2.

    Args:
        spec: the SAE.
        d_in: width of its activations.
        scale: s, which multiplies raw activations.
        mean_square_norm: E|x|^2 of raw activations.
    """
    if spec.architecture == "topk":
        return Sparsity(coeff=0.0, raw=0.0)
    divisor = {
        "sum": 1.0,
        "mean": float(d_in),
        "mean_power": d_in * scale**2 * mean_square_norm,
    }[spec.loss_norm]
    coeff = spec.sparsity * divisor
    power = 2 if spec.architecture == "jumprelu" else 1
    return Sparsity(coeff=coeff, raw=coeff / scale**power)
