"""Chosen SAEs of a finished run -> one commit on the Hub, with their card; all of it or nothing."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gsae_core.analysis.pareto import matched_ratio
from gsae_core.config import SAESpec
from gsae_core.errors import HUB_NAME, InputError, hub_answers
from gsae_core.files import sha256
from gsae_core.plots.palette import LOOKS, knob
from gsae_core.runs.evals import measure_again, measured_earlier, measured_on, positions
from gsae_core.runs.run import Run
from gsae_core.text import count, fixed, marked_fvu, percent, worse_than_mean

if TYPE_CHECKING:
    from jinja2 import Template

# Of an SAE's folder; what else is in it was made here and is made anew elsewhere.
WEIGHTS = "sae_weights.safetensors"
SENT = ("cfg.json", WEIGHTS, "feature_stats.safetensors", "norm_deciles.json")
OF_RUN = ("config.json", "evals.json")


class Parcel(NamedTuple):
    """What is sent, decided before anything is."""

    repo: str
    public: bool
    files: Mapping[str, Path | bytes]
    """By path in the repository; the card and its figure are made for the purpose."""
    notes: tuple[str, ...]
    """What somebody may want to know before it is sent."""

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        files = self.files.values()
        return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files)


def pack(run: Run, names: Sequence[str], repo: str, *, public: bool = False) -> Parcel:
    """Return what a push of SAEs of a finished run to OWNER/NAME would send, a card included."""
    folders = {name: run.sae_folder(name) for name in names}
    check_repo(repo)
    state = run.status.state
    if state != "finished":
        raise InputError(
            f"expected a finished run, got {run.id}, which is {state}; let it train to its end: "
            f"python -m gsae_core resume {run.folder}"
        )
    if not names:
        raise InputError("expected the name of an SAE to push, got none; name one with --sae")
    paths = {name: run.folder / name for name in OF_RUN}
    for name, folder in folders.items():
        _check_whole(folder, name)
        paths |= {f"{name}/{file}": folder / file for file in SENT}
    files: dict[str, Path | bytes] = {name: path for name, path in paths.items() if path.is_file()}
    files |= {name: text.encode() for name, text in make_card(run, names, repo).items()}
    named = {"model": run.config.model.name, "text": run.config.data.source}
    notes = tuple(
        f"config.json and cfg.json name the {what}'s folder on this machine: {name}"
        for what, name in named.items()
        if os.path.isabs(name)
    )
    return Parcel(repo, public, files, notes)


def check_repo(repo: str) -> str:
    """Return a repository's name if one can be made under it."""
    is_name = HUB_NAME.fullmatch(repo) and "/" in repo
    if not is_name or len(repo) > 96 or "--" in repo or ".." in repo:
        raise InputError(
            f"expected a repository to push to as OWNER/NAME, got {repo[:200]!r}; the owner is "
            "your name on the Hub or an organisation of yours"
        )
    return repo


def _check_whole(folder: Path, name: str) -> None:
    # Imported here: it brings torch, and a page asks this module for less.
    from gsae_core.checkpoints.checkpoint import read_cfg

    cfg = read_cfg(folder)
    metadata = cfg.get("metadata") or {}
    if metadata.get("stopped"):
        raise InputError(
            f"expected an SAE that learned to the end, got {name}, which stopped at "
            f"{metadata['stopped']}; push another"
        )
    expected = metadata.get("weights_sha256")
    if not (folder / WEIGHTS).is_file() or (expected and sha256(folder / WEIGHTS) != expected):
        raise InputError(
            f"expected the whole weights of {name} in {folder / WEIGHTS}, found others or none; "
            "train or import it again"
        )


def check_token() -> None:
    """Check that there is a token to push with; whether the Hub takes it, the Hub says."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(
            "expected a Hub token that may write, found none; run `hf auth login`, or set HF_TOKEN "
            "in the environment the app was started from"
        )


def send(parcel: Parcel) -> str:
    """Send a parcel as one commit, and return its address.

    A repository that is not there is made, private unless told. An interruption leaves one as it
    was: large files wait unseen in the storage until a commit names them.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi

    check_token()
    api = HfApi(library_name="gsae_core")
    files = sorted(parcel.files.items())
    additions = [CommitOperationAdd(path, content) for path, content in files]
    names = sorted({path.partition("/")[0] for path in parcel.files if "/" in path})
    with hub_answers(parcel.repo, what="SAE"):
        if not api.repo_exists(parcel.repo):
            api.create_repo(parcel.repo, private=not parcel.public, exist_ok=True)
        try:
            commit = api.create_commit(
                parcel.repo, additions, commit_message=f"Add {', '.join(names)}"
            )
        except (RuntimeError, httpx2.TransportError) as error:
            # The library wraps what goes wrong with a large file.
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, httpx2.TransportError):
                raise cause or error from None
            raise InputError(
                f"expected to send {len(additions)} files to {parcel.repo!r}, the connection "
                "broke; nothing was changed there: push again"
            ) from error
    return commit.commit_url


FIGURE = "pareto.svg"


def make_card(run: Run, names: Sequence[str], repo: str) -> dict[str, str]:
    """Return the text files that go to the Hub beside SAEs, by name: the card, and its figure.

    The run's evaluation, where there is one, becomes a table and the figure.
    """
    from huggingface_hub import ModelCardData

    # A page that asks whether something can be sent draws nothing.
    from gsae_core.plots.pareto import pareto_svg

    config, evals = run.config, run.evals()
    saes = [spec for spec in config.saes if spec.name in names]
    measured = [row for row in evals if row["name"] in names]
    files = {}
    with contextlib.suppress(ValueError):  # Nothing measured may have a place in the plane.
        files[FIGURE] = pareto_svg(evals, chosen=names, title=run.id)
    notes = []
    if worse := worse_than_mean({row["name"]: row["fvu"] for row in measured}):
        notes.append(_text(worse))
    if any(measured_earlier(row) for row in evals):
        notes.append(measure_again("RUN"))
    ratio = matched_ratio(evals).sentence
    # A card can be made before there are weights.
    norm = run.sae_cfg(saes[0].name).get("normalize_activations")
    has_gated = any(spec.architecture == "gated" for spec in config.saes)
    # A name on the Hub alone: a folder of this machine is private.
    on_hub = HUB_NAME.fullmatch(config.model.name) and "/" in config.model.name
    front_matter = ModelCardData(
        library_name="saelens",
        tags=["sparse-autoencoder", *(["gated-sae"] if has_gated else [])],
        base_model=config.model.name if on_hub else None,
    )
    card = _template().render(
        config=config,
        figure=FIGURE if files else None,
        first=saes[0],
        front_matter=front_matter.to_yaml(),
        gated=any(spec.architecture == "gated" for spec in saes),
        kinds=dict.fromkeys(LOOKS[spec.architecture].label for spec in saes),
        measured=measured,
        model=public_name(config.model.name),
        norm=None if norm == "none" else norm,
        notes=notes,
        positions=positions(evals[0]) if evals else None,
        ratio=ratio[:1].upper() + ratio[1:],
        repo=repo,
        saes=saes,
        text_source=public_name(config.data.source),
        # Why there were not more may name a folder of this machine, or what the Hub answered.
        tokens=measured_on({**evals[0], "shortage": None}) if evals else None,
    )
    return {"README.md": card} | files


def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    # Markdown: what is not ours goes through `text` or `code`.
    jinja = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    jinja.filters |= {
        "text": _text,
        "code": _code,
        "count": count,
        "fixed": fixed,
        "percent": percent,
        "marked_fvu": marked_fvu,
        "label": lambda spec: LOOKS[spec.architecture].label,
        "knob": _knob,
    }
    path = resources.files("gsae_core").joinpath("assets/model-card.md.jinja")
    return jinja.from_string(path.read_text(encoding="utf-8"))


def public_name(name: str) -> str:
    """Return a model's or data set's name; of a folder, its last part alone."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def _knob(spec: SAESpec) -> str:
    # An imported SAE's files may not say.
    return "" if math.isnan(spec.sparsity) else f"{knob(spec.architecture, spec.sparsity)}, "


def _text(text: str) -> str:
    """Return text that Markdown shows as it stands, on one line."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|!~" else c for c in flat)


def _code(text: str) -> str:
    return " ".join(str(text).replace("`", "'").replace("|", "/").split())
