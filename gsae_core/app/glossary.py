"""What each number on the screen means, and the equations of each architecture.

Kept as a table: importing the code that computes the numbers would import torch, which no page
does.
"""

from typing import NamedTuple


class Term(NamedTuple):
    """A number or a formula."""

    title: str
    """What people call it, as pages do."""
    definition: str
    symbol: str = ""
    """As it stands in equations."""


TERMS = {
    "l0": Term(
        "L0",
        "How many features fire on an average token. Fewer is sparser, and easier to read.",
        "E|f|_0",
    ),
    "fvu": Term(
        "FVU",
        "Fraction of variance unexplained: 1 - explained variance.\n\n"
        "Squared distance from x to its reconstruction, over squared distance from x to the mean "
        "activation. 0 is perfect; 1 is no better than always answering with the mean.",
        "sum |x - x_hat|^2 / sum |x - mean(x)|^2",
    ),
    "gamma": Term(
        "γ",
        "Relative reconstruction bias: 1 is unbiased, below 1 reconstructions are too short.\n\n"
        "Dividing every reconstruction by γ brings it as close to x as one factor can "
        "(arXiv:2404.16014v2, Eq. 10).",
        "E|x_hat|^2 / E[x . x_hat]",
    ),
    "gamma_gate": Term(
        "γ of the gate path",
        "γ of reconstructions from relu(pi_gate): the shrinkage that the magnitude path removes.",
    ),
    "gamma_per_feature": Term(
        "γ of a feature",
        "How short each feature's part of the reconstruction is; 1 is right, below 1 too short."
        "\n\nDividing feature i's activations by γ_i, all others as they are, brings "
        "reconstructions as close to x as that one factor can, for decoder directions d_i of unit "
        "length. NaN where a feature never fired or the sums were not gathered. This project's own "
        "measure; with few firings it is mostly noise. Where an SAE normalises its inputs, x is "
        "the normalised input.",
        "sum f_i^2 / sum f_i (f_i + d_i . (x - x_hat))",
    ),
    "cosine": Term(
        "cosine",
        "Cosine of the angle between x and its reconstruction, averaged over tokens.",
        "E[cos(x, x_hat)]",
    ),
    "density": Term(
        "density", "Feature density: share of tokens on which a feature fires.", "P(f_i > 0)"
    ),
    "alive_fraction": Term(
        "alive",
        "Share of features that fired at least once; the others are dead. It grows with the "
        "number of tokens.",
    ),
    "loss_recovered": Term(
        "loss recovered",
        "Share of what zero ablation costs that the SAE gives back; 1 is perfect, never clipped."
        "\n\narXiv:2404.16014v2, Eq. 5. Zero ablation sets every position to zero; reconstructions "
        "leave BOS, separators and padding as they are, unless a run was told to replace all "
        "(`replace`). It may exceed 1 or be negative. NaN where zero ablation costs less than a "
        "millionth of a nat: nothing to recover.",
        "(ce_zero - ce_sae) / (ce_zero - ce_clean)",
    ),
    "kl": Term(
        "KL",
        "How far the model's next-token predictions move when it reads reconstructions, in nats "
        "per token.",
        "KL(clean || spliced)",
    ),
    "delta_ce": Term(
        "ΔCE, CE increase",
        "How much worse the language model predicts when it reads reconstructions, in nats per "
        "token; 0 is perfect.",
        "ce_sae - ce_clean",
    ),
    "sparsity": Term(
        "λ",
        "Sparsity coefficient: weight of the L1 penalty. Larger λ, fewer active features.\n\n"
        "For JumpReLU it is the weight of the L0 penalty, and for TopK it is k, the number of "
        "active features. It is relative to the squared error in training units, which `loss_norm` "
        "sets. NaN, null in JSON, where an imported SAE's files do not state it.",
    ),
    "firings": Term("firings", "Number of tokens on which a feature fired."),
    "gate_density": Term(
        "gate open", "Share of tokens on which a feature's gate is open.", "P(pi_gate_i > 0)"
    ),
    "norm_ratio": Term(
        "length ratio",
        "Length of the reconstruction over that of the activation, averaged over tokens.\n\n"
        "A reconstruction that leaves something out is shorter than its activation even without "
        "shrinkage, so a ratio below 1 is no fault by itself; γ of the same tokens measures "
        "shrinkage.",
        "E[|x_hat| / |x|]",
    ),
    "norm_gamma": Term(
        "γ of a tenth",
        "Relative reconstruction bias of this tenth of the tokens (Eq. 10).",
        "sum |x_hat|^2 / sum x . x_hat",
    ),
    "norm": Term(
        "length of an activation",
        "Length of an activation, averaged over the tokens of this tenth.",
        "|x|",
    ),
    "ce_clean": Term("CE, clean", "Cross-entropy loss of the unchanged model, in nats per token."),
    "ce_zero": Term(
        "CE, zero ablation",
        "Cross-entropy loss when the model reads zeros at every position, BOS, separators and "
        "padding included.",
    ),
    "matched_ratio": Term(
        "L0 baseline / L0 gated at matched fidelity",
        "How many times more features the baseline fires at the same loss recovered.\n\n"
        "Both frontiers are read at the loss recovered of each frontier SAE that the other one "
        "reaches, with log L0 interpolated linearly in loss recovered between neighbouring SAEs, "
        "and never beyond the ends. SAEs with L0 <= 0 have no logarithm and are left out.",
    ),
    "dead_gate": Term(
        "gate-dead", "Share of features whose gate did not open within the dead window."
    ),
    "dead_magnitude": Term(
        "magnitude-dead",
        "Share of features whose gate opened within the dead window, but only with a magnitude "
        "of 0.",
    ),
    "lr": Term("learning rate", "Learning rate of this step."),
    "loss": Term(
        "loss", "Training loss: squared error, sparsity penalty and auxiliary error added."
    ),
    "reconstruction": Term(
        "squared error", "Squared error of the reconstruction, summed over d_in.", "|x - x_hat|^2"
    ),
    "sparsity_loss": Term(
        "sparsity penalty",
        "The L1 penalty, or the L0 penalty of a JumpReLU SAE, λ included; 0 for a TopK SAE.",
        "λ |f|_1",
    ),
    "auxiliary": Term(
        "auxiliary error",
        "Squared error of x_hat_aux, decoded from relu(pi_gate); weight 1; 0 for a ReLU or "
        "JumpReLU SAE.\n\nOf a TopK SAE: 1/32 of the error that its dead features leave; 0 if none "
        "is dead.",
        "|x - x_hat_aux|^2",
    ),
    "frontier": Term(
        "frontier",
        "The Pareto-optimal SAEs, sparsest first; L0 and loss recovered both rise along it.\n\n"
        "An SAE is optimal when no other has both an L0 as low and a loss recovered as high, one "
        "of the two better. SAEs with a number that is not finite are left out.",
    ),
}

FORMULAS = {
    "gated": Term(
        "Gated SAE",
        """\
The encoder decides *which* features fire apart from *how much*.

    pi_gate = (x - b_dec) @ W_gate + b_gate
    pi_mag  = (x - b_dec) @ (W_gate * exp(r_mag)) + b_mag
    f       = 1[pi_gate > 0] * relu(pi_mag)
    x_hat   = f @ W_dec + b_dec

Rajamanoharan et al. 2024 (arXiv:2404.16014v2), Eq. 6-7. Weights multiply from the right, as in the
paper's pseudo-code; its text writes them transposed.""",
    ),
    "gated_loss": Term(
        "Loss of a Gated SAE",
        """\
arXiv:2404.16014v2, Eq. 8.

    reconstruction = |x - x_hat|^2
    sparsity       = lambda * |relu(pi_gate)|_1
    auxiliary      = |x - (relu(pi_gate) @ W_dec_copy + b_dec_copy)|^2

The copies are frozen: the auxiliary term trains the gate and never the dictionary. As in the
paper's pseudo-code, `b_dec` gets gradients of the last two terms through the centred input, unless
the SAE has `detach_b_dec`. Recipes A and B change the L1 weight and the copies.""",
    ),
    "relu": Term(
        "ReLU baseline",
        """\
One number says both whether a feature fires and how much.

    f     = relu((x - b_dec) @ W_enc + b_enc)
    x_hat = f @ W_dec + b_dec

Bricken et al. 2023, as arXiv:2404.16014v2 writes it (Eq. 1-3).""",
    ),
    "relu_loss": Term(
        "Loss of a ReLU baseline",
        """\
arXiv:2404.16014v2, Eq. 4: |x - x_hat|^2 + lambda |f|_1; no auxiliary term.

Under recipe A each feature's share of the L1 term is weighted by the norm of its direction.""",
    ),
    "jumprelu": Term(
        "JumpReLU SAE",
        """\
Features fire above a threshold of their own, and keep their whole value.

    z     = (x - b_dec) @ W_enc + b_enc
    f     = z * H(z - theta),   theta = threshold >= 0
    x_hat = f @ W_dec + b_dec

The input is centred, as everywhere in this package; the paper's own SAEs are not, and folding
`b_dec @ W_enc` into `b_enc` turns one form into the other. The paper learns log theta; a step of
Adam then moves theta by a share of itself, and from a small start no penalty raises it within a
short run. Here theta itself is the parameter: the optimiser sets it to 0 where a step took it
below, and keeps it in float32 where the SAE is in a shorter dtype.""",
    ),
    "jumprelu_loss": Term(
        "Loss of a JumpReLU SAE",
        """\
arXiv:2407.14435, section 3: |x - x_hat|^2 + lambda |f|_0.

The second term moves thresholds alone, and both move them by pseudo-derivatives.""",
    ),
    "topk": Term(
        "TopK SAE",
        """\
Keeps a token's `k` largest features.

    z     = (x - b_dec) @ W_enc + b_enc
    f     = relu(z) on the k largest z of a token, 0 elsewhere
    x_hat = f @ W_dec + b_dec

A token whose k-th largest z is negative has fewer than k features.""",
    ),
    "topk_loss": Term(
        "Loss of a TopK SAE",
        """\
arXiv:2406.04093: |x - x_hat|^2 + (1 / 32) |e - e_hat|^2.

    e     = x - x_hat, a constant: the auxiliary term does not train what made the error
    e_hat = relu(z) on the k_aux largest dead features of a token, @ W_dec

Both squared errors are in the same units, so the ratio of the two weights is the paper's.""",
    ),
}


def definition(term: str) -> str:
    """Return what a number means, with its equation at the end."""
    found = TERMS[term]
    return f"{found.definition}\n\n{found.symbol}" if found.symbol else found.definition


def title(term: str) -> str:
    """Return what people call a number."""
    return TERMS[term].title


def search(words: str) -> tuple[str, ...]:
    """Return the terms whose title or definition holds all words; case is ignored.

    A title in full finds its own term alone, so that a link to one number shows one.
    """
    exact = tuple(term for term in TERMS if title(term) == words)
    sought = words.casefold().split()
    return exact or tuple(
        t for t in TERMS if all(w in f"{title(t)} {definition(t)}".casefold() for w in sought)
    )
