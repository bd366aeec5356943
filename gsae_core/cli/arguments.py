"""argv -> a command: tyro reads it, and a mistake becomes one sentence."""

import dataclasses
import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro
from tyro import _errors as tyro_errors
from tyro.conf import FlagCreatePairsOff, Positional, arg

from gsae_core.config import (
    ARCHITECTURES,
    SITES,
    Architecture,
    Config,
    ConfigKind,
    DataConfig,
    EvalConfig,
    Knob,
    LossNorm,
    ModelConfig,
    Positions,
    Recipe,
    RunConfig,
    SAESpec,
    Site,
    TrainRecipe,
    load_config,
    resweep,
    validated,
)
from gsae_core.errors import InputError
from gsae_core.presets import preset, presets

if TYPE_CHECKING:
    from tyro._arguments import ArgumentDefinition


def _plain(text: str, metavar: str | None = None, name: str | None = None) -> Any:
    return arg(help=text, metavar=metavar, help_behavior_hint="", name=name)


@dataclass(frozen=True)
class Label:
    """Let a language model write labels of features, and score how well each tells where it fires.

    A label is kept beside the feature index with the model that wrote it and its score, of which
    0.5 is guessing. What has a label already keeps it, so the same command goes on where it was
    interrupted. No text leaves this machine without --remote.
    """

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
    sae: Annotated[str | None, _plain("Name of the SAE; without it the only one.", "NAME")] = None
    features: Annotated[tuple[int, ...], _plain("Numbers of features.", "INT [INT ...]")] = ()
    most: Annotated[
        int | None, _plain("In place of numbers: the INT features that fire most often.", "INT")
    ] = None
    with_: Annotated[
        str | None,
        _plain(
            "Model that writes: a folder, or the name of one on this machine; with --remote the "
            "name of one at the address in OPENAI_BASE_URL.",
            "MODEL",
            "with",
        ),
    ] = None
    remote: Annotated[
        FlagCreatePairsOff[bool],
        _plain(
            "Send texts of the index to the address in OPENAI_BASE_URL, which speaks OpenAI's chat "
            "completions, with the token in OPENAI_API_KEY if there is one."
        ),
    ] = False
    score: Annotated[
        Literal["detection", "fuzzing", "none"],
        arg(
            help="How: by telling texts in which it fires from others, or marked tokens on which "
            "it fires from others; none leaves labels unscored.",
        ),
    ] = "detection"
    again: Annotated[
        FlagCreatePairsOff[bool],
        _plain("Also label what has a label; the old one stays in labels.jsonl."),
    ] = False
    device: Annotated[
        str | None, _plain("Where a model on this machine works; without it as the run.", "NAME")
    ] = None


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


@dataclass(frozen=True)
class Import:
    """Make a run of SAEs that another library wrote: evaluated and explored like one of ours.

    Reads SAELens, dictionary_learning, SAEBench, sparsify, Gemma Scope 1 and 2, Llama Scope,
    OpenAI's and BatchTopK's, recognised by what is in their files.
    """

    path: Annotated[
        Positional[Path], arg(help="File or folder of one SAE, or of several.", metavar="PATH")
    ]
    to: Annotated[Path, _plain("New folder for the run.", "RUN")]
    sae: Annotated[
        tuple[str, ...], _plain("Which of several to take; without it all.", "NAME [NAME ...]")
    ] = ()
    model: Annotated[
        str | None, _plain("Language model, where the files say none or another name.", "NAME")
    ] = None
    layer: Annotated[int | None, _plain("Block number, from 0, likewise.", "INT")] = None
    site: Annotated[
        Site | None, _plain("Place in the block, likewise.", f"{{{','.join(SITES)}}}")
    ] = None
    data: Annotated[
        str | None,
        _plain("Text to evaluate on; without it the Python standard library's.", "NAME"),
    ] = None


@dataclass(frozen=True)
class ExportSAE:
    """Write an SAE of a run for another library; it is read back and compared before it is there.

    `jumprelu` is SAELens' layout of the JumpReLU SAE that computes what a Gated one does.
    """

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
    to: Annotated[Path, _plain("New folder for the SAE.", "FOLDER")]
    sae: Annotated[str | None, _plain("Its name; without it the run's only one.", "NAME")] = None
    format: Annotated[
        Literal["saelens", "jumprelu", "dictionary_learning", "gsae_core"],
        _plain("Whose files to write."),
    ] = "saelens"


@dataclass(frozen=True)
class List:
    """Show the runs in a folder, the SAEs of a run, or those in any other folder or file."""

    path: Annotated[
        Positional[Path | None],
        arg(
            help="Folder of runs, a run, or files of any library; without it the folder of runs.",
            metavar="PATH",
            help_behavior_hint="",
        ),
    ] = None


@dataclass(frozen=True)
class Pull:
    """Fetch an SAE from the Hub and make a run of it, to evaluate and explore like any other.

    Says what it fetches and how large that is, goes on where an interrupted download stopped, and
    keeps to the commit it began with. The token is the environment's (HF_TOKEN) or that of
    `hf auth login`.
    """

    address: Annotated[
        Positional[str],
        arg(
            help="OWNER/NAME; after a colon the SAE's folder or file in it; after an @ a branch, "
            "tag or commit.",
            metavar="REPO[:PATH][@REV]",
        ),
    ]
    to: Annotated[
        Path | None, _plain("New folder for the run; without it, one under runs/.", "DIR")
    ] = None
    list: Annotated[
        FlagCreatePairsOff[bool], _plain("Only list the SAEs there and their sizes.")
    ] = False
    model: Annotated[
        str | None, _plain("Language model of the SAE, where its files do not say.", "NAME")
    ] = None
    layer: Annotated[int | None, _plain("Its block, where its files do not say.", "INT")] = None
    site: Annotated[
        Site | None,
        _plain("Its place in the block, where its files do not say.", f"{{{','.join(SITES)}}}"),
    ] = None


@dataclass(frozen=True)
class Push:
    """Send finished SAEs of a run to the Hub, with a card, in one commit.

    A new repository is private unless --public says otherwise; an existing one stays as it is.
    """

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
    sae: Annotated[tuple[str, ...], _plain("Names of the SAEs to send.", "NAME [NAME ...]")]
    to: Annotated[str, _plain("Repository on the Hub, made if it is not there.", "OWNER/NAME")]
    public: Annotated[
        FlagCreatePairsOff[bool], _plain("Let everybody see a repository that is made for it.")
    ] = False


PROGRAM = "python -m gsae_core"


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run that was interrupted or never started, from its last saved state."""

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure the SAEs of a run again, on held-out tokens, and write its evals.json anew."""

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
    tokens: Annotated[
        int | None,
        arg(
            help="Held-out tokens, masked positions left out, or as many as the whole text has; "
            "without it as many as the run's config says.",
            metavar="INT",
            help_behavior_hint="",
        ),
    ] = None
    replace: Annotated[
        Positions | None,
        arg(
            help="Where the model reads reconstructions: counted tokens alone, or BOS, separators "
            "and padding too; without it as the run's config says. Zero ablation zeroes every "
            "position.",
            metavar="{counted,all}",
            help_behavior_hint="",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class Index:
    """Build the feature index of a run's SAEs: where each feature fires, and what it writes.

    Interrupted, it goes on where it was. Without --tokens and --split it takes what was asked for
    last: a million tokens, half of them held out.
    """

    run: Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
    sae: Annotated[
        str | None,
        arg(help="Name of one SAE; without it all of them.", metavar="NAME", help_behavior_hint=""),
    ] = None
    tokens: Annotated[
        int | None,
        arg(
            help="Tokens to read, masked positions left out, or as many as the text has.",
            metavar="INT",
            help_behavior_hint="",
        ),
    ] = None
    split: Annotated[
        Literal["mixed", "train", "held_out"] | None,
        arg(
            help="Which of the text to read.",
            metavar="{mixed,train,held_out}",
            help_behavior_hint="",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check that this machine can do the work, line by line; exit 1 if something cannot work."""

    runs: Annotated[
        Path, arg(help="Folder that runs are kept in.", metavar="DIR", help_behavior_hint="")
    ] = Path("runs")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure what training costs on this machine, beside other libraries where they are here."""


Exchange = Import | ExportSAE | List
Command = Train | Resume | Evaluate | Index | Label | Exchange | Pull | Push | Doctor
COMMANDS: dict[str, type] = {
    "train": Train,
    "resume": Resume,
    "evaluate": Evaluate,
    "index": Index,
    "label": Label,
    "import": Import,
    "export": ExportSAE,
    "list": List,
    "pull": Pull,
    "push": Push,
    "bench": Bench,
    "doctor": Doctor,
}


def parse(
    argv: Sequence[str],
    commands: Mapping[str, type] = COMMANDS,
    *,
    program: str = PROGRAM,
    kind: str = "command",
    description: str | None = None,
) -> Any:
    """Return the command that `argv` (without the program) describes.

    Args:
        commands: the dataclass of each command's flags, by its name.
        program: the words before the command's name.
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
        raise InputError(_sentence(event, words, commands.get(argv[0])))

    # The hook is tyro's only way to its errors as data: printed, they are boxes of many lines.
    # It is marked unstable, hence the exact pin of tyro, and a test for every kind of event.
    with tyro_errors.on_parse_error(refuse):
        return tyro.extras.subcommand_cli_from_dict(
            dict(commands), prog=program, args=argv, description=description
        )


def _sentence(event: tyro_errors.ParseErrorEvent, argv: Sequence[str], command: type | None) -> str:
    match event:
        case tyro_errors.UnrecognizedArgs(tokens=[token, *_]):
            return _unknown(token, argv, command)
        case tyro_errors.MissingArgs(unrecognized_tokens=[token, *_]):
            return _unknown(token, argv, command)
        case tyro_errors.MissingArgs(missing_arguments=[first, *_]):
            return f"expected {first.arg.lowered.metavar} after {_called(argv)}, got none"
        case tyro_errors.InvalidChoice(argument=argument, value=value):
            choices = str(argument.lowered.metavar).partition("}")[0].strip("{").replace(",", ", ")
            return f"{_name(argument)}: expected one of {choices}, got {value!r}"
        case tyro_errors.BadValue(argument=argument) if argument.is_positional():
            return f"expected {argument.lowered.metavar} after {argv[0]}, got {argv[1]!r}"
        case tyro_errors.BadValue(argument=argument):
            return f"{_name(argument)}: expected {argument.lowered.metavar} after it, got none"
        case tyro_errors.InstantiationFailure(argument=argument) if argument is not None:
            kind = {"INT": "a whole number", "FLOAT": "a number", "INT [INT ...]": "whole numbers"}
            metavar = str(argument.lowered.metavar)
            wanted = kind.get(metavar, "numbers" if "..." in metavar else metavar)
            return f"{_name(argument)}: expected {wanted}, got {_value(_name(argument), argv)!r}"
    return f"expected a command line that {event.prog} --help describes, got {' '.join(argv)!r}"


def _name(argument: "ArgumentDefinition") -> str:
    return str(argument.lowered.name_or_flags[-1])


def _value(flag: str, argv: Sequence[str]) -> str:
    """Return what follows a flag, up to the next one."""
    words = [word for given in argv for word in given.split("=", 1)]
    after = words[words.index(flag) + 1 :]
    end = next((i for i, word in enumerate(after) if word.startswith("--")), len(after))
    return " ".join(after[:end])


def _called(argv: Sequence[str]) -> str:
    """Return the command's name, both words of a benchmark's."""
    return " ".join(argv[:2]) if argv[0] == "bench" else argv[0]


def _unknown(token: str, argv: Sequence[str], kind: type | None) -> str:
    command = _called(argv)
    if not token.startswith("-"):
        return f"expected a flag of {command}, got {token!r}"
    fields = dataclasses.fields(kind) if kind else ()
    flags = [field.name.strip("_").replace("_", "-") for field in fields]
    near = difflib.get_close_matches(token.strip("-").replace("_", "-"), flags, n=1)
    advice = f"did you mean --{near[0]}?" if near else f"see {PROGRAM} {command} --help"
    return f"expected a flag of {command}, got {token!r}; {advice}"


def command_line(flags: "Train") -> str:
    """Return the command that trains exactly what `flags` describes, quoted for a shell."""
    words = ["python", "-m", "gsae_core", "train"]
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if value is not None and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *_words(value)]
    return shlex.join(words)


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    return [_exact(v) if isinstance(v, float) else str(v) for v in _listed(value)]


def _exact(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
