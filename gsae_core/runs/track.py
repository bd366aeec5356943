"""A run mirrored, as it goes, into a tracker: trackio, Weights & Biases or TensorBoard.

Each SAE is a tracked run of its own, in a group named after the run, so that a chart of the tracker
draws the SAEs of a sweep over each other. It holds the SAE's rows of metrics.jsonl by step, its row
of evals.json as `eval/...`, and the config; numbers that are not finite are left out.

The run folder stays the record, and a tracker's failure never ends a run: one that cannot start is
refused before anything is loaded, one that fails later is said once, and training goes on. What a
tracker lacks is sent from the folder when the run goes on; what it holds is not sent again.
"""

import contextlib
import contextvars
import functools
import io
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gsae_core.config import Tracker
from gsae_core.errors import InputError, extra, extra_sentence
from gsae_core.files import public_name, to_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from gsae_core.runs.run import Run

logger: logging.Logger = logging.getLogger(__name__)

Numbers = dict[str, int | float]
PROJECT = "gsae"
"""What tracked runs are filed under, unless WANDB_PROJECT says otherwise."""

# trackio is the package of an extra.
INSTALL = {"wandb": 'pip install "wandb>=0.31"', "tensorboard": "pip install tensorboard"}
# Of a row of evals.json, what the config says too.
SETTINGS = ("sparsity", "d_in", "d_sae")


def check_installed(tracker: Tracker) -> None:
    """Refuse a tracker whose package is not there; nothing of it is imported."""
    found = find_spec(tracker)
    # A folder of that name here, such as W&B's own, is found as a package without an origin.
    if found is not None and found.origin is not None:
        return
    if tracker == "trackio":
        raise InputError(extra_sentence("track", tracker))
    raise InputError(
        f"expected {tracker} to be installed for --track, found none; {INSTALL[tracker]}"
    )


class Opening(NamedTuple):
    """What the tracked run of an SAE is opened with."""

    run: str
    sae: str
    config: dict[str, Any]
    folder: Path
    """The run's, for a tracker that keeps files."""
    known: str | None
    """Under which the tracker knows it from an earlier start of the run; None: there was none."""
    newest: int
    """Step that was logged last before; taken where a tracker cannot say what it holds."""


class Trackio:
    """A run in trackio's files on this machine, or where its TRACKIO_SPACE_ID says."""

    def __init__(self, of: Opening) -> None:
        with extra("track"):
            import trackio
            from trackio import utils
            from trackio.sqlite_storage import SQLiteStorage

        if not _sent_elsewhere():
            _check_writable(utils.TRACKIO_DIR)

        def begin(resume: str) -> Any:
            about: dict[str, Any] = {"name": name, "group": of.run, "config": of.config}
            quiet: dict[str, Any] = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
            with _hub_unasked(), contextlib.redirect_stdout(io.StringIO()):
                # In a context of its own: trackio ends the run that was begun before in the same.
                init = functools.partial(contextvars.Context().run, trackio.init)
                return init(PROJECT, resume=resume, **about, **quiet)

        name = f"{of.run}/{of.sae}"
        self._run = begin("never" if of.known is None else "allow")
        if of.known not in (None, self._run.id):  # another run of this name came after ours
            self.close()
            self._run = begin("never")
        self.id: str = self._run.id
        held = SQLiteStorage.get_max_step_for_run(PROJECT, name, run_id=self.id)
        # Not said where another machine, or a file that waits to be read in, holds the rows.
        self.held: int = held or (of.newest if self.id == of.known else 0)
        self._rows = lambda: SQLiteStorage.get_logs(PROJECT, name, run_id=self.id)

    def log(self, numbers: Numbers, step: int) -> None:
        """Log what was measured at a step."""
        self._run.log(numbers, step=step)

    def log_evaluation(self, numbers: Numbers, step: int) -> None:
        """Log an evaluation that the run does not hold yet."""
        # The same numbers again: `evaluate` with as many tokens as before.
        if not any(numbers.items() <= row.items() for row in self._rows()):
            self._run.log(numbers, step=step)

    def close(self) -> None:
        """End the tracked run."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def _sent_elsewhere() -> bool:
    return bool(os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, of which trackio would only warn."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"expected a folder that trackio can write, got {folder} ({error.strerror}); let "
            "TRACKIO_DIR name another"
        ) from error


@contextlib.contextmanager
def _hub_unasked() -> Iterator[None]:
    """Keep trackio from asking the Hub who is logged in, which it does for runs kept here too."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before if _sent_elsewhere() else True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class Wandb:
    """A run in Weights & Biases; with WANDB_MODE=offline in files for `wandb sync`."""

    def __init__(self, of: Opening) -> None:
        import wandb

        online = wandb.setup().settings.mode in ("online", "shared", "run")
        # Not left to `init`, which would ask at the terminal, in the middle of the run's output.
        if online and not wandb.login(prompt=False, verify=False):
            raise InputError(
                "expected to be logged in to Weights & Biases, found no key; run `wandb login`, or "
                "set WANDB_MODE=offline to keep the run on this machine"
            )
        self._run = wandb.init(
            project=None if os.environ.get("WANDB_PROJECT") else PROJECT,
            id=of.known or f"{secrets.token_hex(4)}-{of.sae}",
            name=f"{of.run}/{of.sae}",
            group=of.run,
            config=of.config,
            resume="allow",
            reinit="create_new",
            # Without a limit a lost connection would keep a finished run waiting; what was not
            # uploaded stays in wandb's folder.
            settings=wandb.Settings(console="off", finish_timeout=60.0),
        )
        self.id: str = self._run.id
        unsaid = of.newest if of.known and not online else 0
        self.held: int = self._run.step - 1 if self._run.resumed else unsaid

    def log(self, numbers: Numbers, step: int) -> None:
        """Log what was measured at a step."""
        self._run.log(numbers, step=step)

    def log_evaluation(self, numbers: Numbers, step: int) -> None:
        """Put an evaluation into the run's summary."""
        # Its history only goes forward; a summary is replaced by a later evaluation.
        self._run.summary.update(numbers)

    def close(self) -> None:
        """End the tracked run."""
        self._run.finish()


class TensorBoard:
    """Event files in the run's folder, written anew with each start of the run."""

    held: int = 0

    def __init__(self, of: Opening) -> None:
        import torch.utils.tensorboard  # noqa: F401  (now, so that what it lacks is said now)

        self.id: str = of.sae
        self._of = of

    @functools.cached_property
    def _writer(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        folder = self._of.folder / "tensorboard" / self._of.sae
        # Not before there is something to write: a start that is refused leaves the files.
        shutil.rmtree(folder, ignore_errors=True)
        # `purge_step`: a TensorBoard that read the files before forgets what it read.
        writer = SummaryWriter(folder, purge_step=0)
        writer.add_text("config", f"```json\n{to_json(self._of.config)}\n```")
        return writer

    def log(self, numbers: Numbers, step: int) -> None:
        """Log what was measured at a step."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def log_evaluation(self, numbers: Numbers, step: int) -> None:
        """Log an evaluation as any other numbers: the files are written anew."""
        self.log(numbers, step)

    def close(self) -> None:
        """End the tracked run."""
        self._writer.close()


Tracked = Trackio | Wandb | TensorBoard
"""An SAE's tracked run, by its `id`; `held` is the last step that the tracker holds, 0 for none."""

KINDS: dict[Tracker, type[Tracked]] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": TensorBoard,
}


class Mirror:
    """What sends a run's numbers to its tracker; without one it does nothing.

    `required`: an InputError says why the tracker cannot start; otherwise the log does.
    """

    def __init__(self, run: "Run", *, required: bool = True) -> None:
        self._run, self._tracked = run, dict[str, Tracked]()
        if run.config.track is None:
            return
        try:
            self._open(run.config.track)
        # Whatever libraries raise: no network, no room, a key that is refused.
        except Exception as error:
            self.close()
            if required:
                raise InputError(_why(run.config.track, error)) from error
            self._give_up(error)

    def _open(self, tracker: Tracker) -> None:
        check_installed(tracker)
        run, known = self._run, dict[str, str]()
        for event in run.events():
            if event["event"] == "tracked" and event.get("by") == tracker:
                known = event["ids"]
        newest = max((row["step"] for row in run.recent_metrics()), default=0)
        config = run.config.model_dump(mode="json", exclude={"saes"})
        # Of a folder of this machine its last part: a tracker may be another's.
        config["model"]["name"] = public_name(run.config.model.name)
        config["data"]["source"] = public_name(run.config.data.source)
        for spec in run.config.saes:
            about = {"run": run.id, "sae": spec.model_dump(mode="json"), **config}
            opening = Opening(run.id, spec.name, about, run.folder, known.get(spec.name), newest)
            self._tracked[spec.name] = KINDS[tracker](opening)
        ids = {name: tracked.id for name, tracked in self._tracked.items()}
        run.add_event("tracked", by=tracker, ids=ids)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of metrics.jsonl, those left out that the tracker holds."""
        with self._outlived():
            for row in rows:
                tracked, step = self._tracked.get(row["sae"]), row["step"]
                if tracked is not None and step > tracked.held:
                    tracked.log(_numbers(row, but=("step",)), step)
                    tracked.held = step

    def add_evaluation(self) -> None:
        """Send what evals.json holds."""
        n_steps = self._run.config.train.n_steps
        with self._outlived():
            for row in self._run.evals() if self._tracked else ():
                numbers = _numbers(row, but=SETTINGS)
                named = {f"eval/{name}": number for name, number in numbers.items()}
                self._tracked[row["name"]].log_evaluation(named, n_steps)

    def close(self) -> None:
        """End the tracked runs; waits until what was sent has arrived."""
        while self._tracked:
            _, tracked = self._tracked.popitem()
            with self._outlived():
                tracked.close()

    @contextlib.contextmanager
    def _outlived(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Say why nothing more is sent, and end what can be ended."""
        why = _why(str(self._run.config.track), error)
        logger.warning("no longer tracked: %s", why, exc_info=error)
        self._run.add_event("tracker stopped", why=why)
        while self._tracked:
            _, tracked = self._tracked.popitem()
            with contextlib.suppress(Exception):  # it failed already, which was said
                tracked.close()


def _why(tracker: str, error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    return (
        f"expected {tracker} to take the run's numbers, it failed ({type(error).__name__}: {first})"
    )


def _numbers(row: Mapping[str, Any], *, but: Sequence[str]) -> Numbers:
    """Return a row's finite numbers; metrics.jsonl and evals.json have null for others."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value) and name not in but
    }
