"""argv -> a command: tyro reads it, and a mistake becomes one sentence."""

import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import tyro
from tyro import _errors as tyro_errors
from tyro.conf import FlagCreatePairsOff, arg

from gsae_core.config import (
    Architecture,
    Config,
    ConfigKind,
    DataConfig,
    EvalConfig,
    ModelConfig,
    Place,
    RunConfig,
    SAESpec,
    Site,
    TrainRecipe,
    load_config,
    validated,
)
from gsae_core.errors import InputError
from gsae_core.lm.stored import described
from gsae_core.presets import preset, presets

PROGRAM = "python -m gsae_core"
DEFAULT_SWEEP: tuple[Architecture, ...] = ("gated", "relu")

SETS: dict[str, tuple[type[Config], str]] = {
    word.partition("=")[0]: (config, word.rpartition("=")[2])
    for config, words in {
        ModelConfig: "model=name revision layer site dtype",
        DataConfig: "data=source text_column split chat separator n_ctx bos held_out",
        SAESpec: "recipe tie aux detach_b_dec loss_norm init_threshold bandwidth threshold_unit "
        "k_aux",
        TrainRecipe: "tokens=n_tokens batch_size lr beta1 beta2 lr_warmup_steps lr_decay_fraction "
        "sparsity_warmup_steps revive_every revive_window revive_until start screened",
        EvalConfig: "eval_tokens=n_tokens eval_replace=replace",
        RunConfig: "activations activation_scale max_norm_ratio seed device checkpoint_minutes "
        "cache_activations track",
    }.items()
    for word in words.split()
}
"""Flag of `train` -> config and field that it sets; help, choices and default are the field's."""


def _flags_of(config: type[Config]) -> dict[str, str]:
    """Return the field that each flag of a config sets."""
    return {flag: field for flag, (owner, field) in SETS.items() if owner is config}


def _flag(kind: Any, text: str, metavar: str | None = None, default: str = "") -> tuple[Any, Any]:
    """Return the type of a flag of `train`, and its value where it is not given."""
    unsaid = False if kind is bool else () if get_origin(kind) is tuple else None
    kind = FlagCreatePairsOff[bool] if kind is bool else kind
    return Annotated[kind, arg(help=text, metavar=metavar, help_behavior_hint=default)], unsaid


def _help_of(config: type[Config], field: str) -> str:
    return (config.model_fields[field].description or "").replace("\n", " ")


def _settings(config: type[Config]) -> dict[str, Any]:
    """Return the `_flag` of each flag that sets a field of a config."""
    hints, kinds = {}, get_type_hints(config)
    for flag, name in _flags_of(config).items():
        info, kind = config.model_fields[name], kinds[name]
        if kind is bool:
            hints[flag] = _flag(bool, _help_of(config, name))
            continue
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        kinds_of_str = {"revision": "REV", "activations": "FOLDER"}
        metavars = {int: "INT", float: "FLOAT", str: kinds_of_str.get(flag, "NAME")}
        metavar = metavars.get(kind) or choices(kind)
        shown = not info.is_required() and info.default is not None
        default = f"(default: {info.default})" if shown else ""
        hints[flag] = _flag(kind | None, _help_of(config, name), metavar, default)
    return hints


def choices(literal: Any) -> str:
    """Return the words of a Literal as help shows them: {a,b}."""
    return f"{{{','.join(get_args(literal))}}}"


def _train_flags() -> dict[str, Any]:
    """Return the `_flag` of each flag of `train`, in the order of its help."""
    lambdas = "LAMBDA [LAMBDA ...]"
    return {
        "preset": _flag(str | None, f"Start from a known set-up: {', '.join(presets())}.", "NAME"),
        "config": _flag(Path | None, "Start from a config file: the config.json of a run.", "FILE"),
        "out": _flag(
            Path | None,
            "New folder for the run; without it, one under runs/ named after the time.",
            "DIR",
        ),
        **_settings(ModelConfig),
        "layer": _flag(
            tuple[int, ...],
            "Block number, from 0; several, like several sites, are read in one pass of the model, "
            "and the SAEs of the sweep are trained at each.",
            "INT [INT ...]",
            "(default: 2)",
        ),
        "site": _flag(
            tuple[Site, ...],
            _help_of(ModelConfig, "site"),
            f"{choices(Site)} [...]",
            "(default: resid_post)",
        ),
        **_settings(DataConfig),
        "arch": _flag(
            tuple[Architecture, ...],
            "Architectures of the sweep; without it the set-up's, or gated and relu.",
            f"{choices(Architecture)} [...]",
        ),
        "sparsity": _flag(tuple[float, ...], _help_of(SAESpec, "sparsity"), lambdas),
        "jumprelu_sparsity": _flag(
            tuple[float, ...],
            "lambda of the JumpReLU SAEs, which weighs the number of latents and is therefore of "
            "another size: from 0.001 to 0.1, L0 on the bundled model falls from about 70 to about "
            "1; without it --sparsity.",
            lambdas,
        ),
        "k": _flag(tuple[int, ...], "Latents of a token in a TopK SAE.", "INT [INT ...]"),
        "width": _flag(int | None, "Latents of an SAE; a ReLU SAE gets 1.5x as many.", "INT"),
        "equal_width": _flag(bool, "Make the ReLU SAEs as wide as the Gated ones."),
        **_settings(SAESpec),
        **_settings(TrainRecipe),
        **_settings(EvalConfig),
        **_settings(RunConfig),
        "seed": _flag(int | None, "Seed of the data order and of the initial weights.", "INT"),
    }


def _harvest_flags() -> dict[str, Any]:
    """Return the `_flag` of each flag of `harvest`, in the order of its help."""
    taken = (*_flags_of(ModelConfig), *_flags_of(DataConfig), "tokens", "eval_tokens", "device")
    own = _train_flags()
    own["layer"] = _flag(tuple[int, ...], _help_of(ModelConfig, "layer"), "INT", "(default: 2)")
    own["site"] = _flag(
        tuple[Site, ...], _help_of(ModelConfig, "site"), choices(Site), "(default: resid_post)"
    )
    to = _flag(Path | None, "New folder for the activations.", "FOLDER")
    return {"to": to} | {flag: own[flag] for flag in taken}


if TYPE_CHECKING:

    class _Flags:
        """To a type checker, which cannot know the configs' fields, any name is a flag."""

        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

        def __init__(self, **flags: Any) -> None: ...
        def __getattr__(self, flag: str) -> Any: ...

    _HarvestFlags = _Flags

else:
    _FLAGS = [(flag, *hint) for flag, hint in _train_flags().items()]
    _Flags = dataclasses.make_dataclass("_Flags", _FLAGS, frozen=True)
    _HARVEST = [(flag, *hint) for flag, hint in _harvest_flags().items()]
    _HarvestFlags = dataclasses.make_dataclass("_HarvestFlags", _HARVEST, frozen=True)


class Train(_Flags):
    """Train SAEs: the product of --arch, --sparsity, --layer and --site, in one pass of the model.

    Start from a preset or a config file and change what you like, or give --sparsity, --width and
    --tokens. TopK SAEs take --k in place of --sparsity.
    """

    # One that is not given is None, () or False.


class Harvest(_HarvestFlags):
    """Write the activations that a run trains and is evaluated on to a folder, for --activations.

    `train --activations FOLDER` with the same --tokens and --eval-tokens, here or on a machine
    without the model and the text, then trains the same SAEs to the same bits. Interrupted, the
    same command goes on from the last whole shard.
    """


def harvest_settings(flags: Harvest) -> tuple[ModelConfig, DataConfig, int, int]:
    """Return model, text, training tokens and held-out tokens of a harvest."""
    for flag in ("to", "tokens"):
        if getattr(flags, flag) is None:
            raise InputError(f"expected {_said(flag)}, got none; see {PROGRAM} harvest --help")
    if len(_places(flags, None)) > 1:
        raise InputError(
            "expected one layer and one site, got several; harvest each to a folder of its own"
        )
    of, data = _over(ModelConfig, None, flags), _over(DataConfig, None, flags)
    n_tokens = _over(TrainRecipe, None, flags).n_tokens
    return of, data, n_tokens, _over(EvalConfig, None, flags).n_tokens


def run_config(flags: Train) -> RunConfig:
    """Return the run that the flags describe: they win over the preset or the config file."""
    base = _base(flags)
    knobs = [_knob(flags, architecture) for architecture in flags.arch or DEFAULT_SWEEP]
    missing = [flag for flag, values in knobs if not values]
    missing += [_said(name) for name in ("width", "tokens") if getattr(flags, name) is None]
    if base is None and missing:
        raise InputError(
            f"expected {missing[0]}, got none; or start from a set-up: "
            "python -m gsae_core train --preset quick"
        )
    recipe = base and base.train
    if recipe and (flags.tokens is not None or flags.batch_size is not None):
        recipe = recipe.model_copy(update={"extended": ()})  # of other lengths than these
    places = _places(flags, base)
    model = _over(ModelConfig, base and base.model, flags)
    parts = {
        "model": model.model_copy(update=places[0]._asdict()),
        "data": _over(DataConfig, base and base.data, flags),
        "evaluation": _over(EvalConfig, base and base.evaluation, flags),
        "train": _over(TrainRecipe, recipe, flags),
        "saes": _specs(flags, base, places),
    }
    parts |= _of_vectors(flags, base)
    kept = dict(base) if base else {}
    return validated(RunConfig, kept | _fields(flags, RunConfig) | parts, called(RunConfig))


def _of_vectors(flags: Train, base: RunConfig | None) -> dict[str, Any]:
    """Return what a run on a folder of vectors takes from the folder; nothing of other runs.

    Of a folder that `harvest` wrote, that is the model and the text; of any other, that there is
    neither. Flags that say something else are refused.
    """
    if flags.activations is not None:
        folder = str(Path(os.path.expanduser(flags.activations)).absolute())
        model, data = described(folder)
    elif base is not None and base.activations is not None:
        folder, model, data = base.activations, base.model, base.data
    else:
        return {}
    if data is None or data.source == folder:
        share = {} if flags.held_out is None else {"held_out": flags.held_out}
        fields = {**(data.model_dump() if data else {}), "source": folder, **share}
        data = validated(DataConfig, fields, called(DataConfig))
    for own in (model, data):
        for field, value in _fields(flags, type(own)).items():
            if value != getattr(own, field):
                raise InputError(
                    f"{called(type(own))[field]}: expected none with --activations, got {value!r};"
                    f" only the folder itself can say what its vectors are of: {folder}"
                )
    return {"activations": folder, "model": model, "data": data, "preset": None}


def _base(flags: Train) -> RunConfig | None:
    if flags.preset is None:
        base = None if flags.config is None else load_config(flags.config)
        if base and base.finetuned:
            raise InputError(
                f"expected the config of a run that began with random weights in {flags.config}, "
                f"got one fine-tuned from {base.finetuned}; train on with finetune"
            )
        return base
    if flags.config is not None:
        raise InputError(
            f"expected --preset or --config, got both ({flags.preset} and {flags.config}); "
            "leave one out"
        )
    _over(ModelConfig, None, flags)  # so that a mistake is named as a flag
    first = _fields(flags, ModelConfig)
    return preset(flags.preset).config(first.get("layer"), first.get("site"))


def _said(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _given(flags: Train | Harvest) -> dict[str, Any]:
    """Return the flags that were given, by name."""
    values = {field: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    return {field.name: value for field, value in values.items() if value != field.default}


def _fields(flags: Train | Harvest, config: type[Config]) -> dict[str, Any]:
    """Return the fields of a config that flags set."""
    given, names = _given(flags), _flags_of(config)
    values = {field: given[flag] for flag, field in names.items() if flag in given}
    # Of several layers or sites a config has the first; the others are its SAEs'.
    return {field: v[0] if isinstance(v, tuple) else v for field, v in values.items()}


def _places(flags: Train | Harvest, base: RunConfig | None) -> list[Place]:
    """Return where SAEs read: each of the sites of each layer, else where the base's do."""
    there = base.places if base else (ModelConfig().place,)
    if not (flags.layer or flags.site):
        return list(there)
    layers: Sequence[int] = flags.layer or [place.layer for place in there]
    sites: Sequence[Site] = flags.site or [place.site for place in there]
    places = [Place(*pair) for pair in dict.fromkeys(itertools.product(layers, sites))]
    for place in places:
        validated(ModelConfig, place._asdict(), called(ModelConfig))
    return places


def called(config: type[Config]) -> dict[str, str]:
    """Return what the command line calls a config's fields."""
    names = {field: _said(flag) for flag, field in _flags_of(config).items()}
    return {**names, "train": "--tokens"} if config is RunConfig else names


def _over(kind: type[ConfigKind], base: Config | None, flags: Train | Harvest) -> ConfigKind:
    fields = base.model_dump() if base else {}
    return validated(kind, fields | _fields(flags, kind), called(kind))


def _specs(flags: Train, base: RunConfig | None, places: list[Place]) -> list[SAESpec]:
    """Return the sweep of each place; of several, SAEs name their own."""
    if len(places) == 1:
        return _sweep(flags, _base_at(flags, base, places[0]))
    several = base.saes if base and len(base.places) > 1 else ()
    named = [(spec.name, base and base.place(spec)) for spec in several]
    specs = []
    for place in places:
        for spec in _sweep(flags, _base_at(flags, base, place)):
            name = spec.name if (spec.name, place) in named else spec.name + _suffix(place)
            specs.append(spec.model_copy(update={**place._asdict(), "name": name}))
    return specs


def _suffix(place: Place) -> str:
    return f"-l{place.layer}-{place.site}"


def _base_at(flags: Train, base: RunConfig | None, place: Place) -> tuple[SAESpec, ...]:
    """Return the SAEs that a place starts from: the base's there, else those of its first place."""
    if base is None:
        return ()
    if flags.preset is not None:
        base = preset(flags.preset).config(*place)
    there = place if place in base.places else base.places[0]
    unplaced = {"layer": None, "site": None}
    return tuple(
        spec.model_copy(update=unplaced | {"name": spec.name.removesuffix(_suffix(there))})
        for spec in base.saes
        if base.place(spec) == there
    )


Knob = tuple[str, tuple[float | int, ...]]
"""Flag that sets the sparsity of an architecture, and its values: an SAE each."""


def _sweep(flags: Train, base: tuple[SAESpec, ...]) -> list[SAESpec]:
    """Return the base's SAEs of each architecture, or its first for each value of its flag.

    An architecture the base lacks is made after those it has.
    """
    in_base: list[Architecture] = [spec.architecture for spec in base]
    architectures: Sequence[Architecture] = flags.arch or in_base or DEFAULT_SWEEP
    knobs: dict[Architecture, Knob] = {each: _knob(flags, each) for each in architectures}
    _check_knobs(flags, knobs)
    changes = _fields(flags, SAESpec)
    if flags.seed is not None:
        changes["seed"] = flags.seed
    if flags.lr is not None:
        changes["lr"] = None  # the run's, which --lr sets
    width, specs = _width(flags, base), []
    names = called(SAESpec) | {"d_sae": "--width", "seed": "--seed"}
    for architecture, (flag, values) in knobs.items():
        own = [spec.model_dump() for spec in base if spec.architecture == architecture]
        alike = own or [_turned(spec, architecture) for spec in base] or [{}]
        if values:
            alike = [alike[0] | {"sparsity": value} for value in dict.fromkeys(values)]
        elif "sparsity" not in alike[0]:
            theirs = " and ".join(dict.fromkeys(in_base))
            raise InputError(
                f"expected {flag} for {architecture}, got none; what sets the sparsity of "
                f"{theirs} in the set-up means another thing there"
            )
        for fields in alike:
            fields = {**fields, "architecture": architecture, **changes}
            if width is not None:
                # The extra width evens the training compute (paper section 4.1).
                wider = architecture == "relu" and not flags.equal_width
                fields["d_sae"] = width * 3 // 2 if wider else width
            if values or not own:
                fields["name"] = f"{architecture}-{fields['sparsity']:g}"
            specs.append(validated(SAESpec, fields, {**names, "sparsity": flag}))
    return specs


# What the number that sets an architecture's sparsity counts: where two differ, one says nothing
# about the other.
WEIGHS: dict[Architecture, str] = {"gated": "L1", "relu": "L1", "jumprelu": "L0", "topk": "k"}


def _turned(spec: SAESpec, architecture: Architecture) -> dict[str, Any]:
    """Return a spec's settings for another architecture: as wide as that one is beside it."""
    fields = spec.model_dump()
    if architecture == "relu":
        fields["d_sae"] = spec.d_sae * 3 // 2
    elif spec.architecture == "relu":
        fields["d_sae"] = spec.d_sae * 2 // 3
    if WEIGHS[spec.architecture] != WEIGHS[architecture]:
        del fields["sparsity"]
    return fields


def added_specs(base: RunConfig, **flags: Any) -> list[SAESpec]:
    """Return the SAEs that `train` with these flags, started from a config, has and that lacks."""
    if base.finetuned:
        raise InputError(
            "expected a sweep that began with random weights to add SAEs to, got one fine-tuned "
            f"from {base.finetuned}; fine-tune that again with another --sparsity"
        )
    names = [spec.name for spec in base.saes]
    made = _specs(Train(**flags), base, list(base.places))
    if len(base.places) == 1:  # which may be another than the run's model names
        there = base.saes[0].model_dump(include={"layer", "site"})
        made = [spec.model_copy(update=there) for spec in made]
    added = [spec for spec in made if spec.name not in names]
    if not added:
        raise InputError(f"expected SAEs that the run lacks; it has {', '.join(names)}")
    return added


def _knob(flags: Train, architecture: Architecture) -> Knob:
    if architecture == "jumprelu" and flags.jumprelu_sparsity:
        return "--jumprelu-sparsity", flags.jumprelu_sparsity
    return ("--k", flags.k) if architecture == "topk" else ("--sparsity", flags.sparsity)


def _check_knobs(flags: Train, knobs: dict[Architecture, Knob]) -> None:
    """Raise InputError if a flag sets the sparsity of nothing in the sweep."""
    for name in ("sparsity", "jumprelu_sparsity", "k"):
        flag = _said(name)
        if getattr(flags, name) and flag not in dict(knobs.values()):
            wanted = {"jumprelu_sparsity": "jumprelu", "k": "topk"}.get(name, "gated or relu")
            raise InputError(
                f"{flag}: expected {wanted} among the architectures, got {', '.join(knobs)}; "
                f"name it after --arch, or leave {flag} out"
            )


def _width(flags: Train, base: tuple[SAESpec, ...]) -> int | None:
    """Return the Gated width that the flags ask for; None keeps the base's widths."""
    if flags.width is not None or not flags.equal_width:
        return flags.width
    widths = {spec.d_sae for spec in base if spec.architecture == "gated"}
    if len(widths) != 1:
        found = ", ".join(str(width) for width in sorted(widths)) or "none"
        raise InputError(
            f"--equal-width: expected Gated SAEs of one width to take it from, got {found}; "
            "give --width"
        )
    return widths.pop()


def command_line(flags: Train) -> str:
    """Return the command that trains exactly what `flags` describes, quoted for a shell."""
    words = [*PROGRAM.split(), "train"]
    for name, value in _given(flags).items():
        words.append(_said(name))
        if value is not True:
            words += [str(each) for each in (value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def parse(
    argv: Sequence[str],
    commands: Mapping[str, Callable[..., Any]],
    *,
    program: str = PROGRAM,
    kind: str = "command",
    description: str | None = None,
) -> Any:
    """Return the command that `argv`, the words after `program`, describes.

    Args:
        commands: classes, of which an instance is returned, and functions, of which one is
            returned that takes nothing: it has its arguments, and has not been called.
        kind: what a command is called in errors.
        description: what the help of `program` opens with.

    Raises:
        InputError: one sentence, if it describes none.
        SystemExit: with code 0 after --help.
    """
    if not argv or argv[0] not in [*commands, "-h", "--help"]:
        came = repr(argv[0]) if argv else f"none; see {program} --help"
        raise InputError(f"expected a {kind}, one of {', '.join(commands)}, got {came}")
    words = [*program.removeprefix(PROGRAM).split(), *argv]

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        raise InputError(_sentence(event, words, commands[argv[0]]))

    bound = {name: c if isinstance(c, type) else _bound(c) for name, c in commands.items()}
    # The hook is tyro's only way to its errors as data: printed, they are boxes of many lines.
    # It is marked unstable, hence the exact pin of tyro, and a test for every kind of event.
    with tyro_errors.on_parse_error(refuse):
        found = tyro.extras.subcommand_cli_from_dict(
            bound, prog=program, args=argv, description=description
        )
    if isinstance(found, Train):
        _check_lists(found, argv)
    return found


def _check_lists(flags: Train, argv: Sequence[str]) -> None:
    """Refuse a flag that takes several values and was given none, which tyro takes for no flag."""
    words = {word.replace("_", "-") for word in argv}
    for field in dataclasses.fields(flags):
        if getattr(flags, field.name) == () and (flag := _said(field.name)) in words:
            raise InputError(f"{flag}: expected one value or several, got none")


def _bound(command: Callable[..., Any]) -> Callable[..., Any]:
    # Left as it is, a flag's help would break where the source does. From Python 3.13 on the
    # compiler takes the indentation away; `cleandoc` does so for all.
    plain = inspect.unwrap(command)
    plain.__doc__ = re.sub(r"\n {8}", " ", inspect.cleandoc(plain.__doc__ or ""))

    @functools.wraps(command)
    def bind(*words: Any, **flags: Any) -> Any:
        return functools.partial(command, *words, **flags)

    return bind


def _sentence(
    event: tyro_errors.ParseErrorEvent, argv: Sequence[str], kind: Callable[..., Any]
) -> str:
    command = " ".join(argv[:2]) if argv[0] == "bench" else argv[0]
    match event:
        case (
            tyro_errors.UnrecognizedArgs(tokens=[token, *_])
            | tyro_errors.MissingArgs(unrecognized_tokens=[token, *_])
        ):
            return f"expected a flag of {command}, got {token!r}{_advice(token, command, kind)}"
        case tyro_errors.MissingArgs(missing_arguments=[first, *_]):
            return f"expected {first.arg.lowered.metavar} after {command}, got none"
    argument = getattr(event, "argument", None)
    if argument is None:
        came = " ".join(argv)
        return f"expected a command line that {event.prog} --help describes, got {came!r}"
    flag, metavar = str(argument.lowered.name_or_flags[-1]), str(argument.lowered.metavar)
    if argument.is_positional():
        return f"expected {metavar} after {argv[0]}, got {argv[1]!r}"
    if isinstance(event, tyro_errors.InvalidChoice):
        known = metavar.partition("}")[0].strip("{").replace(",", ", ")
        return f"{flag}: expected one of {known}, got {event.value!r}"
    kinds = {"INT": "a whole number", "FLOAT": "a number", "INT [INT ...]": "whole numbers"}
    wanted = kinds.get(metavar, "numbers" if "..." in metavar else metavar)
    words = [word for given in argv for word in given.split("=", 1)]
    # --n_ctx is read as --n-ctx.
    place = [word.replace("_", "-") for word in words].index(flag)
    after = " ".join(itertools.takewhile(lambda w: not w.startswith("--"), words[place + 1 :]))
    return f"{flag}: expected {wanted}, got {repr(after) if after else 'none'}"


def _advice(token: str, command: str, kind: Callable[..., Any]) -> str:
    flags = [name.strip("_").replace("_", "-") for name in inspect.signature(kind).parameters]
    near = difflib.get_close_matches(token.strip("-").replace("_", "-"), flags, n=1)
    return f"; did you mean --{near[0]}?" if near else f"; see {PROGRAM} {command} --help"
