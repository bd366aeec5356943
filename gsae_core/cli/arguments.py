"""argv -> a command: tyro reads it, and a mistake becomes one sentence."""

import dataclasses
import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

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
    ModelConfig,
    Positions,
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

PROGRAM = "python -m gsae_core"

SETS: dict[str, tuple[type[Config], str]] = {
    (names := word.split("="))[0]: (config, names[-1])
    for config, words in {
        ModelConfig: "model=name revision layer site dtype",
        DataConfig: "data=source text_column split n_ctx bos held_out",
        SAESpec: "recipe tie aux loss_norm init_threshold bandwidth threshold_unit k_aux",
        TrainRecipe: "tokens=n_tokens batch_size lr beta1 beta2 lr_warmup_steps lr_decay_fraction "
        "sparsity_warmup_steps revive_every revive_window revive_until screened",
        EvalConfig: "eval_tokens=n_tokens eval_replace=replace",
        RunConfig: "activation_scale seed device checkpoint_minutes cache_activations",
    }.items()
    for word in words.split()
}
"""Flag of `train` -> config and field that it sets; help, choices and default are the field's."""


TRAIN = """Train SAEs: the product of --arch and --sparsity, all on the same activations.

Start from a preset or a config file and change what you like, or give --sparsity, --width and
--tokens. TopK SAEs take --k in place of --sparsity.
"""


def _plain(text: str, metavar: str | None = None, name: str | None = None) -> Any:
    return arg(help=text, metavar=metavar, help_behavior_hint="", name=name)


def _help_of(config: type[Config], field: str) -> str:
    # tyro fills help texts in by %, as argparse does.
    return (config.model_fields[field].description or "").replace("\n", " ").replace("%", "%%")


def _settings(config: type[Config]) -> dict[str, Any]:
    """Return the type and help of each flag that sets a field of a config."""
    hints = {}
    for flag, (owner, name) in SETS.items():
        if owner is not config:
            continue
        info, text = config.model_fields[name], _help_of(config, name)
        kind = next(each for each in _members(info.annotation) if each is not type(None))
        if kind is bool:
            hints[flag] = Annotated[FlagCreatePairsOff[bool], _plain(info.description or "")]
            continue
        metavars = {int: "INT", float: "FLOAT", str: "REV" if flag == "revision" else "NAME"}
        metavar = metavars.get(kind) or f"{{{','.join(get_args(kind))}}}"
        shown = not info.is_required() and info.default is not None
        default = f"(default: {info.default})" if shown else ""
        told = arg(help=text, metavar=metavar, help_behavior_hint=default)
        hints[flag] = Annotated[kind | None, told]
    return hints


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return what a field's type is made of, without what pydantic checks of it."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if annotation in (bool, int, float, str) or get_origin(annotation) is Literal:
        return (annotation,)
    return tuple(each for part in get_args(annotation) for each in _members(part))


def _train_flags() -> dict[str, Any]:
    """Return the type and help of each flag of `train`, in the order of its help."""

    def flag(kind: Any, text: str, metavar: str | None = None) -> Any:
        return Annotated[kind, _plain(text, metavar)]

    switch, lambdas = FlagCreatePairsOff[bool], "LAMBDA [LAMBDA ...]"
    return {
        "preset": flag(str | None, f"Start from a known set-up: {', '.join(presets())}.", "NAME"),
        "config": flag(Path | None, "Start from a config file: the config.json of a run.", "FILE"),
        "out": flag(
            Path | None,
            "New folder for the run; without it, one under runs/ named after the time.",
            "DIR",
        ),
        **_settings(ModelConfig),
        **_settings(DataConfig),
        "arch": flag(
            tuple[Architecture, ...],
            "Architectures of the sweep; without it the set-up's, or gated and relu.",
            f"{{{','.join(ARCHITECTURES)}}} [...]",
        ),
        "sparsity": flag(tuple[float, ...], _help_of(SAESpec, "sparsity"), lambdas),
        "jumprelu_sparsity": flag(
            tuple[float, ...],
            "lambda of the JumpReLU SAEs, which weighs the number of latents and is therefore of "
            "another size: from 0.001 to 0.1, L0 on the bundled model falls from about 70 to about "
            "1; without it --sparsity.",
            lambdas,
        ),
        "k": flag(tuple[int, ...], "Latents of a token in a TopK SAE.", "INT [INT ...]"),
        "width": flag(int | None, "Latents of an SAE; a ReLU SAE gets 1.5x as many.", "INT"),
        "equal_width": flag(switch, "Make the ReLU SAEs as wide as the Gated ones."),
        **_settings(SAESpec),
        **_settings(TrainRecipe),
        **_settings(EvalConfig),
        **_settings(RunConfig),
        "seed": flag(int | None, "Seed of the data order and of the initial weights.", "INT"),
    }


def _unsaid(hint: Any) -> Any:
    """Return the value of a flag of `train` that is not given."""
    kind = get_args(hint)[0]
    return False if kind is bool else () if get_origin(kind) is tuple else None


if TYPE_CHECKING:

    class Train:
        """The flags of `train`; None, () or False where one is not given."""

        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, **flags: Any) -> None: ...
        def __getattr__(self, flag: str) -> Any: ...

else:
    Train = dataclasses.make_dataclass(
        "Train",
        [(flag, hint, _unsaid(hint)) for flag, hint in _train_flags().items()],
        frozen=True,
        namespace={"__module__": __name__, "__doc__": TRAIN},
    )


DEFAULT_SWEEP: tuple[Architecture, ...] = ("gated", "relu")


_RunFolder = Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]


@dataclass(frozen=True)
class Label:
    """Let a language model write labels of features, and score how well each tells where it fires.

    A label is kept beside the feature index with the model that wrote it and its score, of which
    0.5 is guessing. What has a label already keeps it, so the same command goes on where it was
    interrupted. No text leaves this machine without --remote.
    """

    run: _RunFolder
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

    run: _RunFolder
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
        _plain(
            "Folder of runs, a run, or files of any library; without it the folder of runs.", "PATH"
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

    run: _RunFolder
    sae: Annotated[tuple[str, ...], _plain("Names of the SAEs to send.", "NAME [NAME ...]")]
    to: Annotated[str, _plain("Repository on the Hub, made if it is not there.", "OWNER/NAME")]
    public: Annotated[
        FlagCreatePairsOff[bool], _plain("Let everybody see a repository that is made for it.")
    ] = False


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was interrupted or never started, from its last saved state."""

    run: _RunFolder


@dataclass(frozen=True)
class Evaluate:
    """Measure the SAEs of a run again, on held-out tokens, and write its evals.json anew."""

    run: _RunFolder
    tokens: Annotated[
        int | None,
        _plain(
            "Held-out tokens, masked positions left out, or as many as the whole text has; "
            "without it as many as the run's config says.",
            "INT",
        ),
    ] = None
    replace: Annotated[
        Positions | None,
        _plain(
            "Where the model reads reconstructions: counted tokens alone, or BOS, separators "
            "and padding too; without it as the run's config says. Zero ablation zeroes every "
            "position.",
            "{counted,all}",
        ),
    ] = None


@dataclass(frozen=True)
class Index:
    """Build the feature index of a run's SAEs: where each feature fires, and what it writes.

    Interrupted, it goes on where it was. Without --tokens and --split it takes what was asked for
    last: a million tokens, half of them held out.
    """

    run: _RunFolder
    sae: Annotated[
        str | None,
        _plain("Name of one SAE; without it all of them.", "NAME"),
    ] = None
    tokens: Annotated[
        int | None,
        _plain("Tokens to read, masked positions left out, or as many as the text has.", "INT"),
    ] = None
    split: Annotated[
        Literal["mixed", "train", "held_out"] | None,
        _plain("Which of the text to read.", "{mixed,train,held_out}"),
    ] = None


@dataclass(frozen=True)
class Doctor:
    """Check that this machine can do the work, line by line; exit 1 if something cannot work."""

    runs: Annotated[Path, _plain("Folder that runs are kept in.", "DIR")] = Path("runs")


@dataclass(frozen=True)
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


def run_config(flags: Train) -> RunConfig:
    """Return the run that the flags describe: they win over the preset or the config file.

    Raises:
        InputError: one sentence in the words of the command line.
    """
    base = _base(flags)
    missing = [_said(name) for name in ("width", "tokens") if _absent(flags, name)]
    knobs = [_knob(flags, architecture) for architecture in flags.arch or DEFAULT_SWEEP]
    missing = [*(knob.flag for knob in knobs if not knob.values), *missing]
    if base is None and missing:
        raise InputError(
            f"expected {missing[0]}, got none; or start from a set-up: "
            "python -m gsae_core train --preset quick"
        )
    parts = {
        "model": _over(ModelConfig, base and base.model, flags),
        "data": _over(DataConfig, base and base.data, flags),
        "evaluation": _over(EvalConfig, base and base.evaluation, flags),
        "train": _over(TrainRecipe, base and base.train, flags),
        "saes": _specs(flags, base.saes if base else ()),
    }
    kept = {name: getattr(base, name) for name in RunConfig.model_fields} if base else {}
    called = _called(RunConfig) | {"train": "--tokens"}
    return validated(RunConfig, kept | parts | _given(flags, RunConfig), called)


def _base(flags: Train) -> RunConfig | None:
    if flags.preset is not None and flags.config is not None:
        raise InputError(
            f"expected --preset or --config, got both ({flags.preset} and {flags.config}); "
            "leave one out"
        )
    if flags.preset is not None:
        _over(ModelConfig, None, flags)  # so that a mistake is named as a flag
        return preset(flags.preset).config(layer=flags.layer, site=flags.site)
    return None if flags.config is None else load_config(flags.config)


def _absent(flags: Train, name: str) -> bool:
    value = getattr(flags, name)
    return value is False or value in (None, ())


def _said(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _given(flags: Train, config: type[Config]) -> dict[str, Any]:
    """Return the fields of a config that flags set."""
    return {
        field: getattr(flags, flag)
        for flag, (owner, field) in SETS.items()
        if owner is config and not _absent(flags, flag)
    }


def _called(config: type[Config]) -> dict[str, str]:
    """Return what the command line calls a config's fields."""
    return {field: _said(flag) for flag, (owner, field) in SETS.items() if owner is config}


def _over(kind: type[ConfigKind], base: Config | None, flags: Train) -> ConfigKind:
    fields = base.model_dump() if base else {}
    return validated(kind, fields | _given(flags, kind), _called(kind))


def _specs(flags: Train, base: tuple[SAESpec, ...]) -> list[SAESpec]:
    in_base: tuple[Architecture, ...] = tuple(spec.architecture for spec in base)
    architectures = tuple(dict.fromkeys(flags.arch or in_base or DEFAULT_SWEEP))
    knobs: dict[Architecture, Knob] = {each: _knob(flags, each) for each in architectures}
    _check_knobs(flags, knobs)
    changes = _given(flags, SAESpec)
    if flags.seed is not None:
        changes["seed"] = flags.seed
    if flags.lr is not None:
        changes["lr"] = None  # the run's, which --lr sets
    called = _called(SAESpec) | {"d_sae": "--width", "seed": "--seed"}
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
            return f"expected {first.arg.lowered.metavar} after {_command_of(argv)}, got none"
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


def _command_of(argv: Sequence[str]) -> str:
    """Return the command's name, both words of a benchmark's."""
    return " ".join(argv[:2]) if argv[0] == "bench" else argv[0]


def _unknown(token: str, argv: Sequence[str], kind: type | None) -> str:
    command = _command_of(argv)
    if not token.startswith("-"):
        return f"expected a flag of {command}, got {token!r}"
    fields = dataclasses.fields(kind) if kind else ()
    flags = [field.name.strip("_").replace("_", "-") for field in fields]
    near = difflib.get_close_matches(token.strip("-").replace("_", "-"), flags, n=1)
    advice = f"did you mean --{near[0]}?" if near else f"see {PROGRAM} {command} --help"
    return f"expected a flag of {command}, got {token!r}; {advice}"
