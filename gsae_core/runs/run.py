"""The run folder: what a run is, where it stands and what it measured, as files anyone can read.

    runs/<id>/  config.json  status.json  metrics.jsonl  evals.json  events.jsonl  log.txt
                saes/<name>/  resume/  control.json  samples.json  evaluated_tokens.safetensors
                tensorboard/<sae>/ where asked for

The command line, the app and notebooks hold no job in memory: they read this folder, and a
detached process writes it. Nothing here imports torch.
"""

import functools
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, PositiveInt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gsae_core import files
from gsae_core.config import NO_PLACE, RunConfig, load_config
from gsae_core.errors import InputError
from gsae_core.files import EXAMPLE, read_checked
from gsae_core.runs.evals import NormDeciles, read_evals
from gsae_core.runs.jobs.job import (
    ACTIVE,
    FOLDER_BYTES,
    Job,
    Status,
    new_status,
    read_once,
    read_status,
    start,
    write_status,
)
from gsae_core.runs.metrics_log import TAIL, MetricsCursor, MetricsSlice, read_since
from gsae_core.runs.track import check_installed

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.analysis.features.index import FeatureIndex


def runs_root() -> Path:
    """Return the folder runs are kept in: `runs`, unless GSAE_RUNS names another."""
    return Path(os.environ.get("GSAE_RUNS", "runs"))


SCHEMA_VERSION = 1
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Added(BaseModel):
    """extend/request.json: SAEs that were added to a finished run and are yet to learn."""

    saes: list[str]
    metrics_bytes: int = Field(ge=0)
    """Length of metrics.jsonl before them."""


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
    """What samples.json holds; `gsae_core.runs.work.samples` says what it means."""

    step: int
    every: int
    n_tokens: PositiveInt
    saes: dict[str, _Look]


@dataclass(frozen=True)
class Run(Job):
    """A run folder and the config it was made with; everything else is read when asked for."""

    config: RunConfig

    @classmethod
    def create(cls, folder: Path | str, config: RunConfig) -> "Run":
        """Make a run in a new or empty folder, in state `queued`."""
        folder = Path(folder).absolute()
        if config.track is not None:
            check_installed(config.track)  # before the run waits for its device, for hours maybe
        with files.writing(folder, FOLDER_BYTES):
            new_run_folder(folder.parent, folder.name)
            folder.mkdir(parents=True, exist_ok=True)
            if (free := files.free_bytes(folder)) < FOLDER_BYTES:
                raise InputError(
                    f"expected {files.readable(FOLDER_BYTES)} free for {folder}, found "
                    f"{files.readable(free)}; make room on the disk and start again"
                )
            with files.lock(folder, "start"):
                new_run_folder(folder.parent, folder.name)  # one made meanwhile is refused
                write_status(folder, new_status(config.train.n_steps))
                Job(folder).add_event("created", schema_version=SCHEMA_VERSION)
                # Last: a folder with a config is a run.
                files.write_json(folder / "config.json", config.model_dump(mode="json"))
        return cls(folder, config)

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """Return the run in a folder; refuse one that is damaged, or of a newer version."""
        folder = Path(folder).absolute()
        path = folder / "config.json"
        if not os.path.lexists(path):
            if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
                raise InputError(files.not_permitted(folder))
            raise InputError(
                f"expected a run folder with a config.json, found none in {folder}; "
                "give the folder that the training command printed"
            )
        check_layout(folder / "events.jsonl")
        try:
            return cls(folder, load_config(path))
        except InputError as error:
            if str(path) in str(error):
                raise
            raise InputError(f"expected the config of a run in {path}; {error}") from None

    def on(self, device: str | None) -> "Run":
        """Return the run as it works on another device than its config's; None: on that one.

        An InputError says that this machine lacks it.
        """
        if device is None:
            return self
        from gsae_core.runs.plan.cost import resolve_device

        resolve_device(device)
        return replace(self, config=self.config.model_copy(update={"device": device}))

    def metrics(self) -> list[dict[str, Any]]:
        """Return metrics.jsonl: a dict for each SAE at each logged step, oldest first."""
        return self.metrics_since(MetricsCursor()).rows

    def recent_metrics(self) -> list[dict[str, Any]]:
        """Return the newest rows alone, as many as speed and time left need; oldest first."""
        return self.metrics_since(TAIL).rows

    def metrics_since(self, cursor: MetricsCursor) -> MetricsSlice:
        """Return the rows written after `cursor`, and the cursor to ask with next time."""
        return read_since(self.folder / "metrics.jsonl", cursor)

    def evals(self) -> list[dict[str, Any]]:
        """Return the held-out evaluation of each SAE (`evals.EvalRow`); empty until there is one.

        Of an earlier version's, `zeroed` and `replaced` say what that version did, and
        `n_tokens_asked`, `shortage` and `n_predictions` are None: it did not say.
        """
        rows = read_evals(self.folder, [spec.name for spec in self.config.saes])
        places = {spec.name: self.config.place(spec)._asdict() for spec in self.config.saes}
        return [row | places[row["name"]] for row in rows]

    def samples(self) -> dict[str, Any] | None:
        """Return samples.json: a few latents of each SAE with their top tokens; None before it."""
        path = self.folder / "samples.json"
        if not os.path.lexists(path):
            return None
        return read_checked(path, _Samples, what="a sample of latents")

    def sae_cfg(self, name: str) -> dict[str, Any]:
        """Return an SAE's cfg.json; empty before it was saved first."""
        path = self.sae_folder(name) / "cfg.json"
        return files.read_sae_cfg(path) if os.path.lexists(path) else {}

    def sae_metadata(self, name: str) -> dict[str, Any]:
        """Return what an SAE's cfg.json says of how it came about."""
        return self.sae_cfg(name).get("metadata") or {}

    def damages(self) -> list[str]:
        """Return a sentence for each file that is damaged, though the run can be opened without."""

        def check_events() -> None:
            if lost := self.n_lost_events(self.status):
                raise InputError(files.left_out(lost, "events.jsonl"))

        found: list[str] = []
        readers = [self.evals, self.samples, self.recent_metrics, check_events]
        readers += [functools.partial(self.sae_cfg, spec.name) for spec in self.config.saes]
        for read in readers:
            try:
                read()
            except InputError as error:
                found.append(str(error))
        return found

    def sae_folder(self, name: str) -> Path:
        """Return the folder of one of the run's SAEs."""
        names = [spec.name for spec in self.config.saes]
        if name not in names:
            raise InputError(f"expected one of this run's SAEs ({', '.join(names)}), got {name!r}")
        return self.folder / "saes" / name

    def feature_stats(self, name: str) -> "pd.DataFrame":
        """Return one row per latent, measured on the held-out tokens of the evaluation.

        Columns: `fired` and `gate_open` (tokens), `density` (share of tokens it fired on) and
        `gamma` (the latent's own shrinkage; NaN where it never fired).
        """
        import pandas as pd

        path = self.sae_folder(name) / "feature_stats.safetensors"
        names = ("fired", "gate_open", "density", "gamma")
        try:
            columns = load_file(path)
            return pd.DataFrame({key: columns[key] for key in names}).rename_axis("latent")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(
                f"expected the arrays {', '.join(names)} in {path}, found none that can be read "
                f"({error}); measure them: python -m gsae_core evaluate {self.folder}"
            ) from None

    def norm_deciles(self, name: str) -> "pd.DataFrame":
        """Return one row per tenth of the held-out tokens by |x|, shortest first.

        Columns: `decile` (1 to 10), and those of `analysis.fidelity.Decile`.
        """
        import pandas as pd

        folder, again = self.sae_folder(name), f"python -m gsae_core evaluate {self.folder}"
        path, what = folder / "norm_deciles.json", "lengths of reconstructions"
        if not os.path.lexists(path):
            raise InputError(
                f"expected {what} of {name!r}, found none in {folder}; measure them: {again}"
            )
        try:
            rows = read_checked(path, NormDeciles, what=what)["deciles"]
        except InputError as error:
            raise InputError(f"{error}; measure them again: {again}") from None
        # JSON has null for NaN, which would make a column of objects.
        frame = pd.DataFrame(rows, columns=["norm", "ratio", "gamma"]).astype(float)
        frame.insert(0, "decile", range(1, len(frame) + 1))
        return frame

    def features(self, name: str) -> "FeatureIndex":
        """Return the feature index of one SAE; refuse one of other weights than the SAE has now."""
        from gsae_core.analysis.features.files import check_weights
        from gsae_core.analysis.features.index import open_index

        sae_folder = self.sae_folder(name)
        index = open_index(self.folder / "features" / name)
        check_weights(index.manifest, sae_folder)
        return index


@contextmanager
def staged(folder: Path | str) -> Iterator[Path]:
    """Give a place to make what a new run at `folder` will hold, moved there before the block ends.

    What is left there goes; an InputError says that there can be no new run at `folder`.
    """
    folder = Path(folder).absolute()
    new_run_folder(folder.parent, folder.name)
    place = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def trained_folder(run: Run, name: str) -> Path:
    """Return the folder of an SAE whose weights were saved; InputError says how they come about."""
    folder = run.sae_folder(name)
    if not os.path.lexists(folder / "cfg.json"):
        raise InputError(
            f"expected the weights of {name!r}, found none in {folder}; if its training was "
            f"interrupted: python -m gsae_core resume {run.folder}"
        )
    return folder


def read_added(run: Run) -> Added | None:
    """Return the SAEs that were added to a run and have not learnt to the end; None without any."""
    path = run.folder / "extend" / "request.json"
    if not os.path.lexists(path):
        return None
    added = Added(**read_checked(path, Added, what="SAEs added to the run"))
    # What adds them writes the config last.
    names = {spec.name for spec in run.config.saes}
    return added if names & {*added.saes} else None


def open_run(folder: Path | str) -> Run:
    """Return the run in a folder; an InputError says that it is damaged, newer, or not there."""
    return Run.open(folder)


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it can name a run: no path, and no flag."""
    if RUN_ID.fullmatch(run_id) is None:
        raise InputError(
            "expected a run name of 1 to 64 letters, digits, dots, dashes and underscores that "
            f"starts with a letter or digit, got {run_id!r}"
        )
    return run_id


def new_run_folder(root: Path, name: str) -> Path:
    """Return the folder that a new run of this name will have; refuse one that holds anything."""
    folder = root / check_run_id(name)
    # Devices and links that lead nowhere among them: they can hold no folder either.
    if any(os.path.lexists(place) and not place.is_dir() for place in (folder, *folder.parents)):
        raise InputError(f"expected a folder for the run, found a file at {folder}")
    if (folder / "config.json").exists():
        raise InputError(
            f"expected a new folder for the run, found a run in {folder}; choose another, or go on "
            f"with it: python -m gsae_core resume {folder}"
        )
    # Dot files are ours (the lock) or the system's; anything else is somebody's work.
    if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise InputError(
            f"expected a new or empty folder for the run, found other files in {folder}"
        )
    return folder


def check_layout(events: Path) -> None:
    """Refuse a run that a newer version made, by its events."""
    rows = files.read(events).rows
    # A run whose first line is damaged is taken for one of this version: the rest of it will tell.
    said = (row["schema_version"] for row in rows if "schema_version" in row)
    version = next(said, SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(
            f"expected a run of layout {SCHEMA_VERSION} or older, got {version} in "
            f"{events.parent}; a newer version of gsae-core made it: update to open it"
        )


def find_run(root: Path | str, run_id: str) -> Run:
    """Return a run by its name, which cannot lead out of `root`."""
    folder = Path(root).absolute() / check_run_id(run_id)
    if not folder.resolve().is_relative_to(Path(root).resolve()):
        raise InputError(f"expected a run inside {root}, got {run_id!r}, which leads out of it")
    return Run.open(folder)


def list_runs(root: Path | str) -> list[Run]:
    """Return the runs under `root`, newest first; those that cannot be read are left out."""
    return [run for run, _ in survey(root)[0]]


# What a run has once it began; with one of these and a status, but no config, it has lost that.
BEGUN = ("metrics.jsonl", "log.txt", "saes", "resume", "evals.json")


def survey(root: Path | str) -> tuple[list[tuple[Run, Status]], dict[str, str]]:
    """Return runs with what their processes said last, newest first; why others cannot be read."""
    listed: list[tuple[float, Run, Status]] = []
    unreadable: dict[str, str] = {}
    # With a dot: the queue, transfers, and what is deleted but for the removal of its files.
    for folder in sorted(Path(root).glob("[!.]*")):
        config, events = folder / "config.json", folder / "events.jsonl"
        if not os.path.lexists(config):
            begun = (os.path.lexists(folder / name) for name in BEGUN)
            if not os.path.lexists(folder / "status.json") or not any(begun):
                continue  # It is no run.
        try:
            # A config is judged in milliseconds: two hundred of them are a slow page.
            run = read_once(_run_of, config)
            if os.path.lexists(events):
                read_once(check_layout, events)
            listed.append((config.stat().st_mtime, run, read_status(run.folder)))
        except (InputError, FileNotFoundError) as error:
            if folder.is_dir():  # not deleted between the listing and the look
                unreadable[folder.name] = str(error)
    listed.sort(key=lambda each: each[0], reverse=True)
    return [(run, status) for _, run, status in listed], unreadable


def _run_of(config: Path) -> Run:
    return find_run(config.parent.parent, config.parent.name)


def launch(root: Path, config: RunConfig, *, nonce: str) -> Run:
    """Make a run under `root` and start it; return the one there is if it was made before.

    There is one `nonce` for each intention to start: a double press starts one run. A run with the
    same config that waits or trains now is that one too, started from here or not: its seed is the
    same, so a second one would find the same numbers.
    """
    with files.writing(root, 0):
        root.mkdir(parents=True, exist_ok=True)
        # Two visitors who press at once are served one after the other.
        with files.lock(root, "launch"):
            made = sorted(root.glob(f"*-{nonce}/config.json"))
            if made:
                run = Run.open(made[0].parent)
            else:
                alike = (run for run in list_runs(root) if run.config == config)
                moving = (run for run in alike if run.status.state in ("queued", *ACTIVE))
                run = next(moving, None) or Run.create(root / run_id(config, nonce), config)
            if run.status.state == "queued":
                start(run)
    return run


def run_id(config: RunConfig, nonce: str) -> str:
    """Return a name for a new run: what it is, when it began, and the nonce."""
    layers, sites = (dict.fromkeys(map(str, each)) for each in zip(*config.places, strict=True))
    place = f"{Path(config.model.name).name}-L{'-'.join(layers)}-{'-'.join(sites)}"
    if NO_PLACE in config.places:
        place = f"{Path(config.data.source).name}-vectors"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", config.preset or place).strip("-._") or "run"
    return f"{stem[:32]}-{time.strftime('%m%d-%H%M')}-{nonce}"


EXAMPLE_ID = EXAMPLE.name
SHOWN_SAE = "gated-0.35"
"""SAE of the example that opens first."""
SHOWN_FEATURE = 293
"""Feature of it that opens first: it fires on `def`, and raises names of functions."""


def example_run() -> Run | None:
    """Return the run that ships with the package; None in a package built without it."""
    return Run.open(EXAMPLE) if (EXAMPLE / "config.json").is_file() else None


def is_example(run: Run) -> bool:
    """Return whether a run is the one that ships with the package."""
    return run.folder == EXAMPLE


def labels_folder(root: Path, name: str) -> Path:
    """Return where, among the runs under `root`, what is said of an example's SAE is kept."""
    return root / ".example" / name
