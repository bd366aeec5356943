"""Chosen SAEs of a finished run -> one commit on the Hub, with their card; all of it or nothing."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from gsae_core.analysis.pareto import Point, frontier, matched_ratio
from gsae_core.config import Architecture, RunConfig, SAESpec
from gsae_core.errors import InputError, hub_answers
from gsae_core.files import sha256
from gsae_core.plots.palette import AXES, LOOKS, knob, round_values
from gsae_core.runs.evals import measure_again, measured_earlier, measured_on, positions
from gsae_core.runs.run import Run
from gsae_core.text import count, fixed, marked_fvu, percent, worse_than_mean

# Of an SAE's folder; what else is in it was made here and is made anew elsewhere.
WEIGHTS = "sae_weights.safetensors"
SENT = ("cfg.json", WEIGHTS, "feature_stats.safetensors", "norm_deciles.json")
OF_RUN = ("config.json", "evals.json")

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Parcel(NamedTuple):
    """What is sent, decided before anything is."""

    repo: str
    public: bool
    files: Mapping[str, Path]
    """By path in the repository."""
    texts: Mapping[str, str]
    """Files that are made for the purpose: the card, its figure."""
    notes: tuple[str, ...]
    """What somebody may want to know before it is sent."""

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        texts = sum(len(text.encode()) for text in self.texts.values())
        return texts + sum(path.stat().st_size for path in self.files.values())


class Pushed(NamedTuple):
    """Where it went."""

    repo: str
    commit: str
    url: str
    created: bool
    """Whether the repository was made for it."""


def pack(
    run: Run, names: Sequence[str], repo: str, *, texts: Mapping[str, str], public: bool = False
) -> Parcel:
    """Return what a push would send.

    Args:
        names: of the SAEs.
        repo: OWNER/NAME.
        texts: the card and its figure, from `model_card.make_card`.

    Raises:
        InputError: if the run or an SAE is not finished, its files are not whole, or `repo` is no
            repository.
    """
    check_repo(repo)
    state = run.status.state
    if state != "finished":
        raise InputError(
            f"expected a finished run, got {run.id}, which is {state}; let it train to its end: "
            f"python -m gsae_core resume {run.folder}"
        )
    if not names:
        raise InputError("expected the name of an SAE to push, got none; name one with --sae")
    files = {name: run.folder / name for name in OF_RUN if (run.folder / name).is_file()}
    for name in names:
        folder = run.sae_folder(name)
        _check_whole(folder, name)
        files |= {f"{name}/{file}": folder / file for file in SENT if (folder / file).is_file()}
    return Parcel(repo, public, files, dict(texts), _notes(run))


def check_repo(repo: str) -> str:
    """Return a repository's name if one can be made under it.

    Raises:
        InputError: if not.
    """
    if not _REPO.fullmatch(repo) or len(repo) > 96 or "--" in repo or ".." in repo:
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


def _notes(run: Run) -> tuple[str, ...]:
    """Return a sentence for each folder of this machine that the files name."""
    named = {"model": run.config.model.name, "text": run.config.data.source}
    return tuple(
        f"config.json and cfg.json name the {what}'s folder on this machine: {name}"
        for what, name in named.items()
        if os.path.isabs(name)
    )


def check_token() -> None:
    """Check that there is a token to push with; whether the Hub takes it, the Hub says.

    Raises:
        InputError: if there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(
            "expected a Hub token that may write, found none; run `hf auth login`, or set HF_TOKEN "
            "in the environment the app was started from"
        )


def send(parcel: Parcel) -> Pushed:
    """Send a parcel as one commit; a repository that is not there is made, private unless told.

    An interruption leaves the repository as it was: large files wait unseen in the storage until a
    commit names them.

    Raises:
        InputError: why the Hub refused, or cannot be reached.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi

    check_token()
    api = HfApi(library_name="gsae_core")
    contents: dict[str, Path | bytes] = dict(parcel.files)
    contents |= {path: text.encode() for path, text in parcel.texts.items()}
    additions = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
    names = sorted({path.partition("/")[0] for path in parcel.files if "/" in path})
    with hub_answers(parcel.repo, what="SAE"):
        created = not api.repo_exists(parcel.repo)
        if created:
            api.create_repo(parcel.repo, private=not parcel.public, exist_ok=True)
        try:
            commit = api.create_commit(
                parcel.repo,
                additions,
                commit_message=f"Add {', '.join(names)}",
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
    return Pushed(parcel.repo, commit.oid, commit.commit_url, created)


WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 62, 56

# Hues for a light and for a dark page.
HUES = {
    "gated": ("#0072B2", "#56B4E9"),
    "relu": ("#D55E00", "#F0883E"),
    "jumprelu": ("#00795A", "#2EC4A0"),
    "topk": ("#B0568A", "#E39CC4"),
}


def pareto_svg(rows: Sequence[Mapping[str, Any]], *, chosen: Sequence[str], title: str) -> str:
    """Return L0 against loss recovered of a run's SAEs, with a frontier for each architecture.

    Args:
        rows: of evals.json; those without both numbers are left out.
        chosen: names of the SAEs that get a ring.

    Raises:
        ValueError: if no row has both numbers, L0 above 0.
    """
    placed = [row for row in rows if _is_placed(row)]
    if not placed:
        raise ValueError("expected an SAE with an L0 above 0 and a loss recovered, got none")
    x = _Axis([float(row["l0"]) for row in placed], LEFT, WIDTH - RIGHT, log=True)
    y = _Axis([100 * row["loss_recovered"] for row in placed], HEIGHT - BOTTOM, TOP, log=False)
    kinds: list[Architecture] = [
        kind for kind in LOOKS if any(row["architecture"] == kind for row in placed)
    ]
    parts = [_head(title), *_grid(x, y), *_legend(kinds)]
    for kind in kinds:
        parts += _series([row for row in placed if row["architecture"] == kind], kind, x, y, chosen)
    return "\n".join([*parts, "</svg>", ""])


def _is_placed(row: Mapping[str, Any]) -> bool:
    numbers = (row["l0"], row["loss_recovered"])
    return all(n is not None and math.isfinite(n) for n in numbers) and row["l0"] > 0


class _Axis:
    """From numbers to places along one side of the picture."""

    def __init__(self, values: Sequence[float], start: int, end: int, *, log: bool) -> None:
        self.start, self.end, self.log = start, end, log
        spread = [math.log(v) for v in values] if log else list(values)
        pad = 0.08 * (max(spread) - min(spread)) or (0.5 if log else 1.0)
        self.low, self.high = min(spread) - pad, max(spread) + pad
        self.ticks = self._ticks(values)

    def at(self, value: float) -> float:
        position = math.log(value) if self.log else value
        share = (position - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def _ticks(self, values: Sequence[float]) -> list[float]:
        if self.log:
            inside = (t for t in round_values(values) if self.low <= math.log(t) <= self.high)
            return list(inside)
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        while (self.high - self.low) / step > 6:
            step *= 2
        while (self.high - self.low) / step < 3:
            step /= 2
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step) + 1)]


def _head(title: str) -> str:
    light = "".join(f".{kind}{{--hue:{hues[0]}}}" for kind, hues in HUES.items())
    dark = "".join(f".{kind}{{--hue:{hues[1]}}}" for kind, hues in HUES.items())
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" \
width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title">
<title id="title">{escape(title)}: loss recovered against L0</title>
<style>
svg{{--ink:#1f2933;--soft:#52606d;--grid:#d9dee4;font-family:system-ui,sans-serif;font-size:12px}}
{light}
@media (prefers-color-scheme:dark){{svg{{--ink:#e6e9ed;--soft:#a9b2bc;--grid:#39424d}}{dark}}}
text{{fill:var(--soft)}} .title{{fill:var(--ink);font-size:15px;font-weight:600}}
.grid{{stroke:var(--grid)}} .line{{fill:none;stroke:var(--hue);stroke-width:2}}
.mark{{fill:var(--hue)}} .ring{{fill:none;stroke:var(--ink);stroke-width:1.5}}
.name{{fill:var(--ink)}}
</style>
<text class="title" x="{LEFT}" y="24">{escape(title)}</text>"""


def _grid(x: _Axis, y: _Axis) -> list[str]:
    bottom, right, parts = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        label = f"{tick:.6g} %"
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x.ticks:
        at = x.at(tick)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        )
        parts.append(f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:g}</text>')
    middle = (TOP + bottom) / 2
    return [
        *parts,
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{escape(AXES['l0'])}, logarithmic</text>",
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(AXES['loss_recovered'])}</text>",
    ]


def _legend(kinds: Sequence[Architecture]) -> list[str]:
    parts, x = [], LEFT + 6.0
    for kind in kinds:
        label = LOOKS[kind].label
        parts.append(_mark(kind, x, 43.0))
        parts.append(f'<text class="name" x="{x + 10:.0f}" y="47">{escape(label)}</text>')
        # No font is at hand to measure with; 6.6 px a letter is generous for system fonts.
        x += 34 + 6.6 * len(label)
    return parts


def _series(
    rows: Sequence[Mapping[str, Any]], kind: Architecture, x: _Axis, y: _Axis, chosen: Sequence[str]
) -> list[str]:
    points = [Point(float(r["l0"]), 100 * float(r["loss_recovered"]), r["name"]) for r in rows]
    best = " ".join(f"{x.at(p.l0):.1f},{y.at(p.loss_recovered):.1f}" for p in frontier(points))
    dash = ",".join(str(n) for n in LOOKS[kind].dash) if LOOKS[kind].dash != (1, 0) else "none"
    parts = [f'<polyline class="line {kind}" stroke-dasharray="{dash}" points="{best}"/>']
    for point in points:
        left, top = x.at(point.l0), y.at(point.loss_recovered)
        told = f"{point.name}: L0 {point.l0:.3g}, {point.loss_recovered:.2f} % recovered"
        parts.append(_mark(kind, left, top, f"<title>{escape(told)}</title>"))
        if point.name in chosen:
            parts.append(f'<circle class="ring" cx="{left:.1f}" cy="{top:.1f}" r="9"/>')
    return parts


def _mark(kind: Architecture, x: float, y: float, inner: str = "") -> str:
    match kind:
        case "gated":
            shape, where = "circle", f'cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
        case "topk":
            shape, where = "rect", f'x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
        case "relu":
            shape, where = (
                "polygon",
                _corners(x, y, ((0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0))),
            )
        case _:
            shape, where = "polygon", _corners(x, y, ((0.0, -5.5), (5.0, 4.0), (-5.0, 4.0)))
    return f'<{shape} class="mark {kind}" {where}>{inner}</{shape}>'


def _corners(x: float, y: float, offsets: Sequence[tuple[float, float]]) -> str:
    return 'points="' + " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in offsets) + '"'


FIGURE = "pareto.svg"


def make_card(run: Run, names: Sequence[str], repo: str) -> dict[str, str]:
    """Return the text files that go to the Hub beside SAEs, by name: the card, and its figure.

    Args:
        run: finished; its evaluation, where there is one, becomes a table and the figure.
        names: the SAEs that are sent.
        repo: where they go.
    """
    specs = [spec for spec in run.config.saes if spec.name in names]
    evals = run.evals()
    parts = [_front_matter(run.config), f"# {_text(repo.rpartition('/')[2])}", _opening(run, specs)]
    files: dict[str, str] = {}
    if evals:
        parts += ["## Measured", _table(evals, names)]
        try:
            files[FIGURE] = pareto_svg(evals, chosen=names, title=run.id)
        except ValueError:
            pass  # Nothing measured has a place in the plane.
        else:
            parts.append(f"![Loss recovered against L0 of every SAE of the run]({FIGURE})")
            parts.append(f"Rings mark the SAEs here. {_sentence(matched_ratio(evals).sentence)}")
    parts += ["## How they were trained", _recipe(run.config, specs)]
    parts += ["## Load", *_loading(repo, specs[0], norm=_norm(run, specs[0]))]
    return {"README.md": "\n\n".join(parts) + "\n"} | files


def _front_matter(config: RunConfig) -> str:
    lines = ["---", "library_name: saelens", "tags:", "- sparse-autoencoder"]
    if any(spec.architecture == "gated" for spec in config.saes):
        lines.append("- gated-sae")
    # A name on the Hub alone: a folder of this machine is private.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.model.name):
        lines.append(f"base_model: {config.model.name}")
    return "\n".join([*lines, "---"])


def _opening(run: Run, specs: Sequence[SAESpec]) -> str:
    config = run.config
    kinds = ", ".join(dict.fromkeys(LOOKS[spec.architecture].label for spec in specs))
    gated = any(spec.architecture == "gated" for spec in specs)
    paper = (
        " Gated SAEs are those of [arXiv:2404.16014](https://arxiv.org/abs/2404.16014): the gate "
        "decides which latents fire, the magnitude path how much."
    )
    return (
        f"{len(specs)} sparse autoencoder{'s' * (len(specs) > 1)} ({_text(kinds)}) on "
        f"`{_code(config.model.hook_name)}` of {_text(public_name(config.model.name))}. They take "
        f"raw activations: the training scale is folded into the weights.{paper * gated}"
    )


def public_name(name: str) -> str:
    """Return a model's or data set's name; of a folder, its last part alone."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def _table(evals: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    head = ["SAE", "latents", "L0", "loss recovered", "CE clean → SAE", "FVU", "γ", "alive"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in evals:
        if row["name"] not in names:
            continue
        cells = [
            f"`{_code(row['name'])}`",
            f"{row['d_sae']:,}",
            fixed(row["l0"], 1),
            percent(row["loss_recovered"], 2),
            f"{fixed(row['ce_clean'], 3)} → {fixed(row['ce_sae'], 3)}",
            marked_fvu(row["fvu"], 4),
            fixed(row["gamma"], 3),
            percent(row["alive_fraction"], 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    # Why there were not more may name a folder of this machine, or what the Hub answered.
    tokens = measured_on({**evals[0], "shortage": None})
    note = (
        f"On {tokens}. L0: latents that fire per token. Loss recovered: 1 "
        "where the language model loses nothing, 0 where zeros would do as well "
        f"({positions(evals[0])}). FVU: squared error over variance. γ: relative reconstruction "
        "bias, below 1 where reconstructions are too short."
    )
    notes = [note]
    if worse := worse_than_mean({r["name"]: r["fvu"] for r in evals if r["name"] in names}):
        notes.append(f"{_text(worse)}.")
    if any(measured_earlier(row) for row in evals):
        notes.append(f"{measure_again('RUN')}.")
    return "\n\n".join(["\n".join(lines), *notes])


def _recipe(config: RunConfig, specs: Sequence[SAESpec]) -> str:
    train = config.train
    lines = [
        f"- text: {_text(public_name(config.data.source))}",
        f"- {count(train.n_tokens)} activation vectors, batches of {train.batch_size:,}",
        f"- Adam, learning rate {train.lr:g}, beta1 {train.beta1:g}, beta2 {train.beta2:g}",
        f"- seed {config.seed}",
    ]
    lines += [
        f"- `{_code(spec.name)}`: {LOOKS[spec.architecture].label}, {spec.d_sae:,} latents, "
        f"{_knob(spec)}recipe {spec.recipe}"
        for spec in specs
    ]
    return "\n".join(lines)


def _knob(spec: SAESpec) -> str:
    # An imported SAE's files may not say.
    return "" if math.isnan(spec.sparsity) else f"{knob(spec.architecture, spec.sparsity)}, "


def _norm(run: Run, spec: SAESpec) -> str | None:
    """Return how an SAE normalises each token; None where it does not."""
    # A card can be made before there are weights.
    said = run.sae_cfg(spec.name).get("normalize_activations")
    return None if said in (None, "none") else str(said)


def _loading(repo: str, spec: SAESpec, *, norm: str | None) -> list[str]:
    parts = [
        "With gsae_core, which also evaluates and explores them:",
        _python(
            f"# python -m gsae_core pull {repo}:{spec.name} --to runs/pulled",
            "from gsae_core import open_run",
            "from gsae_core.checkpoints.checkpoint import load_sae",
            "",
            'run = open_run("runs/pulled")',
            "sae = load_sae(run.sae_folder(run.config.saes[0].name))",
        ),
    ]
    if spec.tie != "untied":
        parts += [
            "With SAELens 6:",
            _python(
                "from sae_lens import SAE",
                "",
                f'sae = SAE.from_pretrained("{repo}", "{spec.name}")',
            ),
        ]
    if norm is not None:
        # The lines below encode x as it is.
        return [*parts, f"Each token is normalised on its way in and out (`{_code(norm)}`)."]
    if spec.architecture == "gated" and spec.tie != "untied":
        parts += [*_as_jumprelu(repo, spec), *_as_dictionary_learning(spec)]
    return parts


def _as_jumprelu(repo: str, spec: SAESpec) -> list[str]:
    return [
        "With PyTorch alone, as the JumpReLU SAE that computes the same:",
        _python(
            "import torch",
            "from huggingface_hub import hf_hub_download",
            "from safetensors.torch import load_file",
            "",
            f'w = load_file(hf_hub_download("{repo}", "{spec.name}/sae_weights.safetensors"))',
            'W, b = w["W_enc"] * w["r_mag"].exp(), w["b_mag"]',
            'threshold = torch.relu(b - w["r_mag"].exp() * w["b_gate"])',
            "",
            "def encode(x):",
            '    pre = (x - w["b_dec"]) @ W + b',
            "    return torch.relu(pre) * (pre > threshold)",
            "",
            "def decode(f):",
            '    return f @ w["W_dec"] + w["b_dec"]',
        ),
    ]


def _as_dictionary_learning(spec: SAESpec) -> list[str]:
    return [
        "With dictionary_learning, from the same tensors `w`:",
        _python(
            "from dictionary_learning.dictionary import GatedAutoEncoder",
            "",
            'd_in, d_sae = w["W_enc"].shape',
            "ae = GatedAutoEncoder(d_in, d_sae)",
            "ae.load_state_dict({",
            '    "encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T,',
            '    "decoder_bias": w["b_dec"], "gate_bias": w["b_gate"],',
            '    "mag_bias": w["b_mag"], "r_mag": w["r_mag"],',
            "})",
        ),
    ]


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _sentence(text: str) -> str:
    return f"{_text(text[:1].upper() + text[1:])}."


def _text(text: str) -> str:
    """Return text that Markdown shows as it stands, on one line."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|!~" else c for c in flat)


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").replace("|", "/").split())
