"""Adam with the unit-norm dictionary; schedules of the learning rate and lambda; lambda's units."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsae_core.config import SAESpec, TrainRecipe
from gsae_core.sae.base import SAE
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.sparse.loops import compiled
from gsae_core.threads import over_rows


@compiled
def adam_on_sphere(first, last, W, grad, mean, square, rate, new1, new2, root, eps):
    """Move unit rows first to last - 1 of W by Adam, along the sphere, in one pass over each.

    The gradient loses its component along the row, Adam takes its step, the row is scaled back to
    norm one. W, grad, and Adam's moments mean and square are (d_sae, d_in). Of the scalars, `rate`
    is the learning rate / (1 - beta1^t), new1 and new2 are 1 - beta1 and 1 - beta2, and root is
    sqrt(1 - beta2^t); all in the precision of W, or the whole loop is lifted to float64.
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


WARMUP_FLOOR = 0.1  # Share of the peak at which a warm-up starts (arXiv:2404.16014v2, D.1.1).
EPS = 1e-8


def lr_factor(step: int, cfg: TrainRecipe, *, warmup_start: int = 0) -> float:
    """Return the learning rate of a step as a share of its peak.

    A cosine rises from 0.1 to 1 over `lr_warmup_steps` (arXiv:2404.16014v2, D.1.1), and a line
    falls to 0 over the last `lr_decay_fraction` of the steps; where they overlap they multiply.
    `step` counts those done before, as does `warmup_start` of the last warm-up. Where training was
    extended, each stretch has its own.
    """
    first, cfg = cfg.stage(step)
    step, warmup_start = step - first, max(warmup_start - first, 0)
    since, warmup = step - warmup_start, cfg.schedule.lr_warmup_steps
    factor = 1.0
    if since < warmup:
        risen = (1 - math.cos(math.pi * since / warmup)) / 2
        factor = WARMUP_FLOOR + (1 - WARMUP_FLOOR) * risen
    decay_steps = cfg.lr_decay_fraction * cfg.n_steps
    remaining = cfg.n_steps - step
    return factor * remaining / decay_steps if remaining < decay_steps else factor


def threshold_lr(lr: float, cfg: TrainRecipe, *, step: int = 0) -> float:
    """Return the peak learning rate of a JumpReLU SAE's thresholds, where all else has `lr`.

    Adam moves a number by about its learning rate a step. Pre-activations are sums over d_in
    numbers and go far in a short run at a small rate; a threshold is one number, and the penalty
    moves nothing else. So it may go one unit, the activations' length, within a run.
    """
    first, stage = cfg.stage(step)
    return cfg.threshold_lr or max(lr, 1 / (first + stage.n_steps))


def sparsity_factor(step: int, cfg: TrainRecipe) -> float:
    """Return lambda of a step as a share of its final value: a line from 0, then 1."""
    first, cfg = cfg.stage(step)
    step, warmup = step - first, cfg.schedule.sparsity_warmup_steps
    return step / warmup if step < warmup else 1.0


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
    `mean_square_norm` is E|x|^2 of raw activations.
    """
    if spec.architecture == "topk":
        return Sparsity(coeff=0.0, raw=0.0)
    divisor = {"sum": 1.0, "mean": float(d_in), "mean_power": d_in * scale**2 * mean_square_norm}
    coeff = spec.sparsity * divisor[spec.loss_norm]
    power = 2 if spec.architecture == "jumprelu" else 1
    return Sparsity(coeff=coeff, raw=coeff / scale**power)


class DictionaryAdam:
    """Adam over one SAE's parameters that keeps a unit-norm dictionary on the sphere.

    Moments are reached by the parameter's name: positions in an optimiser's list are how other
    libraries came to reset the wrong ones.
    """

    def __init__(self, sae: SAE, *, beta1: float, beta2: float) -> None:
        self._sae = sae
        self._named = dict(sae.named_parameters())
        for parameter in self._named.values():
            # Of a view of a wider tensor the fused kernel would move the numbers in between;
            # `empty_like` has the strides of what has no gaps.
            if torch.empty_like(parameter).stride() != parameter.stride():
                parameter.data = parameter.detach().contiguous()
        # Thresholds go at a rate of their own, in a group by themselves.
        self._threshold = sae.threshold if isinstance(sae, JumpReluSAE) else None
        groups = [[p for p in self._named.values() if p is not self._threshold]]
        groups += [] if self._threshold is None else [[self._threshold]]
        self._adam = torch.optim.Adam(
            [{"params": group} for group in groups], betas=(beta1, beta2), eps=EPS, fused=True
        )

    @torch.no_grad()
    def step(self, lr: float, *, threshold_lr: float | None = None) -> None:
        """Apply the gradients in `.grad`, at learning rate `lr`; rows of `W_dec` end at norm one.

        A dictionary whose recipe leaves norms free is neither projected nor renormalised. A
        threshold moves in its own unit, at the rate `threshold_lr` if given, and ends at 0 where it
        would be less: there the gradient still is what the penalty makes it, and raises it again.
        """
        for parameter in self._named.values():
            grad = parameter.grad
            # The fused kernel walks raw memory: a gradient of other strides (a transposed product
            # put into .grad by hand) moves the wrong entries without an error (torch 2.13, CPU).
            if grad is not None and grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(grad)
        W_dec, grad = self._sae.W_dec, self._sae.W_dec.grad
        on_sphere = self._sae.objective.unit_norm and grad is not None
        one_pass = on_sphere and W_dec.is_cpu and W_dec.dtype in (torch.float32, torch.float64)
        for group in self._adam.param_groups:
            group["lr"] = lr
        if isinstance(self._sae, JumpReluSAE):
            rate = lr if threshold_lr is None else threshold_lr
            self._adam.param_groups[-1]["lr"] = rate * (self._sae.threshold_unit or 1.0)
        if one_pass:
            W_dec.grad = None  # left out of the step of all others
        elif on_sphere and grad is not None:
            # Renormalising undoes a move along a direction; left in, that move would still fill
            # Adam's second moment and slow the turns that count (arXiv:2408.05147, section 3.2).
            along = torch.linalg.vecdot(grad, W_dec)
            grad.addcmul_(W_dec, along[:, None], value=-1)
        self._adam.step()
        if self._threshold is not None:
            self._threshold.clamp_(min=0)
        if one_pass:
            W_dec.grad = grad
            self._step_on_sphere(lr)
        elif on_sphere:
            W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)

    def _step_on_sphere(self, lr: float) -> None:
        W_dec, beta1, beta2 = self._sae.W_dec, *self._adam.param_groups[0]["betas"]
        state = self._adam.state[W_dec]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(W_dec) for _ in range(2))
        state["step"] += 1
        t = int(state["step"])
        arrays = [W_dec.detach(), W_dec.grad, state["exp_avg"], state["exp_avg_sq"]]
        scalars = (lr / (1 - beta1**t), 1 - beta1, 1 - beta2, math.sqrt(1 - beta2**t), EPS)
        matrices = [each.numpy() for each in arrays]
        numbers = [matrices[0].dtype.type(each) for each in scalars]
        over_rows(len(W_dec), lambda first, last: adam_on_sphere(first, last, *matrices, *numbers))

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return Adam's live state of a parameter; empty before its first step."""
        return self._adam.state.get(self._named[name], {})

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return copies, on the CPU, of every parameter's moments, by parameter name."""
        return {
            name: {key: value.detach().to("cpu", copy=True) for key, value in moments.items()}
            for name in self._named
            if (moments := self.moments(name))
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over moments that `state_dict` returned, of an SAE with the same parameters."""
        self._adam.state.clear()
        for name, moments in state.items():
            parameter = self._named[name]
            # Adam.load_state_dict goes by position; the step count stays float32 in any precision.
            mine = {"step": moments["step"].to(parameter.device, copy=True)}
            for key in ("exp_avg", "exp_avg_sq"):
                # In the layout of the parameter, for the reason given in `step`.
                mine[key] = torch.empty_like(parameter).copy_(moments[key])
            self._adam.state[parameter] = mine
