"""The flags of `train`, and the run they describe over a preset, a file or the defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import FlagCreatePairsOff, arg

from gsae_core.config import (
    ARCHITECTURES,
    Architecture,
    DataConfig,
    EvalConfig,
    LossNorm,
    ModelConfig,
    Positions,
    Recipe,
    RunConfig,
    SAESpec,
    Site,
    TrainRecipe,
    load_config,
)
from gsae_core.errors import InputError
from gsae_core.presets import preset, presets
from gsae_core.sweeps import Knob, resweep
from gsae_core.validation import Config, ConfigKind, validated


def _flag(kind: type[Config], field: str, metavar: str = "") -> Any:
    """Return a flag whose help, choices and default are those of a config's field."""
    info = kind.model_fields[field]
    shown = not info.is_required() and info.default is not None
    # tyro fills help texts in by %, as argparse does.
    text = (info.description or "").replace("\n", " ").replace("%", "%%")
    choices = [choice for choice in _choices(info.annotation) if choice is not None]
    return arg(
        help=text,
        metavar=metavar or f"{{{','.join(choices)}}}",
        help_behavior_hint=f"(default: {info.default})" if shown else "",
    )


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a Literal, also of one that may be None."""
    kinds = get_args(annotation)
    return kinds if not any(get_args(kind) for kind in kinds) else get_args(kinds[0])


def _plain(text: str, metavar: str | None = None) -> Any:
    return arg(help=text, metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Train:
    """Train SAEs: the product of --arch and --sparsity, all on the same activations.

    Start from a preset or a config file and change what you like, or give --sparsity, --width and
    --tokens. TopK SAEs take --k in place of --sparsity.
    """

    preset: Annotated[
        str | None, _plain("Start from a known set-up: " + ", ".join(presets()) + ".", "NAME")
    ] = None
    config: Annotated[
        Path | None, _plain("Start from a config file: the config.json of a run.", "FILE")
    ] = None
    out: Annotated[
        Path | None,
        _plain("New folder for the run; without it, one under runs/ named after the time.", "DIR"),
    ] = None

    model: Annotated[str | None, _flag(ModelConfig, "name", "NAME")] = None
    revision: Annotated[str | None, _flag(ModelConfig, "revision", "REV")] = None
    layer: Annotated[int | None, _flag(ModelConfig, "layer", "INT")] = None
    site: Annotated[Site | None, _flag(ModelConfig, "site")] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, _flag(ModelConfig, "dtype")
    ] = None

    data: Annotated[str | None, _flag(DataConfig, "source", "NAME")] = None
    text_column: Annotated[str | None, _flag(DataConfig, "text_column", "NAME")] = None
    split: Annotated[str | None, _flag(DataConfig, "split", "NAME")] = None
    n_ctx: Annotated[int | None, _flag(DataConfig, "n_ctx", "INT")] = None
    bos: Annotated[Literal["auto", "always", "never"] | None, _flag(DataConfig, "bos")] = None
    held_out: Annotated[float | None, _flag(DataConfig, "held_out", "FLOAT")] = None

    arch: Annotated[
        tuple[Architecture, ...],
        _plain(
            "Architectures of the sweep; without it the set-up's, or gated and relu.",
            f"{{{','.join(ARCHITECTURES)}}} [...]",
        ),
    ] = ()
    sparsity: Annotated[tuple[float, ...], _flag(SAESpec, "sparsity", "LAMBDA [LAMBDA ...]")] = ()
    jumprelu_sparsity: Annotated[
        tuple[float, ...],
        _plain(
            "lambda of the JumpReLU SAEs, which weighs the number of latents and is therefore of "
            "another size: from 0.001 to 0.1, L0 on the bundled model falls from about 70 to about "
            "1; without it --sparsity.",
            "LAMBDA [LAMBDA ...]",
        ),
    ] = ()
    k: Annotated[tuple[int, ...], _plain("Latents of a token in a TopK SAE.", "INT [INT ...]")] = ()
    width: Annotated[
        int | None, _plain("Latents of an SAE; a ReLU SAE gets 1.5x as many.", "INT")
    ] = None
    equal_width: Annotated[
        FlagCreatePairsOff[bool], _plain("Make the ReLU SAEs as wide as the Gated ones.")
    ] = False
    recipe: Annotated[Recipe | None, _flag(SAESpec, "recipe")] = None
    tie: Annotated[Literal["r_mag", "none", "untied"] | None, _flag(SAESpec, "tie")] = None
    aux: Annotated[Literal["frozen", "unfrozen", "off"] | None, _flag(SAESpec, "aux")] = None
    loss_norm: Annotated[LossNorm | None, _flag(SAESpec, "loss_norm")] = None
    init_threshold: Annotated[float | None, _flag(SAESpec, "init_threshold", "FLOAT")] = None
    bandwidth: Annotated[float | None, _flag(SAESpec, "bandwidth", "FLOAT")] = None
    threshold_unit: Annotated[float | None, _flag(SAESpec, "threshold_unit", "FLOAT")] = None
    k_aux: Annotated[int | None, _flag(SAESpec, "k_aux", "INT")] = None

    tokens: Annotated[int | None, _flag(TrainRecipe, "n_tokens", "INT")] = None
    batch_size: Annotated[int | None, _flag(TrainRecipe, "batch_size", "INT")] = None
    lr: Annotated[float | None, _flag(TrainRecipe, "lr", "FLOAT")] = None
    beta1: Annotated[float | None, _flag(TrainRecipe, "beta1", "FLOAT")] = None
    beta2: Annotated[float | None, _flag(TrainRecipe, "beta2", "FLOAT")] = None
    lr_warmup_steps: Annotated[int | None, _flag(TrainRecipe, "lr_warmup_steps", "INT")] = None
    lr_decay_fraction: Annotated[float | None, _flag(TrainRecipe, "lr_decay_fraction", "FLOAT")] = (
        None
    )
    sparsity_warmup_steps: Annotated[
        int | None, _flag(TrainRecipe, "sparsity_warmup_steps", "INT")
    ] = None
    revive_every: Annotated[int | None, _flag(TrainRecipe, "revive_every", "INT")] = None
    revive_window: Annotated[int | None, _flag(TrainRecipe, "revive_window", "INT")] = None
    revive_until: Annotated[float | None, _flag(TrainRecipe, "revive_until", "FLOAT")] = None
    screened: Annotated[
        FlagCreatePairsOff[bool], _plain(TrainRecipe.model_fields["screened"].description or "")
    ] = False
    eval_tokens: Annotated[int | None, _flag(EvalConfig, "n_tokens", "INT")] = None
    eval_replace: Annotated[Positions | None, _flag(EvalConfig, "replace")] = None

    activation_scale: Annotated[
        Literal["unit", "none"] | None, _flag(RunConfig, "activation_scale")
    ] = None
    seed: Annotated[
        int | None, _plain("Seed of the data order and of the initial weights.", "INT")
    ] = None
    device: Annotated[str | None, _flag(RunConfig, "device", "NAME")] = None
    checkpoint_minutes: Annotated[float | None, _flag(RunConfig, "checkpoint_minutes", "FLOAT")] = (
        None
    )
    cache_activations: Annotated[
        FlagCreatePairsOff[bool],
        _plain(RunConfig.model_fields["cache_activations"].description or ""),
    ] = False


# Flag -> field, one table for each config.
_MODEL = {name: name for name in ("revision", "layer", "site", "dtype")} | {"model": "name"}
_DATA = {"data": "source"} | {
    name: name for name in ("text_column", "split", "n_ctx", "bos", "held_out")
}
_RECIPE = {"tokens": "n_tokens"} | {
    name: name for name in TrainRecipe.model_fields if name != "n_tokens"
}
_EVALUATION = {"eval_tokens": "n_tokens", "eval_replace": "replace"}
_RUN = {
    name: name
    for name in ("activation_scale", "seed", "device", "checkpoint_minutes", "cache_activations")
}
_OF_ONE = ("init_threshold", "bandwidth", "threshold_unit", "k_aux")
_SPEC = {name: name for name in ("recipe", "tie", "aux", "loss_norm", "seed", *_OF_ONE)}
_UNSAID: tuple[Architecture, ...] = ("gated", "relu")


def run_config(flags: Train) -> RunConfig:
    """Return the run that the flags describe: they win over the preset or the config file.

    Raises:
        InputError: one sentence in the words of the command line.
    """
    base = _base(flags)
    missing = [_said(name) for name in ("width", "tokens") if _absent(flags, name)]
    knobs = [_knob(flags, architecture) for architecture in flags.arch or _UNSAID]
    missing = [*(knob.flag for knob in knobs if not knob.values), *missing]
    if base is None and missing:
        raise InputError(
            f"expected {missing[0]}, got none; or start from a set-up: "
            "python -m gsae_core train --preset quick"
        )
    parts = {
        "model": _over(ModelConfig, base and base.model, flags, _MODEL),
        "data": _over(DataConfig, base and base.data, flags, _DATA),
        "evaluation": _over(EvalConfig, base and base.evaluation, flags, _EVALUATION),
        "train": _over(TrainRecipe, base and base.train, flags, _RECIPE),
        "saes": _specs(flags, base.saes if base else ()),
    }
    kept = {name: getattr(base, name) for name in RunConfig.model_fields} if base else {}
    called = {field: _said(flag) for flag, field in _RUN.items()} | {"train": "--tokens"}
    return validated(RunConfig, kept | parts | _given(flags, _RUN), called)


def _base(flags: Train) -> RunConfig | None:
    if flags.preset is not None and flags.config is not None:
        raise InputError(
            f"expected --preset or --config, got both ({flags.preset} and {flags.config}); "
            "leave one out"
        )
    if flags.preset is not None:
        _over(ModelConfig, None, flags, _MODEL)  # so that a mistake is named as a flag
        return preset(flags.preset).config(layer=flags.layer, site=flags.site)
    return None if flags.config is None else load_config(flags.config)


def _absent(flags: Train, name: str) -> bool:
    value = getattr(flags, name)
    return value is False or value in (None, ())


def _said(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _given(flags: Train, table: dict[str, str]) -> dict[str, Any]:
    return {f: getattr(flags, flag) for flag, f in table.items() if not _absent(flags, flag)}


def _over(
    kind: type[ConfigKind], base: Config | None, flags: Train, table: dict[str, str]
) -> ConfigKind:
    fields = base.model_dump() if base else {}
    called = {field: _said(flag) for flag, field in table.items()}
    return validated(kind, fields | _given(flags, table), called)


def _specs(flags: Train, base: tuple[SAESpec, ...]) -> list[SAESpec]:
    in_base: tuple[Architecture, ...] = tuple(spec.architecture for spec in base)
    architectures = tuple(dict.fromkeys(flags.arch or in_base or _UNSAID))
    knobs: dict[Architecture, Knob] = {each: _knob(flags, each) for each in architectures}
    _check_knobs(flags, knobs)
    changes = _given(flags, _SPEC)
    if flags.lr is not None:
        changes["lr"] = None  # the run's, which --lr sets
    called = {field: _said(flag) for flag, field in _SPEC.items()} | {"d_sae": "--width"}
    width = _width(flags, base)
    return resweep(
        base, knobs, width=width, equal_width=flags.equal_width, changes=changes, called=called
    )


def _knob(flags: Train, architecture: Architecture) -> Knob:
    if architecture == "jumprelu" and flags.jumprelu_sparsity:
        return Knob("--jumprelu-sparsity", flags.jumprelu_sparsity)
    return Knob("--k", flags.k) if architecture == "topk" else Knob("--sparsity", flags.sparsity)


def _check_knobs(flags: Train, knobs: dict[Architecture, Knob]) -> None:
    """Raise InputError if a flag sets the sparsity of nothing in the sweep."""
    for name in ("sparsity", "jumprelu_sparsity", "k"):
        flag = _said(name)
        if not _absent(flags, name) and flag not in {knob.flag for knob in knobs.values()}:
            wanted = {"jumprelu_sparsity": "jumprelu", "k": "topk"}.get(name, "gated or relu")
            raise InputError(
                f"{flag}: expected {wanted} among the architectures, got {', '.join(knobs)}; "
                f"name it after --arch, or leave {flag} out"
            )


def _width(flags: Train, base: tuple[SAESpec, ...]) -> int | None:
    """Return the Gated width that the flags ask for; None keeps the base's widths."""
    if flags.width is not None:
        if flags.width < 1:
            raise InputError(f"--width: expected a number greater than 0, got {flags.width}")
        return flags.width
    if not flags.equal_width:
        return None
    widths = {spec.d_sae for spec in base if spec.architecture == "gated"}
    if len(widths) != 1:
        found = ", ".join(str(width) for width in sorted(widths)) or "none"
        raise InputError(
            f"--equal-width: expected Gated SAEs of one width to take it from, got {found}; "
            "give --width"
        )
    return widths.pop()
