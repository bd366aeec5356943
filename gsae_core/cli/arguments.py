"""argv -> a command: tyro reads it, and a mistake becomes one sentence."""

import dataclasses
import difflib
import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from tyro import _errors as tyro_errors
from tyro.conf import FlagCreatePairsOff, Positional, arg

from gsae_core.config import (
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

PROGRAM = "python -m gsae_core"
DEFAULT_SWEEP: tuple[Architecture, ...] = ("gated", "relu")

SETS: dict[str, tuple[type[Config], str]] = {
    word.partition("=")[0]: (config, word.rpartition("=")[2])
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


def _flags_of(config: type[Config]) -> dict[str, str]:
    """Return the field that each flag of a config sets."""
    return {flag: field for flag, (owner, field) in SETS.items() if owner is config}


def _flag(kind: Any, text: str, metavar: str | None = None, default: str = "") -> Any:
    return Annotated[kind, arg(help=text, metavar=metavar, help_behavior_hint=default)]


def _help_of(config: type[Config], field: str) -> str:
    # tyro fills help texts in by %, as argparse does.
    return (config.model_fields[field].description or "").replace("\n", " ").replace("%", "%%")


def _settings(config: type[Config]) -> dict[str, Any]:
    """Return the type and help of each flag that sets a field of a config."""
    hints, kinds = {}, get_type_hints(config)
    for flag, name in _flags_of(config).items():
        info, kind = config.model_fields[name], kinds[name]
        if kind is bool:
            hints[flag] = _flag(FlagCreatePairsOff[bool], info.description or "")
            continue
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        metavars = {int: "INT", float: "FLOAT", str: "REV" if flag == "revision" else "NAME"}
        metavar = metavars.get(kind) or _choices(kind)
        shown = not info.is_required() and info.default is not None
        default = f"(default: {info.default})" if shown else ""
        hints[flag] = _flag(kind | None, _help_of(config, name), metavar, default)
    return hints


def _choices(literal: Any) -> str:
    return f"{{{','.join(get_args(literal))}}}"


def _train_flags() -> dict[str, Any]:
    """Return the type and help of each flag of `train`, in the order of its help."""
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
        **_settings(DataConfig),
        "arch": _flag(
            tuple[Architecture, ...],
            "Architectures of the sweep; without it the set-up's, or gated and relu.",
            f"{_choices(Architecture)} [...]",
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
        "equal_width": _flag(
            FlagCreatePairsOff[bool], "Make the ReLU SAEs as wide as the Gated ones."
        ),
        **_settings(SAESpec),
        **_settings(TrainRecipe),
        **_settings(EvalConfig),
        **_settings(RunConfig),
        "seed": _flag(int | None, "Seed of the data order and of the initial weights.", "INT"),
    }


def _unsaid(hint: Any) -> Any:
    """Return the value of a flag of `train` that is not given."""
    kind = get_args(hint)[0]
    return False if kind is bool else () if get_origin(kind) is tuple else None


TRAIN = """Train SAEs: the product of --arch and --sparsity, all on the same activations.

Start from a preset or a config file and change what you like, or give --sparsity, --width and
--tokens. TopK SAEs take --k in place of --sparsity.
"""

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


# Flags of the commands below. The docstring of a field is its help, but for those of several lines,
# which tyro would break where the source does.
_Plain = arg(help_behavior_hint="")
_Run = Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
_Name = Annotated[str | None, _Plain, arg(metavar="NAME")]
_Names = Annotated[tuple[str, ...], _Plain, arg(metavar="NAME [NAME ...]")]
_Number = Annotated[int | None, _Plain, arg(metavar="INT")]
_Site = Annotated[Site | None, _Plain, arg(metavar=_choices(Site))]
_Switch = Annotated[FlagCreatePairsOff[bool], _Plain]


@dataclass(frozen=True)
class Label:
    """Let a language model write labels of features, and score how well each tells where it fires.

    A label is kept beside the feature index with the model that wrote it and its score, of which
    0.5 is guessing. What has a label already keeps it, so the same command goes on where it was
    interrupted. No text leaves this machine without --remote.
    """

    run: _Run
    sae: _Name = None
    """Name of the SAE; without it the only one."""
    features: Annotated[tuple[int, ...], _Plain, arg(metavar="INT [INT ...]")] = ()
    """Numbers of features."""
    most: _Number = None
    """In place of numbers: the INT features that fire most often."""
    with_: Annotated[
        _Name,
        arg(
            name="with",
            metavar="MODEL",
            help="Model that writes: a folder, or the name of one on this machine; with --remote "
            "the name of one at the address in OPENAI_BASE_URL.",
        ),
    ] = None
    remote: Annotated[
        _Switch,
        arg(
            help="Send texts of the index to the address in OPENAI_BASE_URL, which speaks OpenAI's "
            "chat completions, with the token in OPENAI_API_KEY if there is one."
        ),
    ] = False
    score: Annotated[
        Literal["detection", "fuzzing", "none"],
        arg(
            help="How: by telling texts in which it fires from others, or marked tokens on which "
            "it fires from others; none leaves labels unscored."
        ),
    ] = "detection"
    again: _Switch = False
    """Also label what has a label; the old one stays in labels.jsonl."""
    device: _Name = None
    """Where a model on this machine works; without it as the run."""


@dataclass(frozen=True)
class Import:
    """Make a run of SAEs that another library wrote: evaluated and explored like one of ours.

    Reads SAELens, dictionary_learning, SAEBench, sparsify, Gemma Scope 1 and 2, Llama Scope,
    OpenAI's and BatchTopK's, recognised by what is in their files.
    """

    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """File or folder of one SAE, or of several."""
    to: Annotated[Path, arg(metavar="RUN")]
    """New folder for the run."""
    sae: _Names = ()
    """Which of several to take; without it all."""
    model: _Name = None
    """Language model, where the files say none or another name."""
    layer: _Number = None
    """Block number, from 0, likewise."""
    site: _Site = None
    """Place in the block, likewise."""
    data: _Name = None
    """Text to evaluate on; without it the Python standard library's."""


@dataclass(frozen=True)
class ExportSAE:
    """Write an SAE of a run for another library; it is read back and compared before it is there.

    `jumprelu` is SAELens' layout of the JumpReLU SAE that computes what a Gated one does.
    """

    run: _Run
    to: Annotated[Path, arg(metavar="FOLDER")]
    """New folder for the SAE."""
    sae: _Name = None
    """Its name; without it the run's only one."""
    format: Annotated[
        Literal["saelens", "jumprelu", "dictionary_learning", "gsae_core"], _Plain
    ] = "saelens"
    """Whose files to write."""


@dataclass(frozen=True)
class List:
    """Show the runs in a folder, the SAEs of a run, or those in any other folder or file."""

    path: Annotated[Positional[Path | None], _Plain, arg(metavar="PATH")] = None
    """Folder of runs, a run, or files of any library; without it the folder of runs."""


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
            metavar="REPO[:PATH][@REV]",
            help="OWNER/NAME; after a colon the SAE's folder or file in it; after an @ a branch, "
            "tag or commit.",
        ),
    ]
    to: Annotated[Path | None, _Plain, arg(metavar="DIR")] = None
    """New folder for the run; without it, one under runs/."""
    list: _Switch = False
    """Only list the SAEs there and their sizes."""
    model: _Name = None
    """Language model of the SAE, where its files do not say."""
    layer: _Number = None
    """Its block, where its files do not say."""
    site: _Site = None
    """Its place in the block, where its files do not say."""


@dataclass(frozen=True)
class Push:
    """Send finished SAEs of a run to the Hub, with a card, in one commit.

    A new repository is private unless --public says otherwise; an existing one stays as it is.
    """

    run: _Run
    sae: Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")]
    """Names of the SAEs to send."""
    to: Annotated[str, arg(metavar="OWNER/NAME")]
    """Repository on the Hub, made if it is not there."""
    public: _Switch = False
    """Let everybody see a repository that is made for it."""


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was interrupted or never started, from its last saved state."""

    run: _Run


@dataclass(frozen=True)
class Evaluate:
    """Measure the SAEs of a run again, on held-out tokens, and write its evals.json anew."""

    run: _Run
    tokens: Annotated[
        _Number,
        arg(
            help="Held-out tokens, masked positions left out, or as many as the whole text has; "
            "without it as many as the run's config says."
        ),
    ] = None
    replace: Annotated[
        Positions | None,
        _Plain,
        arg(
            metavar=_choices(Positions),
            help="Where the model reads reconstructions: counted tokens alone, or BOS, separators "
            "and padding too; without it as the run's config says. Zero ablation zeroes every "
            "position.",
        ),
    ] = None


_Split = Literal["mixed", "train", "held_out"]


@dataclass(frozen=True)
class Index:
    """Build the feature index of a run's SAEs: where each feature fires, and what it writes.

    Interrupted, it goes on where it was. Without --tokens and --split it takes what was asked for
    last: a million tokens, half of them held out.
    """

    run: _Run
    sae: _Name = None
    """Name of one SAE; without it all of them."""
    tokens: _Number = None
    """Tokens to read, masked positions left out, or as many as the text has."""
    split: Annotated[_Split | None, _Plain, arg(metavar=_choices(_Split))] = None
    """Which of the text to read."""


@dataclass(frozen=True)
class Doctor:
    """Check that this machine can do the work, line by line; exit 1 if something cannot work."""

    runs: Annotated[Path, _Plain, arg(metavar="DIR")] = Path("runs")
    """Folder that runs are kept in."""


@dataclass(frozen=True)
class Bench:
    """Measure what training costs on this machine, beside other libraries where they are here."""


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
    knobs = [_knob(flags, architecture) for architecture in flags.arch or DEFAULT_SWEEP]
    missing = [knob.flag for knob in knobs if not knob.values]
    missing += [_said(name) for name in ("width", "tokens") if getattr(flags, name) is None]
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
    kept = dict(base) if base else {}
    called = _called(RunConfig) | {"train": "--tokens"}
    return validated(RunConfig, kept | parts | _fields(flags, RunConfig), called)


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


def _said(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _given(flags: Train) -> dict[str, Any]:
    """Return the flags that were given, by name."""
    values = {field: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    return {field.name: value for field, value in values.items() if value != field.default}


def _fields(flags: Train, config: type[Config]) -> dict[str, Any]:
    """Return the fields of a config that flags set."""
    given = _given(flags)
    return {field: given[flag] for flag, field in _flags_of(config).items() if flag in given}


def _called(config: type[Config]) -> dict[str, str]:
    """Return what the command line calls a config's fields."""
    return {field: _said(flag) for flag, field in _flags_of(config).items()}


def _over(kind: type[ConfigKind], base: Config | None, flags: Train) -> ConfigKind:
    fields = base.model_dump() if base else {}
    return validated(kind, fields | _fields(flags, kind), _called(kind))


def _specs(flags: Train, base: tuple[SAESpec, ...]) -> list[SAESpec]:
    in_base: tuple[Architecture, ...] = tuple(spec.architecture for spec in base)
    architectures = dict.fromkeys(flags.arch or in_base or DEFAULT_SWEEP)
    knobs: dict[Architecture, Knob] = {each: _knob(flags, each) for each in architectures}
    _check_knobs(flags, knobs)
    changes = _fields(flags, SAESpec)
    if flags.seed is not None:
        changes["seed"] = flags.seed
    if flags.lr is not None:
        changes["lr"] = None  # the run's, which --lr sets
    return resweep(
        base,
        knobs,
        width=_width(flags, base),
        equal_width=flags.equal_width,
        changes=changes,
        called=_called(SAESpec) | {"d_sae": "--width", "seed": "--seed"},
    )


def _knob(flags: Train, architecture: Architecture) -> Knob:
    if architecture == "jumprelu" and flags.jumprelu_sparsity:
        return Knob("--jumprelu-sparsity", flags.jumprelu_sparsity)
    return Knob("--k", flags.k) if architecture == "topk" else Knob("--sparsity", flags.sparsity)


def _check_knobs(flags: Train, knobs: dict[Architecture, Knob]) -> None:
    """Raise InputError if a flag sets the sparsity of nothing in the sweep."""
    for name in ("sparsity", "jumprelu_sparsity", "k"):
        flag = _said(name)
        if getattr(flags, name) and flag not in {knob.flag for knob in knobs.values()}:
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


def command_line(flags: Train) -> str:
    """Return the command that trains exactly what `flags` describes, quoted for a shell."""
    words = [*PROGRAM.split(), "train"]
    for name, value in _given(flags).items():
        words.append(_said(name))
        if value is not True:
            words += [_exact(each) for each in (value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _exact(value: Any) -> str:
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


def parse(
    argv: Sequence[str],
    commands: Mapping[str, type] = COMMANDS,
    *,
    program: str = PROGRAM,
    kind: str = "command",
    description: str | None = None,
) -> Any:
    """Return the command that `argv`, the words after `program`, describes.

    Args:
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


def _sentence(event: tyro_errors.ParseErrorEvent, argv: Sequence[str], kind: type | None) -> str:
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
    match event:
        case tyro_errors.InvalidChoice(value=value):
            choices = metavar.partition("}")[0].strip("{").replace(",", ", ")
            return f"{flag}: expected one of {choices}, got {value!r}"
        case tyro_errors.BadValue() if argument.is_positional():
            return f"expected {metavar} after {argv[0]}, got {argv[1]!r}"
        case tyro_errors.BadValue():
            return f"{flag}: expected {metavar} after it, got none"
    kinds = {"INT": "a whole number", "FLOAT": "a number", "INT [INT ...]": "whole numbers"}
    wanted = kinds.get(metavar, "numbers" if "..." in metavar else metavar)
    words = [word for given in argv for word in given.split("=", 1)]
    # --n_ctx is read as --n-ctx.
    place = [word.replace("_", "-") for word in words].index(flag)
    after = itertools.takewhile(lambda w: not w.startswith("--"), words[place + 1 :])
    return f"{flag}: expected {wanted}, got {' '.join(after)!r}"


def _advice(token: str, command: str, kind: type | None) -> str:
    if not token.startswith("-"):
        return ""
    fields = dataclasses.fields(kind) if kind else ()
    flags = [field.name.strip("_").replace("_", "-") for field in fields]
    near = difflib.get_close_matches(token.strip("-").replace("_", "-"), flags, n=1)
    return f"; did you mean --{near[0]}?" if near else f"; see {PROGRAM} {command} --help"
