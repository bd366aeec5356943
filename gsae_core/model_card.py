"""The card that goes to the Hub beside SAEs: what they are, what was measured, how to load them."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gsae_core.analysis.pareto import matched_ratio
from gsae_core.card_figure import pareto_svg
from gsae_core.config import RunConfig, SAESpec
from gsae_core.plots.palette import LOOKS, knob
from gsae_core.store.evals import measure_again, measured_earlier, measured_on, positions
from gsae_core.store.runs import Run
from gsae_core.wording import count, fixed, marked_fvu, percent, worse_than_mean

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
            "from gsae_core.store.checkpoint import load_sae",
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
