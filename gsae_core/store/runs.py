"""The run folder: what a run is, where it stands and what it measured, as files anyone can read.

    runs/<id>/  config.json  status.json  metrics.jsonl  evals.json  events.jsonl  log.txt
                saes/<name>/  resume/  control.json  samples.json  evaluated_tokens.safetensors

The command line, the app and notebooks hold no job in memory: they read this folder, and a
detached process writes it. Nothing here imports torch.
"""

import functools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, PositiveInt, ValidationError

from gsae_core.config import RunConfig, load_config
from gsae_core.errors import InputError
from gsae_core.store import json_lines
from gsae_core.store.files import free_bytes, readable, write_json, writing
from gsae_core.store.job_folder import FOLDER_BYTES, Job
from gsae_core.store.metrics_log import MetricsCursor, MetricsSlice, read_since, read_tail
from gsae_core.store.status import Status, lock, read_json, write_status
from gsae_core.validation import first_of

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.analysis.features import FeatureIndex

SCHEMA_VERSION = 1
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FEATURE_STATS = ("fired", "gate_open", "density", "gamma")

# What evaluations that do not say did.
EARLIER = {
    "zeroed": "counted",
    "replaced": "counted",
    "n_tokens_asked": None,
    "shortage": None,
    "n_predictions": None,
}


class _Example(BaseModel):
    tokens: list[str] = Field(min_length=1)
    values: list[float] = Field(min_length=1)
    at: int = Field(ge=0)


class _Latent(BaseModel):
    latent: int
    chosen: str
    fired: int
    examples: list[_Example]


class _Look(BaseModel):
    alive: int
    latents: list[_Latent]


class _Samples(BaseModel):
    """What samples.json holds; `gsae_core.samples` says what it means."""

    step: int
    every: int
    n_tokens: PositiveInt
    saes: dict[str, _Look]


class _Source(BaseModel):
    """Where an imported SAE came from."""

    library: str = ""
    assumed: list[str] = []


class _Metadata(BaseModel):
    source: _Source | None = None
    weights_sha256: str | None = None
    recipe: str | None = None
    k_aux: int | None = None
    stopped: str | None = None


class _SAECfg(BaseModel):
    """What cfg.json holds, where it holds it; loading the SAE asks for more."""

    architecture: str = ""
    d_in: int = Field(1, gt=0, lt=2**31)
    d_sae: int = Field(1, gt=0, lt=2**31)
    metadata: _Metadata | None = None
    normalize_activations: str | None = None


@dataclass(frozen=True)
class Run(Job):
    """A run folder and the config it was made with; everything else is read when asked for."""

    config: RunConfig

    @classmethod
    def create(cls, folder: Path | str, config: RunConfig) -> "Run":
        """Make a run folder, in state `queued`.

        Raises:
            InputError: if the name is no run id, the folder holds a run or other files, cannot be
                written, or the disk is full.
        """
        folder = Path(folder).absolute()
        check_run_id(folder.name)
        with writing(folder, FOLDER_BYTES):
            _make_folder(folder)
            if free_bytes(folder) < FOLDER_BYTES:
                raise InputError(
                    f"expected {readable(FOLDER_BYTES)} free for {folder}, found "
                    f"{readable(free_bytes(folder))}; make room on the disk and start again"
                )
            with lock(folder, "start"):
                # Dot files are ours (the lock) or the system's; anything else is somebody's work.
                if any(not entry.name.startswith(".") for entry in folder.iterdir()):
                    raise InputError(_occupied(folder))
                steps = config.train.n_steps
                write_status(folder, Status("queued", 0, steps, None, None, time.time(), None))
                Job(folder).add_event("created", schema_version=SCHEMA_VERSION)
                # Last: a folder with a config is a run.
                write_json(folder / "config.json", config.model_dump(mode="json"))
        return cls(folder, config)

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """Return the run in a folder.

        Raises:
            InputError: if there is no run, its files are damaged, or a newer version made it.
        """
        folder = Path(folder).absolute()
        if not os.path.lexists(folder / "config.json"):
            raise InputError(
                f"expected a run folder with a config.json, found none in {folder}; "
                "give the folder that the training command printed"
            )
        check_layout(folder)
        path = folder / "config.json"
        try:
            return cls(folder, load_config(path))
        except InputError as error:
            if str(path) in str(error):
                raise
            raise InputError(f"expected the config of a run in {path}; {error}") from None

    def metrics(self) -> list[dict[str, Any]]:
        """Return metrics.jsonl: a dict for each SAE at each logged step, oldest first."""
        return self.metrics_since(MetricsCursor()).rows

    def recent_metrics(self) -> list[dict[str, Any]]:
        """Return the newest rows alone, as many as speed and time left need; oldest first."""
        return read_tail(self.folder / "metrics.jsonl")

    def metrics_since(self, cursor: MetricsCursor) -> MetricsSlice:
        """Return the rows written after `cursor`, and the cursor to ask with next time.

        A last line still being written is left for the next call.
        """
        return read_since(self.folder / "metrics.jsonl", cursor)

    def evals(self) -> list[dict[str, Any]]:
        """Return the held-out evaluation of each SAE; empty until there is one.

        Of an earlier version's, `zeroed` and `replaced` say what that version did, and
        `n_tokens_asked`, `shortage` and `n_predictions` are None: it did not say.

        Raises:
            InputError: if evals.json is damaged.
        """
        from gsae_core.store.evals import check_row

        path = self.folder / "evals.json"
        if not os.path.lexists(path):
            return []
        try:
            rows = read_json(path).get("saes")
        except InputError as error:
            raise InputError(f"{error}; {_again(self)}") from None
        if not isinstance(rows, list):
            raise InputError(f"expected a list `saes` in {path}, found none; {_again(self)}")
        names = [spec.name for spec in self.config.saes]
        for row in rows:
            check_row(row, where=f"{path}; {_again(self)}", may_lack=EARLIER)
            if row["name"] not in names:
                raise InputError(
                    f"expected numbers of this run's SAEs ({', '.join(names)}) in {path}, got some "
                    f"of {row['name']!r}; {_again(self)}"
                )
        return [EARLIER | row for row in rows]

    def samples(self) -> dict[str, Any] | None:
        """Return samples.json: a few latents of each SAE with their top tokens; None before it.

        Raises:
            InputError: if it is damaged.
        """
        path = self.folder / "samples.json"
        if not os.path.lexists(path):
            return None
        fields = read_json(path)
        try:
            _Samples.model_validate(fields, strict=True)
        except ValidationError as error:
            raise InputError(
                f"expected a sample of latents in {path}, got {first_of(error)}"
            ) from None
        return fields

    def sae_cfg(self, name: str) -> dict[str, Any]:
        """Return an SAE's cfg.json; empty before it was saved first.

        Raises:
            InputError: if it is damaged, or the run has no SAE of this name.
        """
        path = self.sae_folder(name) / "cfg.json"
        return read_sae_cfg(path) if os.path.lexists(path) else {}

    def damages(self) -> list[str]:
        """Return a sentence for each file that is damaged, though the run can be opened without."""
        found: list[str] = []

        def count_events() -> None:
            if lost := self.n_lost_events(self.status):
                found.append(json_lines.left_out(lost, "events.jsonl"))

        readers = [self.evals, self.samples, self.recent_metrics, count_events]
        readers += [functools.partial(self.sae_cfg, spec.name) for spec in self.config.saes]
        for read in readers:
            try:
                read()
            except InputError as error:
                found.append(str(error))
        return found

    def sae_folder(self, name: str) -> Path:
        """Return the folder of one SAE.

        Raises:
            InputError: if the run has no SAE of this name.
        """
        names = [spec.name for spec in self.config.saes]
        if name not in names:
            raise InputError(f"expected one of this run's SAEs ({', '.join(names)}), got {name!r}")
        return self.folder / "saes" / name

    def feature_stats(self, name: str) -> "pd.DataFrame":
        """Return one row per latent, measured on the held-out tokens of the evaluation.

        Columns: `fired` and `gate_open` (tokens), `density` (share of tokens it fired on) and
        `gamma` (the latent's own shrinkage; NaN where it never fired).

        Raises:
            InputError: if the SAE is unknown or not evaluated yet.
        """
        import pandas as pd
        from safetensors.numpy import load_file

        path = self.sae_folder(name) / "feature_stats.safetensors"
        if not path.exists():
            raise InputError(
                f"expected feature statistics of {name!r}, found none yet in {path.parent}; "
                "they are written when the run is evaluated"
            )
        columns = load_file(path)
        return pd.DataFrame({key: columns[key] for key in FEATURE_STATS}).rename_axis("latent")

    def features(self, name: str) -> "FeatureIndex":
        """Return the feature index of one SAE.

        Raises:
            InputError: if the SAE is unknown, has no index, or has changed since it was built.
        """
        from gsae_core.analysis.features import open_index
        from gsae_core.analysis.index_files import check_weights

        sae_folder = self.sae_folder(name)
        index = open_index(self.folder / "features" / name)
        check_weights(index.manifest, sae_folder)
        return index


def read_sae_cfg(path: Path) -> dict[str, Any]:
    """Return the cfg.json of an SAE.

    Raises:
        InputError: if it is missing or damaged.
    """
    fields = read_json(path)
    try:
        _SAECfg.model_validate(fields, strict=True)
    except ValidationError as error:
        raise InputError(
            f"expected the config of an SAE in {path}, got {first_of(error)}"
        ) from None
    return fields


def _again(run: Run) -> str:
    return f"measure again: python -m gsae_core evaluate {run.folder}"


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it can name a run.

    Raises:
        InputError: if it could be a path, or is no plain name.
    """
    if RUN_ID.fullmatch(run_id) is None:
        raise InputError(
            "expected a run name of 1 to 64 letters, digits, dots, dashes and underscores that "
            f"starts with a letter or digit, got {run_id!r}"
        )
    return run_id


open_run = Run.open


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"expected a folder for the run, found a file at {folder}") from None


def _occupied(folder: Path) -> str:
    if (folder / "config.json").exists():
        return (
            f"expected a new folder for the run, found a run in {folder}; choose another, or go on "
            f"with it: python -m gsae_core resume {folder}"
        )
    return f"expected a new or empty folder for the run, found other files in {folder}"


def check_layout(folder: Path) -> None:
    """Check that this version reads a run of the layout that its events name.

    Raises:
        InputError: if a newer version made it, or its events cannot be read.
    """
    rows = json_lines.read(folder / "events.jsonl").rows
    versions = [row["schema_version"] for row in rows if "schema_version" in row]
    # A run whose first line is damaged is taken for one of this version: the rest of it will tell.
    version = versions[0] if versions else SCHEMA_VERSION
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(
            f"expected a run of layout {SCHEMA_VERSION} or older, got {version} in {folder}; "
            "a newer version of gsae-core made it: update to open it"
        )
