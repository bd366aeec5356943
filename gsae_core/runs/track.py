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
import io
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from gsae_core.config import SAESpec, Tracker
from gsae_core.errors import InputError, extra
from gsae_core.files import public_name, to_json

if TYPE_CHECKING:
    from gsae_core.runs.run import Run

logger: logging.Logger = logging.getLogger(__name__)

Numbers = dict[str, int | float]
PROJECT = "gsae"
"""What tracked runs are filed under, unless WANDB_PROJECT says otherwise."""

INSTALL: dict[Tracker, str] = {
    "trackio": 'pip install "gsae-core[track]"',
    "wandb": 'pip install "wandb>=0.31"',
    "tensorboard": "pip install tensorboard",
}
# Of rows, what says the step, and what the config says too.
NOT_SENT = ("step", "sparsity", "d_in", "d_sae")


def check_installed(tracker: Tracker) -> None:
    """Refuse a tracker whose package is not there; nothing of it is imported."""
    found = find_spec(tracker)
    # A folder of that name here, such as W&B's own, is found as a package without an origin.
    if found is None or found.origin is None:
        raise InputError(
            f"expected {tracker} to be installed for --track, found none; {INSTALL[tracker]}"
        )


class Tracked(NamedTuple):
    """An SAE's run in a tracker."""

    id: str
    """Under which the tracker knows it."""
    held: int
    """Last step that the tracker holds; 0 for none."""
    log: Callable[[Numbers, int], object]
    """Takes what was measured, and the step."""
    log_evaluation: Callable[[Numbers], object]
    close: Callable[[], object]


# Openers of an SAE's tracked run: `known` is its id at an earlier start, if there was one; `newest`
# the step that was logged last, taken where a tracker cannot say what it holds.


def _trackio(run: "Run", sae: SAESpec, known: str | None, newest: int) -> Tracked:
    """Open a run in trackio's files on this machine, or where its TRACKIO_SPACE_ID says."""
    with extra("track"):
        import trackio
        from trackio import utils
        from trackio.sqlite_storage import SQLiteStorage
    from huggingface_hub import constants

    elsewhere = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
    if not elsewhere:
        try:
            utils.TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=utils.TRACKIO_DIR):
                pass
        except OSError as error:  # of which trackio would only warn
            raise InputError(
                f"expected a folder that trackio can write, got {utils.TRACKIO_DIR} "
                f"({error.strerror}); let TRACKIO_DIR name another"
            ) from error
    silent = contextlib.redirect_stdout(io.StringIO())
    init: Any = trackio.init
    about = _about(run, sae) | {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}

    def begin(resume: str) -> Any:
        before = constants.HF_HUB_OFFLINE
        # Or trackio would ask the Hub who is logged in, which it does for runs kept here too.
        constants.HF_HUB_OFFLINE = before or not elsewhere
        try:
            with silent:
                # In a context of its own: it ends the run that was begun before in the same.
                return contextvars.Context().run(init, PROJECT, resume=resume, **about)
        finally:
            constants.HF_HUB_OFFLINE = before

    def log_evaluation(numbers: Numbers) -> None:
        rows = SQLiteStorage.get_logs(PROJECT, opened.name, run_id=opened.id)
        # The same numbers again: `evaluate` with as many tokens as before.
        if not any(numbers.items() <= row.items() for row in rows):
            opened.log(numbers, run.config.train.n_steps)

    def close() -> None:
        with silent:
            opened.finish()

    opened = begin("never" if known is None else "allow")
    if known not in (None, opened.id):  # another run of this name came after ours
        close()
        opened = begin("never")
    held = SQLiteStorage.get_max_step_for_run(PROJECT, opened.name, run_id=opened.id)
    # Not said where another machine, or a file that waits to be read in, holds the rows.
    held = held or (newest if opened.id == known else 0)
    return Tracked(opened.id, held, opened.log, log_evaluation, close)


def _wandb(run: "Run", sae: SAESpec, known: str | None, newest: int) -> Tracked:
    """Open a run in Weights & Biases; with WANDB_MODE=offline in files for `wandb sync`."""
    import wandb

    online = wandb.setup().settings.mode in ("online", "shared", "run")
    # Not left to `init`, which would ask at the terminal, in the middle of the run's output.
    if online and not wandb.login(prompt=False, verify=False):
        raise InputError(
            "expected to be logged in to Weights & Biases, found no key; run `wandb login`, or "
            "set WANDB_MODE=offline to keep the run on this machine"
        )
    opened = wandb.init(
        project=None if os.environ.get("WANDB_PROJECT") else PROJECT,
        id=known or f"{secrets.token_hex(4)}-{sae.name}",
        resume="allow",
        reinit="create_new",
        # Without a limit a lost connection would keep a finished run waiting; what was not
        # uploaded stays in wandb's folder.
        settings=wandb.Settings(console="off", finish_timeout=60.0),
        **_about(run, sae),
    )
    unsaid = newest if known and not online else 0
    held = opened.step - 1 if opened.resumed else unsaid
    # Its history only goes forward; a summary is replaced by a later evaluation.
    return Tracked(opened.id, held, opened.log, opened.summary.update, opened.finish)


def _tensorboard(run: "Run", sae: SAESpec, known: str | None, newest: int) -> Tracked:
    """Write event files in the run's folder, anew with each start of the run."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / "tensorboard" / sae.name
    shutil.rmtree(folder, ignore_errors=True)
    # `purge_step`: a TensorBoard that read the files before forgets what it read.
    writer = SummaryWriter(folder, purge_step=0)
    writer.add_text("config", f"```json\n{to_json(_about(run, sae)['config'])}\n```")

    def log(numbers: Numbers, step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    n_steps = run.config.train.n_steps
    return Tracked(sae.name, 0, log, lambda numbers: log(numbers, n_steps), writer.close)


def _about(run: "Run", sae: SAESpec) -> dict[str, Any]:
    """Return name, group and config of an SAE's tracked run."""
    config = run.config.model_dump(mode="json", exclude={"saes"})
    # Of a folder of this machine its last part: a tracker may be another's.
    config["model"]["name"] = public_name(run.config.model.name)
    config["data"]["source"] = public_name(run.config.data.source)
    config["model"] |= run.config.place(sae)._asdict()
    config |= {"run": run.id, "sae": sae.model_dump(mode="json")}
    return {"name": f"{run.id}/{sae.name}", "group": run.id, "config": config}


_OPENERS = {"trackio": _trackio, "wandb": _wandb, "tensorboard": _tensorboard}


class Mirror:
    """What sends a run's numbers to its tracker; without one it does nothing.

    `required`: an InputError says why the tracker cannot start; otherwise the log does.
    """

    def __init__(self, run: "Run", *, required: bool = True) -> None:
        self._run, self._tracked = run, dict[str, Tracked]()
        self._ends = contextlib.ExitStack()
        if run.config.track is not None:
            with self._outlived(required=required):
                self._open(run.config.track)

    def _open(self, tracker: Tracker) -> None:
        check_installed(tracker)
        run = self._run
        starts = {each.get("by"): each for each in run.events() if each["event"] == "tracked"}
        known = starts[tracker]["ids"] if tracker in starts else {}
        newest = max((row["step"] for row in run.recent_metrics()), default=0)
        for sae in run.config.saes:
            tracked = _OPENERS[tracker](run, sae, known.get(sae.name), newest)
            self._tracked[sae.name] = tracked
            self._ends.callback(tracked.close)
        ids = {name: tracked.id for name, tracked in self._tracked.items()}
        run.add_event("tracked", by=tracker, ids=ids)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of metrics.jsonl, those left out that the tracker holds."""
        with self._outlived():
            for row in rows if self._tracked else ():
                tracked = self._tracked[row["sae"]]
                if row["step"] > tracked.held:
                    tracked.log(_numbers(row), row["step"])

    def add_evaluation(self) -> None:
        """Send what evals.json holds."""
        with self._outlived():
            for row in self._run.evals() if self._tracked else ():
                numbers = {f"eval/{name}": number for name, number in _numbers(row).items()}
                self._tracked[row["name"]].log_evaluation(numbers)

    def close(self) -> None:
        """End the tracked runs; waits until what was sent has arrived."""
        with self._outlived():
            self._ends.close()

    @contextlib.contextmanager
    def _outlived(self, *, required: bool = False) -> Iterator[None]:
        """Say why nothing more is sent, once a tracker has failed, and end what can be ended."""
        try:
            yield
        # Whatever libraries raise: no network, no room, a key that is refused.
        except Exception as error:
            self._tracked.clear()
            why = str(error)
            if not isinstance(error, InputError):
                first = why.strip().partition("\n")[0]
                why = (
                    f"expected {self._run.config.track} to take the run's numbers, it failed "
                    f"({type(error).__name__}: {first})"
                )
            if not required:
                logger.warning("no longer tracked: %s", why, exc_info=error)
                self._run.add_event("tracker stopped", why=why)
            with contextlib.suppress(Exception):  # it failed already, which was said
                self._ends.close()
            if required:
                raise InputError(why) from error


def _numbers(row: Mapping[str, Any]) -> Numbers:
    """Return a row's finite numbers; metrics.jsonl and evals.json have null for others."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value) and name not in NOT_SENT
    }
