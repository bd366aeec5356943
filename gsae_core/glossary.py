"""What each number means, in the words of the code that computes it.

A definition has one home: the docstring of the function, property or field behind the number.
The files are read as text, because importing them would import torch, which no page does.
"""

import ast
import functools
import inspect
from importlib import resources

_HOMES = {
    "l0": ("sae/metrics.py", "Metrics.l0"),
    "fvu": ("sae/metrics.py", "Metrics.fvu"),
    "gamma": ("sae/metrics.py", "Metrics.gamma"),
    "gamma_gate": ("sae/metrics.py", "Metrics.gamma_gate"),
    "gamma_per_feature": ("sae/metrics.py", "Metrics.gamma_per_feature"),
    "cosine": ("sae/metrics.py", "Metrics.cosine"),
    "density": ("sae/metrics.py", "Metrics.density"),
    "alive_fraction": ("sae/metrics.py", "Metrics.alive_fraction"),
    "loss_recovered": ("analysis/fidelity.py", "Fidelity.loss_recovered"),
    "kl": ("analysis/fidelity.py", "Fidelity.kl"),
    "delta_ce": ("analysis/results.py", "delta_ce"),
    "sparsity": ("config.py", "SAESpec.sparsity"),
    "firings": ("sae/metrics.py", "Metrics.firings"),
    "gate_density": ("sae/metrics.py", "Metrics.gate_density"),
    "norm_ratio": ("sae/deciles.py", "Decile.ratio"),
    "norm_gamma": ("sae/deciles.py", "Decile.gamma"),
    "norm": ("sae/deciles.py", "Decile.norm"),
    "ce_clean": ("analysis/fidelity.py", "Fidelity.ce_clean"),
    "ce_zero": ("analysis/fidelity.py", "Fidelity.ce_zero"),
    "matched_ratio": ("analysis/pareto.py", "matched_l0_ratio"),
    "dead_gate": ("training/report.py", "SAEReport.gate_dead_fraction"),
    "dead_magnitude": ("training/report.py", "SAEReport.magnitude_dead_fraction"),
    "lr": ("training/report.py", "SAEReport.lr"),
    "loss": ("sae/losses.py", "LossParts.total"),
    "reconstruction": ("sae/losses.py", "LossParts.reconstruction"),
    "sparsity_loss": ("sae/losses.py", "LossParts.sparsity"),
    "auxiliary": ("sae/losses.py", "LossParts.auxiliary"),
    "frontier": ("analysis/pareto.py", "frontier"),
}


@functools.cache
def definition(term: str) -> str:
    """Return the definition of a number shown on a page: the docstring of what computes it.

    Raises:
        KeyError: if no home is known for the term, or its home has no docstring.
    """
    file, path = _HOMES[term]
    return _docstrings(file)[path]


def terms() -> tuple[str, ...]:
    """Return every term that has a definition."""
    return tuple(_HOMES)


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
