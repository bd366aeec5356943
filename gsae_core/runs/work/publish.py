"""SAEs -> one commit on the Hub, with their card; all of it or nothing.

send(pack(run, names, "OWNER/NAME"))    chosen SAEs of a finished run
push_sae(sae, "OWNER/NAME")             one in memory
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import ConfigDict

from gsae_core.analysis.pareto import ratio_sentences
from gsae_core.checkpoints.hub import Address, is_repository, parse_address
from gsae_core.config import NO_MODEL, SITES, Config, SAESpec, Site, hook_name, validated
from gsae_core.errors import HUB_NAME, InputError, hub_answers
from gsae_core.files import public_name, sha256
from gsae_core.plots.palette import LOOKS, knob
from gsae_core.runs.evals import (
    NO_LOSSES,
    measure_again,
    measured_earlier,
    measured_on,
    positions,
    without_model,
)
from gsae_core.runs.outliers import outliers_measured
from gsae_core.runs.run import Run
from gsae_core.text import count, fixed, marked_fvu, percent, worse_than_mean

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from jinja2 import Template

    from gsae_core.sae.base import SAE

# Of an SAE's folder; what else is in it was made here and is made anew elsewhere.
WEIGHTS = "sae_weights.safetensors"
SENT = ("cfg.json", WEIGHTS, "feature_stats.safetensors", "norm_deciles.json")
OF_RUN = ("config.json", "evals.json")
FIGURE = "pareto.svg"


class Parcel(NamedTuple):
    """What is sent, decided before anything is."""

    repo: str
    public: bool
    files: Mapping[str, Path | bytes]  # by path there; card and figure are made for the purpose
    notes: tuple[str, ...] = ()  # what somebody may want to know before it is sent
    branch: str | None = None  # made if it is not there; None: the default branch
    kept: tuple[str, ...] = ()  # of the files, those that are left alone where they are there

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
        _check_whole(folder, name, run.sae_metadata(name))
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


def check_repo(repo: str) -> None:
    """Refuse a name under which no repository can be made."""
    if not is_repository(repo) or "/" not in repo:
        raise InputError(
            f"expected a repository to push to as OWNER/NAME, got {repo[:200]!r}; the owner is "
            "your name on the Hub or an organisation of yours"
        )


def _check_whole(folder: Path, name: str, metadata: Mapping[str, Any]) -> None:
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


def send(parcel: Parcel) -> "CommitInfo":
    """Send a parcel as one commit, and return it.

    A repository that is not there is made, private unless told. An interruption leaves one as it
    was: large files wait unseen in the storage until a commit names them.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_token()
    api, repo, branch = HfApi(library_name="gsae_core"), parcel.repo, parcel.branch
    names = sorted({path.rpartition("/")[0] for path in parcel.files if "/" in path})
    try:
        additions = [CommitOperationAdd(path, file) for path, file in sorted(parcel.files.items())]
    except ValueError as error:
        raise InputError(f"expected paths that the Hub takes, got another: {error}") from None
    with hub_answers(repo, what="SAE", revision=branch):
        if not api.repo_exists(repo):
            api.create_repo(repo, private=not parcel.public, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        kept = {path for path in parcel.kept if api.file_exists(repo, path, revision=branch)}
        sent = [addition for addition in additions if addition.path_in_repo not in kept]
        message = f"Add {', '.join(names)}"
        return api.create_commit(repo, sent, commit_message=message, revision=branch)


class _Asked(Config):
    """What `push_sae` is given: None is no False, and a number no text."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True)

    repo: str
    path: str
    private: bool
    branch: str | None
    model: str | None
    layer: int | None
    site: str | None
    metadata: Mapping[str, Any] | None


def push_sae(
    sae: "SAE",
    repo: str,
    *,
    path: str = "",
    private: bool = True,
    branch: str | None = None,
    model: str | None = None,
    layer: int | None = None,
    site: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Send an SAE that takes raw activations to the Hub as one commit; return its address there.

    The address, `OWNER/NAME:PATH@COMMIT`, is what `load_sae` takes, and gives the same tensors. The
    files are those of `save_sae`, which SAELens 6 opens, read back and compared before they are
    sent. A card is made of what is known; a README.md that is there is left alone.

    Args:
        repo: OWNER/NAME; made if it is not there. The token is the one that huggingface_hub finds.
        path: folder in the repository; "" names it by architecture and width, as `gated-64`.
        private: whether a repository that is made is private.
        branch: made if it is not there; None: the default branch.
        model: name of the language model, on the Hub; of a local folder the last part is sent.
        layer: block of it that the SAE belongs in, from 0; with a site, or neither.
        site: place in the block (`config.SITES`).
        metadata: more for `metadata` in cfg.json, of JSON's types; SAELens reads `hook_name` (of
            places that are no site of ours), `dataset_path`, `context_size` and `prepend_bos`.

    Raises:
        InputError: if there is no token; if an argument is of another type; if a name is not one;
            if a number is not finite; if the Hub cannot be reached or refuses.
    """
    # Without torch until here: pages ask this module what could be sent.
    from gsae_core.checkpoints.formats.write import write_sae
    from gsae_core.sae.base import SAE

    if not isinstance(sae, SAE):
        raise InputError(f"expected an SAE of gsae_core to push, got {type(sae).__name__}")
    given = {"repo": repo, "path": path, "private": private, "branch": branch, "model": model}
    validated(_Asked, given | {"layer": layer, "site": site, "metadata": metadata})
    path = path.strip("/") or f"{sae.architecture}-{sae.d_sae}"
    check_repo(repo)
    _check_place(repo, path, branch)
    facts = _metadata(model, layer, site, metadata or {}) | {"name": path}
    check_token()
    with tempfile.TemporaryDirectory() as folder:
        written = write_sae(sae, Path(folder, "sae"), format="gsae_core", metadata=facts)
        files: dict[str, Path | bytes] = {f"{path}/{file.name}": file for file in written.files}
        files["README.md"] = _card_of(sae, repo, path, facts).encode()
        parcel = Parcel(repo, not private, files, branch=branch, kept=("README.md",))
        return str(Address(repo, path, send(parcel).oid))


def _check_place(repo: str, path: str, branch: str | None) -> None:
    taken = path.partition("/")[0] in ("README.md", ".gitattributes")  # files there
    if taken or "@" in path or parse_address(f"{repo}:{path}").path != path:
        raise InputError(
            f"expected a folder in the repository, such as gated-64, got {path[:200]!r}; choose "
            "another name, without an @"
        )
    if branch is not None and re.fullmatch(r"[0-9a-f]{40}|refs/.*|", branch):
        raise InputError(
            f"expected the name of a branch, got {branch!r}; only a branch can be added to"
        )


def _metadata(
    model: str | None, layer: int | None, site: str | None, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is known, under the names that a cfg.json has."""
    from gsae_core.checkpoints.formats.build import SETTINGS

    # These describe the SAE and its files, and `save_sae` knows them.
    own = {"sae_lens_version", "recipe", "weights_sha256"}.union(*SETTINGS.values())
    facts = {key: value for key, value in more.items() if key not in own}
    if (layer is None) != (site is None):
        raise InputError(
            f"expected a layer and a site, or neither, got layer {layer} and site {site!r}"
        )
    if layer is not None and site is not None:
        places: dict[str, Site] = dict(zip(SITES, SITES, strict=True))
        if site not in places or layer < 0:
            raise InputError(
                f"expected a layer of at least 0 and a site of {', '.join(SITES)}, got layer "
                f"{layer} and site {site!r}; give another place as metadata={{'hook_name': ...}}"
            )
        facts["hook_name"] = hook_name(layer, places[site])
    if model is not None:
        facts["model_name"] = public_name(model)
    try:
        json.dumps(facts, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            "expected metadata of JSON's types (text, finite numbers, lists, objects), got: "
            f"{error}"
        ) from None
    return facts


def _measured_on(row: Mapping[str, Any]) -> str:
    text = row.get("text")
    return measured_on({**row, "shortage": None, "text": text and public_name(text)})


def make_card(run: Run, names: Sequence[str], repo: str) -> dict[str, str]:
    """Return the text files that go to the Hub beside SAEs, by name: the card, and its figure.

    The run's evaluation, where there is one, becomes a table and the figure.
    """
    # A page that asks whether something can be sent draws nothing.
    from gsae_core.plots.pareto import pareto_svg

    config, evals = run.config, run.evals()
    saes = [spec for spec in config.saes if spec.name in names]
    measured = [row for row in evals if row["name"] in names]
    # SAEs that read different places have no frontier in common.
    places = dict.fromkeys(map(config.place, saes))
    beside = [row for row in evals if (row["layer"], row["site"]) in places]
    figure = pareto_svg(beside, chosen=names, title=run.id) if len(places) == 1 else None
    files = {} if figure is None else {FIGURE: figure}
    notes = []
    if worse := worse_than_mean({row["name"]: row["fvu"] for row in measured}):
        notes.append(_text(worse))
    notes += map(_text, outliers_measured(measured))
    if any(measured_earlier(row) for row in evals):
        notes.append(measure_again("RUN"))
    ratio = "; ".join(ratio_sentences(beside))
    # A card can be made before there are weights.
    norm = run.sae_cfg(saes[0].name).get("normalize_activations")
    has_gated = any(spec.architecture == "gated" for spec in config.saes)
    card = _template().render(
        config=config,
        figure=FIGURE if files else None,
        front_matter=_front_matter(has_gated, config.model.name),
        hook=None
        if config.model.name == NO_MODEL
        else config.model_copy(update={"saes": tuple(saes)}).hook_names,
        measured=measured,
        model=None if config.model.name == NO_MODEL else public_name(config.model.name),
        norm=None if norm == "none" else norm,
        notes=notes,
        positions=positions(evals[0]) if evals else None,
        no_losses=NO_LOSSES if evals and without_model(evals[0]) else None,
        ratio=ratio[:1].upper() + ratio[1:],
        repo=repo,
        saes=saes,
        text_source=public_name(config.data.source),
        # Why there were not more may name a folder of this machine, or what the Hub answered.
        tokens=_measured_on(evals[0]) if evals else None,
    )
    return {"README.md": card} | files


def _card_of(sae: "SAE", repo: str, path: str, facts: Mapping[str, Any]) -> str:
    """Return the card of one SAE: what it is, and how it is loaded."""
    # Not checked: a folder in a repository may have a name that an SAE of a run may not.
    spec = SAESpec.model_construct(
        name=path,
        architecture=sae.architecture,
        d_sae=sae.d_sae,
        sparsity=float(getattr(sae, "k", math.nan)),
        tie=getattr(sae, "tie", "r_mag"),
    )
    model, hook = (facts.get(key) for key in ("model_name", "hook_name"))
    return _template().render(
        config=None,
        d_in=sae.d_in,
        figure=None,
        front_matter=_front_matter(sae.architecture == "gated", str(model or "")),
        hook=hook,
        measured=[],
        model=model,
        norm=sae.input_norm,
        repo=repo,
        saes=[spec],
    )


def _front_matter(has_gated: bool, model: str) -> str:
    from huggingface_hub import ModelCardData

    # A name on the Hub alone: a folder of this machine is private.
    on_hub = HUB_NAME.fullmatch(model) and "/" in model
    return ModelCardData(
        library_name="saelens",
        tags=["sparse-autoencoder", *(["gated-sae"] if has_gated else [])],
        base_model=model if on_hub else None,
    ).to_yaml()


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


def _knob(spec: SAESpec) -> str:
    # An imported SAE's files may not say.
    return "" if math.isnan(spec.sparsity) else f"{knob(spec.architecture, spec.sparsity)}, "


def _text(text: str) -> str:
    """Return text that Markdown shows as it stands, on one line."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|!~" else c for c in flat)


def _code(text: str) -> str:
    return " ".join(str(text).replace("`", "'").replace("|", "/").split())
