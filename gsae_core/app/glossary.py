"""What each number means, in the words of the code that computes it.

A definition has one home: the docstring of the function, property or field behind the number.
The files are read as text, because importing them would import torch, which no page does.
"""

import ast
import functools
import inspect
import re
from importlib import resources
from typing import NamedTuple


class Home(NamedTuple):
    """Where a definition stands."""

    title: str
    """What people call it, as pages do."""
    file: str
    path: str
    """Of the function, class, property or field, with dots."""


_HOMES = {
    "l0": Home("L0", "sae/metrics.py", "Metrics.l0"),
    "fvu": Home("FVU", "sae/metrics.py", "Metrics.fvu"),
    "gamma": Home("γ", "sae/metrics.py", "Metrics.gamma"),
    "gamma_gate": Home("γ of the gate path", "sae/metrics.py", "Metrics.gamma_gate"),
    "gamma_per_feature": Home("γ of a feature", "sae/metrics.py", "Metrics.gamma_per_feature"),
    "cosine": Home("cosine", "sae/metrics.py", "Metrics.cosine"),
    "density": Home("density", "sae/metrics.py", "Metrics.density"),
    "alive_fraction": Home("alive", "sae/metrics.py", "Metrics.alive_fraction"),
    "loss_recovered": Home("loss recovered", "analysis/fidelity.py", "Fidelity.loss_recovered"),
    "kl": Home("KL", "analysis/fidelity.py", "Fidelity.kl"),
    "delta_ce": Home("ΔCE, CE increase", "analysis/results.py", "delta_ce"),
    "sparsity": Home("λ", "config.py", "SAESpec.sparsity"),
    "firings": Home("firings", "sae/metrics.py", "Metrics.firings"),
    "gate_density": Home("gate open", "sae/metrics.py", "Metrics.gate_density"),
    "norm_ratio": Home("length ratio", "sae/metrics.py", "Decile.ratio"),
    "norm_gamma": Home("γ of a tenth", "sae/metrics.py", "Decile.gamma"),
    "norm": Home("length of an activation", "sae/metrics.py", "Decile.norm"),
    "ce_clean": Home("CE, clean", "analysis/fidelity.py", "Fidelity.ce_clean"),
    "ce_zero": Home("CE, zero ablation", "analysis/fidelity.py", "Fidelity.ce_zero"),
    "matched_ratio": Home(
        "L0 baseline / L0 gated at matched fidelity", "analysis/pareto.py", "matched_l0_ratio"
    ),
    "dead_gate": Home("gate-dead", "training/report.py", "SAEReport.gate_dead_fraction"),
    "dead_magnitude": Home(
        "magnitude-dead", "training/report.py", "SAEReport.magnitude_dead_fraction"
    ),
    "lr": Home("learning rate", "training/report.py", "SAEReport.lr"),
    "loss": Home("loss", "sae/losses.py", "LossParts.total"),
    "reconstruction": Home("squared error", "sae/losses.py", "LossParts.reconstruction"),
    "sparsity_loss": Home("sparsity penalty", "sae/losses.py", "LossParts.sparsity"),
    "auxiliary": Home("auxiliary error", "sae/losses.py", "LossParts.auxiliary"),
    "frontier": Home("frontier", "analysis/pareto.py", "frontier"),
}

_FORMULAS = {
    "gated": Home("Gated SAE", "sae/architectures.py", "GatedSAE"),
    "gated_loss": Home("Loss of a Gated SAE", "sae/losses.py", "gated_loss"),
    "relu": Home("ReLU baseline", "sae/architectures.py", "ReluSAE"),
    "relu_loss": Home("Loss of a ReLU baseline", "sae/losses.py", "relu_loss"),
    "jumprelu": Home("JumpReLU SAE", "sae/jumprelu.py", "JumpReluSAE"),
    "jumprelu_loss": Home("Loss of a JumpReLU SAE", "sae/losses.py", "jumprelu_loss"),
    "topk": Home("TopK SAE", "sae/topk.py", "TopKSAE"),
    "topk_loss": Home("Loss of a TopK SAE", "sae/losses.py", "topk_loss"),
}


@functools.cache
def definition(term: str) -> str:
    """Return the definition of a number or a formula: the docstring of what computes it.

    What callers of the code have to know, its arguments and errors, is left out.

    Raises:
        KeyError: if no home is known for the term, or its home has no docstring.
    """
    home = (_HOMES | _FORMULAS)[term]
    text = re.split(r"\n\s*(?:Args|Raises):", _docstrings(home.file)[home.path])[0].rstrip()
    # A function says what it returns, a number what it is.
    return re.sub(r"^Returns? (\w)", lambda found: found[1].upper(), text)


def title(term: str) -> str:
    """Return what people call a number or a formula."""
    return (_HOMES | _FORMULAS)[term].title


def terms() -> tuple[str, ...]:
    """Return every number that has a definition."""
    return tuple(_HOMES)


def formulas() -> tuple[str, ...]:
    """Return every formula that is stated: architectures, each with its loss."""
    return tuple(_FORMULAS)


def search(words: str) -> tuple[str, ...]:
    """Return the terms whose title or definition holds all words; case is ignored.

    A title in full finds its own term alone, so that a link to one number shows one.
    """
    exact = tuple(term for term in terms() if title(term) == words)
    sought = words.casefold().split()
    found = (
        t for t in terms() if all(w in f"{title(t)} {definition(t)}".casefold() for w in sought)
    )
    return exact or tuple(found)


@functools.cache
def feature_columns() -> dict[str, str]:
    """Return what each column of a feature index's table means: `features.table.COLUMNS`."""
    home = "analysis/features/table.py"
    source = resources.files("gsae_core").joinpath(home).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COLUMNS":
            return ast.literal_eval(node.value)
    raise KeyError(f"expected COLUMNS in {home}, found none")


@functools.cache
def _docstrings(file: str) -> dict[str, str]:
    """Return the docstrings in a module of this package, by dotted path; fields of classes too."""
    source = resources.files("gsae_core").joinpath(file).read_text(encoding="utf-8")
    found: dict[str, str] = {}
    _collect(ast.parse(source), "", found)
    return found


def _collect(node: ast.Module | ast.ClassDef, prefix: str, found: dict[str, str]) -> None:
    for child, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(child)
            if text is not None:
                found[prefix + child.name] = text
            if isinstance(child, ast.ClassDef):
                _collect(child, f"{prefix}{child.name}.", found)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[prefix + child.target.id] = inspect.cleandoc(text)
