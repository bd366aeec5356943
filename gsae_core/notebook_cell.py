"""A run's config as the Python that makes it: a notebook cell that trains exactly this run."""

from collections.abc import Iterable
from textwrap import indent
from typing import Any

from pydantic import BaseModel

from gsae_core.config import Architecture, RunConfig, SAESpec, sweep
from gsae_core.errors import InputError


def notebook_cell(config: RunConfig, *, name: str = "my-run") -> str:
    """Return Python that builds a config equal to `config`, trains it and shows its evaluation.

    Args:
        name: of the run's folder under runs/.
    """
    code = config_code(config)
    kinds = [kind for kind in _KINDS if f"{kind}(" in code]
    return "\n".join(
        [
            "from gsae_core.config import " + ", ".join(kinds),
            "from gsae_core.job import train_run",
            "from gsae_core.store.runs import Run",
            "",
            f"config = {code}",
            f"run = Run.create({'runs/' + name!r}, config)",
            "for now in train_run(run):",
            '    print(f"{now.stage}: {now.done} of {now.total}", end="\\r")',
            "run.evals()",
        ]
    )


_KINDS = (
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "RunConfig",
    "SAESpec",
    "TrainRecipe",
    "sweep",
)


def config_code(config: RunConfig) -> str:
    """Return the expression that makes `config`; settings at their defaults are left out."""
    parts = []
    for field, info in type(config).model_fields.items():
        value = getattr(config, field)
        if field == "saes":
            parts.append(f"saes={_saes_code(value)}")
        elif info.is_required() or value != info.default:
            parts.append(f"{field}={_code(value)}")
    return _call("RunConfig", parts)


def _saes_code(saes: tuple[SAESpec, ...]) -> str:
    """Return a `sweep(...)` where the SAEs are one, else each SAE by itself."""
    return _sweep_code(saes) or _call("", [_code(spec) for spec in saes])


def _sweep_code(saes: tuple[SAESpec, ...]) -> str | None:
    found: dict[Architecture, None] = {spec.architecture: None for spec in saes}
    architectures = list(found)
    sparsity = list(dict.fromkeys(spec.sparsity for spec in saes))
    swept = {"name", "architecture", "d_sae", "sparsity"}
    common = {
        field: value
        for field, value in saes[0].model_dump().items()
        if field not in swept and value != SAESpec.model_fields[field].default
    }
    widths = {spec.d_sae for spec in saes if spec.architecture != "relu"} or {
        spec.d_sae * 2 // 3 for spec in saes
    } | {spec.d_sae for spec in saes}
    for width in sorted(widths):
        for equal_width in (False, True):
            try:
                same = sweep(architectures, sparsity, width, equal_width=equal_width, **common)
            except InputError:
                continue
            if same == saes:
                parts = [repr(architectures), repr(sparsity), repr(width)]
                parts += ["equal_width=True"] * equal_width
                parts += [f"{field}={value!r}" for field, value in common.items()]
                return f"sweep({', '.join(parts)})"
    return None


def _code(value: Any) -> str:
    if not isinstance(value, BaseModel):
        return repr(value)
    fields = type(value).model_fields
    given = [
        f"{field}={_code(getattr(value, field))}"
        for field, info in fields.items()
        if info.is_required() or getattr(value, field) != info.default
    ]
    return _call(type(value).__name__, given)


def _call(name: str, parts: Iterable[str]) -> str:
    """Return a call with an argument a line, or on one line where that is short."""
    parts = list(parts)
    line = f"{name}({', '.join(parts)})"
    if name and len(line) <= 80 and "\n" not in line:
        return line
    body = "".join(indent(part, "    ") + ",\n" for part in parts)
    return f"{name}(\n{body})"
