"""SAEs from other libraries as a finished run: listed, evaluated and explored like one of ours.

config.json   the place, the SAEs, and `imported`: the library they came from
saes/<name>/  our layout; `metadata.source` in cfg.json keeps where it came from, what was assumed
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gsae_core.checkpoints.checkpoint import save_sae
from gsae_core.checkpoints.formats.detect import find_saes
from gsae_core.checkpoints.formats.libraries import FoundSAE, HookPoint, Provenance, hub_name
from gsae_core.checkpoints.formats.read import read_found
from gsae_core.config import EvalConfig, RunConfig, SAESpec, Site, TrainRecipe, hook_name, validated
from gsae_core.errors import InputError
from gsae_core.runs.jobs.job import write_status
from gsae_core.runs.run import Run, staged


def import_saes(
    path: Path | str,
    folder: Path | str,
    *,
    model: str | None = None,
    layer: int | None = None,
    site: Site | None = None,
    saes: Sequence[str] = (),
    data: str | None = None,
    chat: bool = False,
    fold_decoder_norms: bool = False,
) -> tuple[Run, dict[str, Provenance]]:
    """Make a finished run of the SAEs in a file or folder; return it and each one's origin by name.

    Args:
        path: what some library wrote, or what was fetched from the Hub.
        folder: of the new run.
        model, layer, site: in place of the files' word.
        saes: names (`FoundSAE.name`) of those to take; all that are there, if empty.
        data: text to evaluate on later; None takes the standard library's.
        chat: whether chats in it are read by the tokenizer's chat template.
        fold_decoder_norms: whether latents are in the units of SAELens' `fold_W_dec_norm`.
    """
    found = find_saes(path)
    by_name = {sae.name: sae for sae in found}
    for name in saes:
        if name not in by_name:
            known = ", ".join(list(by_name)[:8])
            raise InputError(f"expected one of the SAEs in {path} ({known}), got {name!r}")
    found = [by_name[name] for name in saes] or found
    place = _one_place(found, HookPoint(model, layer, site), path)
    with staged(folder) as saved:
        # One at a time: a release's SAEs together may not fit into memory.
        read = [_saved(saved / each.name, each, place, fold=fold_decoder_norms) for each in found]
        fields = {
            "model": {"name": place.model, "layer": place.layer, "site": place.site},
            # Nothing is trained on the text; as many tokens are read as are evaluated on.
            "data": {"held_out": 0.5} | ({} if data is None else {"source": data, "chat": chat}),
            "saes": tuple(spec for spec, _ in read),
            "train": TrainRecipe(n_tokens=EvalConfig().n_tokens),
            "activation_scale": "none",
            "imported": ", ".join(dict.fromkeys(source.library for _, source in read)),
        }
        run = Run.create(folder, validated(RunConfig, fields))
        os.replace(saved, run.folder / "saes")
        for spec, source in read:
            run.add_event("imported", sae=spec.name, **asdict(source))
        write_status(run.folder, run.status._replace(state="finished", n_steps=0))
    return run, {spec.name: source for spec, source in read}


def _one_place(found: list[FoundSAE], given: HookPoint, path: Path | str) -> HookPoint:
    """Return the place that all the SAEs share, what was given before what their files say."""
    places = {sae.name: _over(sae.place, given) for sae in found}
    if len({(place.model, place.layer, place.site) for place in places.values()}) > 1:
        named = [f"{name} at layer {p.layer}, {p.site}" for name, p in places.items()]
        raise InputError(
            f"expected SAEs of one place in {path}, found {'; '.join(named[:4])}; choose those of "
            "one with --sae, or the folder of one"
        )
    place = places[found[0].name]
    missing = [name for name in ("model", "layer", "site") if getattr(place, name) is None]
    if missing:
        said = f" (they say {place.hook_name!r})" if place.hook_name else ""
        raise InputError(
            f"expected the {' and '.join(missing)} of the SAEs in {path}, which their files do not "
            f"say{said}; give {' '.join(f'--{name}' for name in missing)}"
        )
    return place


def _over(said: HookPoint, given: HookPoint) -> HookPoint:
    model = given.model or (None if said.model is None else hub_name(said.model))
    layer = said.layer if given.layer is None else given.layer
    return HookPoint(model, layer, given.site or said.site, said.hook_name)


def _saved(
    folder: Path, found: FoundSAE, place: HookPoint, *, fold: bool
) -> tuple[SAESpec, Provenance]:
    """Read an SAE and write it as ours; return its line in the config, and its origin."""
    assert place.layer is not None  # _one_place has seen to it
    assert place.site is not None
    sae, source = read_found(found, fold_decoder_norms=fold)
    fields = {
        "name": found.name,
        "architecture": sae.architecture,
        "d_sae": sae.d_sae,
        "sparsity": source.sparsity,
        "recipe": sae.recipe,
    }
    metadata = {
        "model_name": place.model,
        "hook_name": hook_name(place.layer, place.site),
        "hook_head_index": None,
        "name": found.name,
        "sparsity": source.sparsity,
        "stopped": None,
        "source": asdict(source),
    }
    save_sae(sae, folder, metadata=metadata)
    return validated(SAESpec, fields), source
