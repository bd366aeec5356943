"""Evaluations as tables: one run or several, what changes between SAEs, what the paper printed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gsae_core.config import NO_MODEL, Architecture, RunConfig, SAESpec, Site, hook_name
from gsae_core.paper import PaperRun, paper_runs

NUMBERS = (
    "l0",
    "loss_recovered",
    "delta_ce",
    "kl",
    "fvu",
    "gamma",
    "gamma_gate",
    "cosine",
    "alive_fraction",
)
"""The measured numbers of an SAE, in the order they are shown."""

WORDS = ("name", "architecture", "run", "id", "zeroed", "replaced", "shortage", "text", "site")

DEPENDS: dict[str, tuple[str, ...]] = {
    "loss_recovered": ("zeroed", "replaced"),
    "delta_ce": ("replaced",),
    "kl": ("replaced",),
}
"""What two SAEs have to share for a number to compare: where zeros, reconstructions were read."""


class PaperSite(NamedTuple):
    """A site the paper trained SAEs at."""

    model: str
    site: Site
    layer: int

    @property
    def label(self) -> str:
        """What names it in a list and in an address, e.g. `gemma-7b resid_post 20`."""
        return f"{self.model} {self.site} {self.layer}"

    @property
    def source(self) -> str:
        """Where its numbers stand in print."""
        tables = "Tables 1-4" if self.model == "gemma-7b" else "Tables 5-8"
        return f"arXiv:2404.16014v2, appendix B, {tables}"


def evaluation_frame(evals: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return `evals.json`'s SAEs by architecture and L0, with `delta_ce`, ce_sae - ce_clean.

    Those of several places are in groups, in the order in which `evals` names the places.
    """
    frame = pd.DataFrame(list(evals))
    if frame.empty:
        return frame
    # JSON has null for NaN, which would make a column of objects.
    numbers = frame.columns.difference([*WORDS, "layer", "d_in", "d_sae", "n_tokens"])
    frame = frame.astype({str(name): float for name in numbers})
    frame = frame.assign(delta_ce=frame["ce_sae"] - frame["ce_clean"])
    frame = frame.sort_values(["architecture", "l0"])
    if "layer" in frame:
        named = list(dict.fromkeys((row["layer"], row["site"]) for row in evals))
        places = zip(frame["layer"], frame["site"], strict=True)
        order = np.argsort([named.index(place) for place in places], kind="stable")
        frame = frame.iloc[order]
    return frame.reset_index(drop=True)


def unit_measured(evals: pd.DataFrame) -> str:
    """Return what SAEs were all measured on: a `vector` of a folder, or else a `token`."""
    n = evals["n_predictions"].tolist() if "n_predictions" in evals else []
    return "vector" if set(n) == {0} else "token"


def of_architecture(evals: pd.DataFrame, architecture: Architecture) -> pd.DataFrame:
    """Return the rows of one architecture."""
    return pd.DataFrame(evals[evals["architecture"] == architecture])


def baselines(evals: pd.DataFrame) -> pd.DataFrame:
    """Return the SAEs a gated one is held against: ReLU first, then the others."""
    others = evals[evals["architecture"] != "gated"]
    return pd.DataFrame(others.iloc[(others["architecture"] != "relu").argsort(kind="stable")])


def nearest_pair(evals: pd.DataFrame) -> Mapping[str, str]:
    """Return the names of the gated SAE and the baseline whose L0 are closest: `gated`, `base`.

    Without a ReLU SAE any other is the baseline. A kind of which there is none is missing.
    """
    gated, base = of_architecture(evals, "gated"), baselines(evals)
    if "relu" in set(base["architecture"]):
        base = of_architecture(base, "relu")
    if gated.empty or base.empty:
        kinds = (("gated", gated), ("base", base))
        return {kind: str(rows["name"].iloc[-1]) for kind, rows in kinds if len(rows)}
    pairs = gated.merge(base, how="cross", suffixes=("_gated", "_base"))
    log_l0 = np.log(pairs[["l0_gated", "l0_base"]].to_numpy().clip(min=1e-9))
    nearest = pairs.iloc[int(np.abs(log_l0[:, 0] - log_l0[:, 1]).argmin())]
    return {"gated": str(nearest["name_gated"]), "base": str(nearest["name_base"])}


def several_runs(evals: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of several runs' `evaluation_frame` in one table, runs in the order given.

    `run` and `id` are added, `run/name`: neither may hold a slash, so it names one SAE in an
    address too; and `group`, the SAEs that share a frontier: the run, of several places with the
    hook point.
    """
    some = {run: frame for run, frame in evals.items() if len(frame)}
    frames = [
        frame.assign(
            run=run,
            id=[f"{run}/{name}" for name in frame["name"]],
            group=_groups(frame, run, alone=len(some) == 1),
        )
        for run, frame in some.items()
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def hook_points(frame: pd.DataFrame) -> list[str]:
    """Return the hook point of each row of `evaluation_frame`."""
    return [
        hook_name(int(layer), site)
        for layer, site in zip(frame["layer"], frame["site"], strict=True)
    ]


def _groups(frame: pd.DataFrame, run: str, *, alone: bool) -> list[str]:
    hooks = hook_points(frame) if "layer" in frame else []
    if len(set(hooks)) < 2:
        return [run] * len(frame)
    return hooks if alone else [f"{run} · {hook}" for hook in hooks]


def against(frame: pd.DataFrame, base: str) -> pd.DataFrame:
    """Return how each SAE's numbers differ from those of its counterpart in the run `base`.

    The counterpart has the same architecture and lambda, and the same place if `base` has several;
    of several the first counts. Columns are
    `change_<number>`, rows as in `frame`, of `several_runs`; NaN where there is no counterpart, or
    the two were measured at other positions.
    """
    keys = ["architecture", "sparsity"]
    if frame.loc[frame["run"] == base, "group"].nunique() > 1:
        keys += ["layer", "site"]
    # pandas takes NaN, an imported SAE's unknown lambda, to equal NaN.
    ours = pd.DataFrame(frame[frame["run"] == base]).dropna(subset=keys).drop_duplicates(keys)
    taken = [*keys, *NUMBERS, *DEPENDS["loss_recovered"]]
    paired = frame[[*keys, "run"]].merge(ours[taken], on=keys, how="left")
    paired.index = frame.index
    differences = pd.DataFrame(frame[list(NUMBERS)] - paired[list(NUMBERS)])
    for number, shared in DEPENDS.items():
        other = (frame[list(shared)].to_numpy() != paired[list(shared)].to_numpy()).any(axis=1)
        differences.loc[other, number] = math.nan
    return pd.DataFrame(differences.mask(frame["run"] == base)).add_prefix("change_")


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return each of `NUMBERS` before and after; NaN before where the two rows do not compare."""
    found = {}
    for name in NUMBERS:
        same = all(before[key] == after[key] for key in DEPENDS.get(name, ()))
        found[name] = float(before[name]) if same else math.nan, float(after[name])
    return found


def paper_sites() -> list[PaperSite]:
    """Return the sites of the paper's tables, in their order."""
    runs = (PaperSite(run.model, run.site, run.layer) for run in paper_runs())
    return list(dict.fromkeys(runs))


def published(site: PaperSite) -> pd.DataFrame:
    """Return the paper's runs at a site: `PaperRun`'s columns, `loss_recovered` as a share of 1."""
    rows = [run for run in paper_runs() if PaperSite(run.model, run.site, run.layer) == site]
    frame = pd.DataFrame(rows, columns=list(PaperRun._fields))
    return frame.assign(
        loss_recovered=frame["loss_recovered"] / 100,
        name=[f"{run.architecture}-{run.sparsity:g}" for run in rows],
    )


MISSING = "–"
MAX_COLUMNS = 10


def settings(config: RunConfig, spec: SAESpec) -> dict[str, str]:
    """Return everything that makes an SAE what it is, as text by dotted name: the run's settings,
    what depends on its length in steps, then the SAE's own but for its name, under `sae.`."""
    fields = config.model_dump(mode="json", exclude={"saes"})
    fields["model"] |= config.place(spec)._asdict()
    if config.model.name == NO_MODEL:
        fields = {key: value for key, value in fields.items() if key not in ("model", "data")}
        fields["held_out"] = config.data.held_out
    if config.imported is None:
        fields["train"] |= config.train.schedule._asdict()
    return _flat(fields, "") | _flat(
        spec.model_dump(mode="json", exclude={"name", "layer", "site"}), "sae."
    )


def model_site_text(config: RunConfig, text: object = None) -> str:
    """Return what a run's losses are measured on; they compare only where it is equal.

    `text`: what its evaluation names where that is of another text, else anything but a string.
    """
    read = text if isinstance(text, str) else config.data.source
    return f"{config.model.name}, {config.hook_names}, {read}"


def settings_table(columns: Mapping[str, Mapping[str, str]], *, differences: bool) -> pd.DataFrame:
    """Return a row per setting and a column for each of up to `MAX_COLUMNS` SAEs' `settings`.

    `differences`: only the settings that are not the same in every column.
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
        nested = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: _text(value)}
    return found


def _text(value: Any) -> str:
    if value is None:  # it asks for the default
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
