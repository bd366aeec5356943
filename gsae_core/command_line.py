"""argv -> a command: tyro reads it, and a mistake becomes one sentence."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro import _errors as tyro_errors
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg

from gsae_core.bench.flags import BENCHES, Benchmark
from gsae_core.config import Positions
from gsae_core.errors import InputError
from gsae_core.exchange_flags import ExportSAE, Import, List
from gsae_core.flags import Train
from gsae_core.hub_flags import Pull, Push
from gsae_core.label_flags import Label

if TYPE_CHECKING:
    from tyro._arguments import ArgumentDefinition

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

    what: OmitArgPrefixes[OmitSubcommandPrefixes[Benchmark]]


Exchange = Import | ExportSAE | List
Command = Train | Resume | Evaluate | Index | Label | Exchange | Pull | Push | Doctor | Bench
COMMANDS: dict[str, type[Command]] = {
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


def parse(argv: Sequence[str]) -> Command:
    """Return the command that `argv` (without the program) describes.

    Raises:
        InputError: one sentence, if it describes none.
        SystemExit: with code 0 after --help.
    """

    if not argv or argv[0] not in [*COMMANDS, "-h", "--help"]:
        came = repr(argv[0]) if argv else f"none; see {PROGRAM} --help"
        raise InputError(f"expected a command, one of {', '.join(COMMANDS)}, got {came}")
    if argv[0] == "bench" and (len(argv) < 2 or argv[1] not in [*BENCHES, "-h", "--help"]):
        came = repr(argv[1]) if len(argv) > 1 else f"none; see {PROGRAM} bench --help"
        raise InputError(f"expected a benchmark, one of {', '.join(BENCHES)}, got {came}")

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        raise InputError(_sentence(event, argv))

    # The hook is tyro's only way to its errors as data: printed, they are boxes of many lines.
    # It is marked unstable, hence the exact pin of tyro, and a test for every kind of event.
    with tyro_errors.on_parse_error(refuse):
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=PROGRAM, args=argv)


def _sentence(event: tyro_errors.ParseErrorEvent, argv: Sequence[str]) -> str:
    match event:
        case tyro_errors.UnrecognizedArgs(tokens=[token, *_]):
            return _unknown(token, argv)
        case tyro_errors.MissingArgs(unrecognized_tokens=[token, *_]):
            return _unknown(token, argv)
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


def _unknown(token: str, argv: Sequence[str]) -> str:
    command = _called(argv)
    if not token.startswith("-"):
        return f"expected a flag of {command}, got {token!r}"
    kind = BENCHES[argv[1]] if argv[0] == "bench" else COMMANDS[command]
    flags = [field.name.strip("_").replace("_", "-") for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(token.strip("-").replace("_", "-"), flags, n=1)
    advice = f"did you mean --{near[0]}?" if near else f"see {PROGRAM} {command} --help"
    return f"expected a flag of {command}, got {token!r}; {advice}"
