"""The run folder: what a run is, where it stands and what it measured, as files anyone can read.

    runs/<id>/  config.json  status.json  metrics.jsonl  evals.json  events.jsonl  log.txt
                saes/<name>/  resume/  control.json  samples.json  evaluated_tokens.safetensors

The command line, the app and notebooks hold no job in memory: they read this folder, and a
detached process writes it. Nothing here imports torch.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsae_core.config import RunConfig, load_config
from gsae_core.errors import InputError
from gsae_core.store.files import append_line, free_bytes, readable, write_json, writing
from gsae_core.store.job_folder import FOLDER_BYTES, Job
from gsae_core.store.metrics_log import MetricsCursor, MetricsSlice, read_since, read_tail
from gsae_core.store.status import Status, lock, read_json, write_status

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
                append_line(
                    folder / "events.jsonl",
                    {"time": time.time(), "event": "created", "schema_version": SCHEMA_VERSION},
                )
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
        if not (folder / "config.json").is_file():
            raise InputError(
                f"expected a run folder with a config.json, found none in {folder}; "
                "give the folder that the training command printed"
            )
        _check_schema(folder)
        return cls(folder, load_config(folder / "config.json"))

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
        """
        path = self.folder / "evals.json"
        return [EARLIER | row for row in read_json(path)["saes"]] if path.exists() else []

    def samples(self) -> dict[str, Any] | None:
        """Return samples.json: a few latents of each SAE with their top tokens; None before it."""
        path = self.folder / "samples.json"
        return read_json(path) if path.exists() else None

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


def _check_schema(folder: Path) -> None:
    path = folder / "events.jsonl"
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        version = json.loads(file.readline()).get("schema_version", SCHEMA_VERSION)
    if version > SCHEMA_VERSION:
        raise InputError(
            f"expected a run of layout {SCHEMA_VERSION} or older, got {version} in {folder}; "
            "a newer version of gsae-core made it: update to open it"
        )
