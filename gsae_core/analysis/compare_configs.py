"""Settings of several SAEs side by side, and which of them differ."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gsae_core.config import RunConfig, SAESpec

MISSING = "–"
MAX_COLUMNS = 10


def settings(config: RunConfig, spec: SAESpec) -> dict[str, str]:
    """Return everything that makes an SAE what it is, as text by dotted name.

    The run's settings, then the SAE's own under `sae.`, its name left out. What the recipe leaves
    to the run's length is there in steps. `None` reads `default`, for that is what it asks for
    everywhere else.
    """
    fields = config.model_dump(mode="json", exclude={"saes"})
    if config.imported is None:
        fields["train"] |= config.train.schedule._asdict()
    return _flat(fields, "") | _flat(spec.model_dump(mode="json", exclude={"name"}), "sae.")


def ground(config: RunConfig) -> str:
    """Return what a run's losses are measured on: SAEs of other models or sites do not compare."""
    return f"{config.model.name}, {config.model.hook_name}, {config.data.source}"


def side_by_side(columns: Mapping[str, Mapping[str, str]], *, differences: bool) -> pd.DataFrame:
    """Return one row per setting and one column per SAE, with a dash where it has no such setting.

    Args:
        columns: `settings` by the name of the column; those beyond `MAX_COLUMNS` are left out.
        differences: keep only the settings that are not the same in every column.
    """
    shown = dict(list(columns.items())[:MAX_COLUMNS])
    names = list(dict.fromkeys(name for column in shown.values() for name in column))
    rows = {name: [column.get(name, MISSING) for column in shown.values()] for name in names}
    if differences and len(shown) > 1:
        rows = {name: row for name, row in rows.items() if len(set(row)) > 1}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(shown))
    return table.rename_axis("setting")


def _flat(fields: Mapping[str, Any], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = _text(value)
    return found


def _text(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
