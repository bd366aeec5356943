"""A new run whose SAEs go on from the weights of another's: on other text, or by another loss.

    start/<name>/  the weights it starts from, so that the run needs the other one no longer

Adam and the schedules begin anew; lambda is at its full size from the first step, for the SAEs are
sparse already.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gsae_core.checkpoints.checkpoint import load_sae, save_sae
from gsae_core.checkpoints.formats.build import SETTINGS
from gsae_core.config import (
    OF_ANY_TEXT,
    DataConfig,
    Loss,
    RunConfig,
    SAESpec,
    TrainRecipe,
    validated,
)
from gsae_core.errors import InputError
from gsae_core.runs.run import Run, staged, trained_folder
from gsae_core.sae.base import SAE
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.topk import TopKSAE
from gsae_core.training.optimizer import threshold_lr

# A TopK SAE's file in half precision has norms that are one to so much.
NORM_ERROR = 1e-2


def finetuned_config(
    run: Run,
    names: Sequence[str] = (),
    *,
    n_tokens: int,
    loss: Loss = "mse",
    sparsity: Sequence[float | int] = (),
    data: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    called: Mapping[str, str] | None = None,
    **changes: Any,
) -> RunConfig:
    """Return the config of a run that fine-tunes SAEs of `run`.

    Args:
        names: of the SAEs; without them the run's only one.
        n_tokens: activations to train on.
        loss: `RunConfig.loss`; `kl` leaves no outliers out and keeps no activations on disk.
        sparsity: lambda (k of a TopK SAE) of each, or one for all; without it what the SAEs had.
        data: fields of `DataConfig` to change.
        recipe: fields of `TrainRecipe` to change. Batch size, learning rate, Adam's settings and,
            for an SAE trained here, the steps between revivals are the run's; those of another
            library are not revived.
        changes: fields of `RunConfig`.
        called: as `validated`.

    Raises:
        InputError: if there is no such SAE, it cannot be trained, its sparsity is not known, or a
            setting is wrong.
    """
    old, specs = run.config, _chosen(run, names)
    if old.activations is not None and (loss == "kl" or data):
        raise InputError(
            f"expected loss mse and no other text for SAEs of {run.id}, which learnt vectors of a "
            f"folder, got {'loss kl' if loss == 'kl' else 'data'}: there is no language model"
        )
    if len(sparsity) not in (0, 1, len(specs)):
        raise InputError(
            f"expected one sparsity, or one for each of {len(specs)} SAEs, got {len(sparsity)}"
        )
    wanted = [*sparsity] * (len(specs) if len(sparsity) == 1 else 1) or [None] * len(specs)
    saes = [
        _spec(run, spec, each, recipe or {}, called or {})
        for spec, each in zip(specs, wanted, strict=True)
    ]
    # An import holds out half of its text, because it trains on none.
    text = old.data.model_dump(include=None if old.imported is None else {"source", "chat"})
    if data and "source" in data:  # another text has columns and splits of its own
        text = {k: v for k, v in text.items() if k in OF_ANY_TEXT}
    kept = {"batch_size", "lr", "beta1", "beta2", "lr_decay_fraction", "revive_until"}
    kept |= {"start", "screened"}
    steps = {"n_tokens": n_tokens, "sparsity_warmup_steps": 0, "revive_every": 0}
    train = {**old.train.model_dump(include=kept), **steps, **(recipe or {})}
    # Thresholds that are good already need not go the length of the activations in a short run.
    train["threshold_lr"] = train["lr"]
    if old.imported is None:
        _, _, every, window = old.train.schedule
        fits = every <= old.train.revive_until * n_tokens / max(train["batch_size"], 1)
        train |= {"revive_every": every if fits else 0, "revive_window": window}
        if "lr" not in (recipe or {}):
            last = old.train.n_steps - 1
            train["threshold_lr"] = threshold_lr(train["lr"], old.train, step=last)
    fields = dict(old) | {
        "data": validated(DataConfig, text | dict(data or {}), called),
        "saes": tuple(saes),
        "train": validated(TrainRecipe, {**train, **(recipe or {})}, called),
        "activation_scale": old.activation_scale if old.imported is None else "unit",
        "preset": None,
        "imported": None,
        "finetuned": run.id,
        "loss": loss,
    }
    if loss == "kl":  # which reads whole sequences
        fields |= {"cache_activations": False, "max_norm_ratio": None}
    return validated(RunConfig, fields | changes, called)


def create_finetuned(run: Run, folder: Path, config: RunConfig) -> Run:
    """Make the run of a config from `finetuned_config`, with the weights that it starts from."""
    with staged(folder) as start:
        for spec in config.saes:
            sae = load_sae(trained_folder(run, spec.name))
            unit_norm_(sae, spec.name)
            about = {k: v for k, v in run.sae_metadata(spec.name).items() if k in _ABOUT}
            save_sae(sae, start / spec.name, metadata=about)
        made = Run.create(folder, config)
        os.replace(start, made.folder / "start")
        for spec in config.saes:
            made.add_event("fine-tuned", sae=spec.name, run=run.id)
    return made


# Of an SAE's metadata what still is true of its copy.
_ABOUT = {"model_name", "hook_name", "hook_head_index", "name", "sparsity", "source", "n_tokens"}


def _chosen(run: Run, names: Sequence[str]) -> list[SAESpec]:
    known = {spec.name: spec for spec in run.config.saes}
    if not names and len(known) > 1:
        raise InputError(f"expected --sae with some of this run's SAEs ({', '.join(known)})")
    for name in names:
        run.sae_folder(name)  # which refuses names that are not there
    return [known[name] for name in dict.fromkeys(names)] or [*known.values()]


def _spec(
    run: Run,
    spec: SAESpec,
    sparsity: float | int | None,
    recipe: Mapping[str, Any],
    called: Mapping[str, str],
) -> SAESpec:
    """Return an SAE of the new run: trained on as its file says it was."""
    sae = load_sae(trained_folder(run, spec.name))
    sae.check_trains()
    unit_norm_(sae, spec.name)
    is_ours = run.config.imported is None
    if sparsity is None and not is_ours and not isinstance(sae, TopKSAE):
        said = "" if math.isnan(spec.sparsity) else f" ({spec.sparsity:g} in its files)"
        raise InputError(
            f"expected --sparsity for {spec.name!r}, got none; another library's{said} means "
            "another thing here: ours weighs the sum of latents, or of a JumpReLU SAE their "
            "number, against squared error summed over d_in at E|x|^2 = 1"
        )
    own = {name: getattr(sae, name) for name in SETTINGS[sae.architecture]}
    fields = spec.model_dump() | own | {"start": f"start/{spec.name}", "recipe": sae.recipe}
    # In units of x, where a spec has those of training; the weights' file knows it.
    fields["threshold_unit"] = None
    if sparsity is not None:
        fields["sparsity"] = sparsity
    if "lr" in recipe:
        fields["lr"] = None  # the run's
    return validated(SAESpec, fields, {**called, "sparsity": "--sparsity"})


@torch.no_grad()
def unit_norm_(sae: SAE, name: str) -> None:
    """Give each direction of an SAE that trains on the sphere norm one, in place: the same SAE.

    What a latent writes moves from the direction's norm into the latent. InputError for a TopK SAE,
    whose latents compete by size and would be others.
    """
    norms = sae.W_dec.norm(dim=1)
    if isinstance(sae, TopKSAE) and bool((norms - 1).abs().max() > NORM_ERROR):
        raise InputError(
            f"expected directions of norm one in {name!r}, got some from {norms.min():.3g} to "
            f"{norms.max():.3g}: a TopK SAE's latents compete by size, and others would win "
            "were norms folded into them"
        )
    if isinstance(sae, JumpReluSAE):  # of others P is said only where norms are one
        for parameter in (sae.W_enc, sae.b_enc, sae.threshold):
            parameter.mul_(norms)
        # What writes nothing never fires then, along any direction.
        sae.W_dec[norms == 0, 0] = 1.0
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
