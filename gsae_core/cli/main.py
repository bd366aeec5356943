"""`python -m gsae_core ...`: what each command does, and the only module that prints."""

import contextlib
import errno
import logging
import os
import secrets
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

from tyro.conf import FlagCreatePairsOff, Positional, arg

from gsae_core.analysis.features.files import read_manifest
from gsae_core.analysis.labels import Annotation, Labels
from gsae_core.checkpoints.hub import look, one_sae, parse_address
from gsae_core.cli import report
from gsae_core.cli.arguments import (
    PROGRAM,
    Harvest,
    Train,
    added_specs,
    called,
    choices,
    harvest_settings,
    parse,
    run_config,
)
from gsae_core.cli.doctor import examine
from gsae_core.config import (
    Architecture,
    DataConfig,
    EvalConfig,
    Loss,
    ModelConfig,
    Positions,
    RunConfig,
    Site,
    TrainRecipe,
    given,
    shortfalls,
    validated,
)
from gsae_core.errors import EXTRAS, InputError, extra_sentence
from gsae_core.files import left_out, readable
from gsae_core.machine import slot_of
from gsae_core.runs.jobs.job import Job
from gsae_core.runs.jobs.worker import perform
from gsae_core.runs.run import Run, is_example, labels_folder, run_id, runs_root
from gsae_core.runs.work import transfer
from gsae_core.runs.work.index import IndexSplit, index_folder, index_run
from gsae_core.runs.work.publish import check_token, pack
from gsae_core.text import WORDS, Progress, fixed

if TYPE_CHECKING:
    from tqdm import tqdm

    from gsae_core.analysis.autointerp import By, LocalWriter, RemoteWriter
    from gsae_core.analysis.features.index import FeatureIndex
    from gsae_core.training.trainer import StepReport

MISTAKE = 2
FAILURE = 1
INTERRUPTED = 130

BARS = ("harvesting", "training", "evaluating", "indexing", "downloading", "labelling")
"""Stages that are drawn as bars."""
LINE_SECONDS = 10.0
"""At least so long, and a tenth of the time until then, between the lines that take a bar's place
where stderr is no terminal: some sixty in three hours."""


def show(*lines: str) -> None:
    """Print lines of the answer."""
    print(*lines, sep="\n", flush=True)


def say(sentence: str) -> None:
    """Print a sentence for the person who watches, beside the answer."""
    print(f"gsae_core: {sentence}", file=sys.stderr, flush=True)


class Ended(Exception):
    """A command ended early: its exit code, and the sentence that says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; `argv` are the words after the program."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        if words[:1] == ["bench"]:
            return bench(*words[1:])
        if words == ["--version"]:
            show(f"gsae-core {version('gsae-core')}")
            return 0
        command = parse(words, COMMANDS)
        if isinstance(command, Train | Harvest):
            command = partial(train if isinstance(command, Train) else harvest, command)
        return command() or 0
    except InputError as error:
        say(" ".join(str(error).split()))
        return MISTAKE
    except Ended as error:
        code, sentence = error.args
        say(sentence)
        return code
    except PermissionError as error:
        say(
            f"expected permission for {error.filename}, got none: change its owner or mode, or "
            "choose another"
        )
        return MISTAKE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        say(f"expected a shorter name or path, got one too long for this system: {error.filename}")
        return MISTAKE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


@contextlib.contextmanager
def _unexpected(job: Job, *, log: bool = False) -> Iterator[None]:
    """Turn an unexpected error into a sentence that says where its traceback is.

    `log`: put it there; a worker has done so itself.
    """
    try:
        yield
    except (InputError, Ended, PermissionError):
        raise
    except Exception as error:
        path = job.folder / "log.txt"
        if log:
            with path.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
        first = str(error).partition("\n")[0]
        sentence = f"{type(error).__name__}: {first}; the traceback is in {path}"
        raise Ended(FAILURE, sentence) from error


# The commands: their docstrings and those of their flags are the help, but for flags of several
# lines, which tyro would break where the source does.
_Plain = arg(help_behavior_hint="")
_Run = Annotated[Positional[Path], arg(help="Folder of the run.", metavar="RUN")]
_Name = Annotated[str | None, _Plain, arg(metavar="NAME")]
_Names = Annotated[tuple[str, ...], _Plain, arg(metavar="NAME [NAME ...]")]
_Lambdas = Annotated[tuple[float, ...], _Plain, arg(metavar="LAMBDA [LAMBDA ...]")]
_Numbers = Annotated[tuple[int, ...], _Plain, arg(metavar="INT [INT ...]")]
_Number = Annotated[int | None, _Plain, arg(metavar="INT")]
_Device = Annotated[
    str | None,
    arg(
        help="Where to work; without it the run's device, or what this machine has in its place.",
        help_behavior_hint="",
        metavar="NAME",
    ),
]
_Site = Annotated[Site | None, _Plain, arg(metavar=choices(Site))]
_Switch = Annotated[FlagCreatePairsOff[bool], _Plain]
_Format = Literal["saelens", "jumprelu", "dictionary_learning", "gsae_core"]


def train(flags: Train) -> None:
    """Make the run that the flags describe, train it and evaluate it."""
    config = run_config(flags)
    _begin(Run.create(flags.out or _new_folder(config), config))


def _new_folder(config: RunConfig) -> Path:
    return runs_root() / run_id(config, secrets.token_hex(2))


def _begin(run: Run) -> None:
    """Train a new run."""
    show(f"run {run.folder}")
    # Nothing could be resumed, and the name should be free for the corrected command.
    _work(run, undo=lambda: shutil.rmtree(run.folder))


def harvest(flags: Harvest) -> None:
    """Write the activations that the flags describe to a folder."""
    from gsae_core.runs.work.harvest import harvest_to

    of, data, n_tokens, n_held_out = harvest_settings(flags)
    amounts = {"n_tokens": n_tokens, "n_held_out": n_held_out}
    try:
        _follow(harvest_to(flags.to, of, data, **amounts, device=flags.device or "auto"))
    except KeyboardInterrupt:
        raise Ended(INTERRUPTED, "stopped; go on with the same command") from None
    show(f"{of.name}, {of.hook_name}, in {flags.to.absolute()}")
    show(f"train on it with: {PROGRAM} train --activations {flags.to} --tokens {n_tokens} ...")


def resume(run: _Run, device: _Device = None) -> None:
    """Go on with a run that was interrupted or never started, from its last saved state."""
    if transfer.is_transfer(run):
        if device is not None:
            raise InputError(
                f"--device: expected none for a transfer of files, which computes nothing, got "
                f"{device!r}; leave it out"
            )
        _carry_out(transfer.Transfer(run.absolute()))
    else:
        _work(Run.open(run).on(device))


def _work(run: Run, *, undo: Callable[[], None] = lambda: None) -> None:
    """Train a run once its device is free, to its end or to where it is interrupted.

    `undo` is called where a mistake is met before the first step.
    """

    def work() -> Iterator[Progress]:
        # After the wait: what is imported here fills memory.
        from gsae_core.runs.work.train import train_and_evaluate

        yield from train_and_evaluate(run)

    stage, began = "cancelled", run.status.step
    try:
        with _unexpected(run), contextlib.suppress(KeyboardInterrupt):
            steps = perform(run, work(), slot=slot_of(run.config.device))
            # Not before the text has been read: what is wrong with it is then said alone.
            stage = _follow(steps, before_training=shortfalls(run.config.train))
    except InputError:
        if run.status.step == began:
            undo()
        raise
    if stage != "finished":
        step, n_steps = run.status.step, run.status.n_steps
        resume = f"{PROGRAM} resume {run.folder}"
        raise Ended(INTERRUPTED, f"stopped after step {step} of {n_steps}; go on with: {resume}")
    show(*report.run_report(run))


def finetune(
    run: _Run,
    sae: _Names = (),
    tokens: _Number = None,
    loss: Annotated[Loss, _Plain] = "mse",
    sparsity: _Lambdas = (),
    data: _Name = None,
    text_column: _Name = None,
    split: _Name = None,
    chat: _Switch = False,
    lr: Annotated[float | None, _Plain, arg(metavar="FLOAT")] = None,
    batch_size: _Number = None,
    revive_every: _Number = None,
    seed: _Number = None,
    device: _Device = None,
    out: Annotated[Path | None, _Plain, arg(metavar="DIR")] = None,
) -> None:
    """Go on training SAEs of a run, imported ones too, in a new run: on other text, or end-to-end.

    It begins with the weights alone: Adam and the learning rate's schedule begin anew, lambda is
    what it is from the first step. What is not given is as in RUN.

    Args:
        sae: Names of the SAEs; without it the run's only one.
        tokens: Activations to train on.
        loss: mse: squared error of shuffled activations, as in training; kl: half of it, and as
            much of the KL divergence of the language model's predictions when it reads
            reconstructions (arXiv:2503.17272), on whole sequences.
        sparsity: lambda of each SAE (k of TopK), or one for all; without it what they were trained
            with, which of those of other libraries is known for TopK alone.
        data: Text: as for train.
        text_column: Column that holds it, where --data is a table.
        split: Split of a data set.
        chat: Read chats by the tokenizer's chat template.
        lr: Peak learning rate.
        batch_size: Activations in a step; with --loss kl about as many, for sequences stay whole.
        revive_every: Steps between revivals of dead latents; 0 never revives, as is usual for SAEs
            of other libraries.
        seed: Of the data order.
        out: New folder for the run; without it, one under runs/ named after the time.
    """
    from gsae_core.runs.work.finetune import create_finetuned, finetuned_config

    if tokens is None:
        raise InputError("expected --tokens with how many activations to train on, got none")

    opened = Run.open(run).on(device)
    config = finetuned_config(
        opened,
        sae,
        n_tokens=tokens,
        loss=loss,
        sparsity=sparsity,
        data=given(source=data, text_column=text_column, split=split, chat=chat or None),
        recipe=given(lr=lr, batch_size=batch_size, revive_every=revive_every),
        called={**called(DataConfig), **called(TrainRecipe), **called(RunConfig)},
        **given(seed=seed),
    )
    _begin(create_finetuned(opened, out or _new_folder(config), config))


def extend(
    run: _Run,
    tokens: _Number = None,
    sparsity: _Lambdas = (),
    jumprelu_sparsity: _Lambdas = (),
    k: _Numbers = (),
    arch: Annotated[
        tuple[Architecture, ...], _Plain, arg(metavar=f"{choices(Architecture)} [...]")
    ] = (),
    device: _Device = None,
) -> None:
    """Add SAEs to a finished sweep, or train all of it on.

    An added SAE learns from the first batch on and has the bits it would have had from the start.
    With --tokens all go on with their optimizer's moments, on further text; learning rate, decay
    and revivals begin anew. Interrupted, what was finished stays, and resume goes on.

    Args:
        tokens: Further activations to train all SAEs on, added ones too.
        sparsity: lambda of SAEs to add.
        jumprelu_sparsity: The same of JumpReLU SAEs; without it --sparsity.
        k: Latents of a token in TopK SAEs to add.
        arch: Architectures of the SAEs to add; without it those of the sweep.
    """
    from gsae_core.runs.work.extend import add_saes, lengthen, lengthened, withdraw

    opened = Run.open(run)
    opened.on(device)  # a device that is not here is refused before anything is written

    def learn(extended: Run, before: RunConfig) -> Run:
        _work(extended.on(device), undo=lambda: withdraw(extended, before))
        return extended

    knobs = {"sparsity": sparsity, "jumprelu_sparsity": jumprelu_sparsity, "k": k}
    adds = any(knobs.values())
    if tokens is None and not adds:
        raise InputError("expected --sparsity, --k or --tokens, got none of them")
    if adds:
        if tokens is not None:
            lengthened(opened.config, tokens)  # a mistake comes before what is added has learnt
        specs = added_specs(opened.config, arch=arch, **knobs)
        try:
            opened = learn(add_saes(opened, specs), opened.config)
        except Ended as ended:
            if tokens is None or ended.args[0] != INTERRUPTED:
                raise
            then = f"{ended.args[1]}, then: {PROGRAM} extend {run} --tokens {tokens}"
            raise Ended(INTERRUPTED, then) from None
    if tokens is not None:
        learn(lengthen(opened, tokens), opened.config)


def evaluate(
    run: _Run,
    tokens: _Number = None,
    replace: Annotated[Positions | None, _Plain, arg(metavar=choices(Positions))] = None,
    device: _Device = None,
    data: _Name = None,
    text_column: _Name = None,
    split: _Name = None,
    chat: _Switch = False,
) -> None:
    """Measure the SAEs of a run again, on held-out tokens, and write its evals.json anew.

    Args:
        tokens: Held-out tokens, masked positions left out, or as many as the whole text has;
            without it as many as the run's config says.
        data: Another text than the run's, as for train. evals.json says that the numbers are its;
            without --data the run's own are measured again.
        text_column: Column that holds it, where --data is a table.
        split: Split of --data.
        chat: Read the chats in --data by the tokenizer's chat template.
        replace: Where the model reads reconstructions: counted tokens alone, or BOS, separators
            and padding too; without it as the run's config says. Zero ablation zeroes every
            position.
    """
    from gsae_core.runs.work.train import evaluate_run

    opened = Run.open(run)
    if tokens is not None:
        validated(EvalConfig, {"n_tokens": tokens}, {"n_tokens": "--tokens"})
    with _unexpected(opened, log=True):
        how = given(text_column=text_column, split=split, chat=chat or None)
        if how and data is None:
            flag = called(DataConfig)[next(iter(how))]
            raise InputError(f"{flag}: expected --data with it, got none; it says how that is read")
        other = None if data is None else {"source": data, **how}
        _follow(evaluate_run(opened.on(device), n_tokens=tokens, replace=replace, data=other))
    show(*report.run_report(opened))


def index(
    run: _Run,
    sae: _Name = None,
    tokens: _Number = None,
    split: Annotated[IndexSplit | None, _Plain, arg(metavar=choices(IndexSplit))] = None,
    device: _Device = None,
) -> None:
    """Build the feature index of a run's SAEs: where each feature fires, and what it writes.

    Interrupted, it goes on where it was. Without --tokens and --split it takes what was asked for
    last: a million tokens, half of them held out.

    Args:
        sae: Name of one SAE; without it all of them.
        tokens: Tokens to read, masked positions left out, or as many as the text has.
        split: Which of the text to read.
    """
    opened, warned = Run.open(run).on(device), set[str]()
    for name in [sae] if sae else [spec.name for spec in opened.config.saes]:
        folder = index_folder(opened, name)
        with _unexpected(Job(folder)):
            steps = index_run(opened, name, n_tokens=tokens, split=split)
            stage = _follow(steps, warned=warned)
        if stage != "finished":
            again = f"{PROGRAM} index {opened.folder} --sae {name}"
            raise Ended(INTERRUPTED, f"stopped; go on with: {again}")
        manifest = read_manifest(folder)
        size = readable(manifest.n_bytes)
        show(f"{name}: {manifest.amount()}, L0 {manifest.l0:.1f}, {size} in {folder}")


def import_(
    path: Annotated[Positional[Path], arg(metavar="PATH")],
    to: Annotated[Path, arg(metavar="RUN")],
    sae: _Names = (),
    model: _Name = None,
    layer: _Number = None,
    site: _Site = None,
    data: _Name = None,
    chat: _Switch = False,
    fold_decoder_norms: _Switch = False,
) -> None:
    """Make a run of SAEs that another library wrote: evaluated and explored like one of ours.

    Reads SAELens, dictionary_learning, SAEBench, sparsify, Gemma Scope 1 and 2, Llama Scope and its
    R1, Qwen Scope, Goodfire, qresearch's of DeepSeek R1, attention SAEs of hook_z, OpenAI's and
    BatchTopK's, recognised by what is in their files.

    Args:
        path: File or folder of one SAE, or of several.
        to: New folder for the run.
        sae: Which of several to take; without it all.
        model: Language model, where the files say none or another name.
        layer: Block number, from 0, likewise.
        site: Place in the block, likewise.
        data: Text to evaluate on; without it the Python standard library's.
        chat: Read the chats in --data by the tokenizer's chat template.
        fold_decoder_norms: Multiply features by the norms of their directions, as SAELens'
            fold_W_dec_norm and Neuronpedia show them; reconstructions are the same.
    """
    from gsae_core.runs.work.imports import import_saes

    if layer is not None:
        validated(ModelConfig, {"layer": layer}, {"layer": "--layer"})
    if chat and data is None:
        raise InputError("--chat: expected --data with it, got none; it says how that is read")
    place, text = {"model": model, "layer": layer, "site": site}, {"data": data, "chat": chat}
    fold = fold_decoder_norms
    run, sources = import_saes(path, to, **place, saes=sae, **text, fold_decoder_norms=fold)
    show(f"run {run.folder}")
    for name, source in sources.items():
        show(f"{name}: {source.architecture} of {source.library}")
        show(*(f"  {sentence}" for sentence in source.assumed))
    show(f"for {run.config.model.name}, {run.config.model.hook_name}")
    show(f"measure it with: {PROGRAM} evaluate {run.folder}")


def export(
    run: _Run,
    to: Annotated[Path, arg(metavar="FOLDER")],
    sae: _Name = None,
    format: Annotated[_Format, _Plain] = "saelens",
) -> None:
    """Write an SAE of a run for another library; it is read back and compared before it is there.

    `jumprelu` is SAELens' layout of the JumpReLU SAE that computes what a Gated one does.

    Args:
        to: New folder for the SAE.
        sae: Its name; without it the run's only one.
        format: Whose files to write.
    """
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.checkpoints.formats.build import SETTINGS
    from gsae_core.checkpoints.formats.write import write_sae

    opened = Run.open(run)
    name = sae or report.only_sae(opened)
    folder = opened.sae_folder(name)
    # What describes the written SAE and not the one it is made from.
    own = set().union(*SETTINGS.values())
    metadata = {k: v for k, v in opened.sae_metadata(name).items() if k not in own}
    if metadata.get("stopped"):
        show(f"{name} stopped learning: {metadata['stopped']}")
    loaded = load_sae(folder)
    if format == "jumprelu":
        metadata["converted_from"] = loaded.architecture
    written = write_sae(loaded, to, format=format, metadata=metadata)
    show(*map(str, written.files))
    show(f"largest difference {written.parity.largest:.1e}: {written.parity.sentence}")


def list_(path: Annotated[Positional[Path | None], _Plain, arg(metavar="PATH")] = None) -> None:
    """Show the runs in a folder, the SAEs of a run, or those in any other folder or file.

    Args:
        path: Folder of runs, a run, or files of any library; without it the folder of runs.
    """
    show(*report.list_lines(path))


def doctor(runs: Annotated[Path, _Plain, arg(metavar="DIR")] = Path("runs")) -> int:
    """Check that this machine can do the work, line by line; exit 1 if something cannot work.

    Args:
        runs: Folder that runs are kept in.
    """
    failed = False
    for check in examine(runs):
        failed |= check.status == "bad"
        show(f"{check.status:<4}  {check.name:<17}  {check.found}")
    return FAILURE if failed else 0


def bench(*words: str) -> int:
    """Measure what training costs on this machine, beside other libraries where they are here."""
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "benchmarks" / "__main__.py").is_file():
        raise InputError(
            f"expected the benchmarks beside the package, got no folder benchmarks in {clone}; "
            "run this in a clone of the repository"
        )
    sys.path.insert(0, str(clone))
    return import_module("benchmarks.__main__").main(words, program=f"{PROGRAM} bench")


def app(port: Annotated[int | None, _Plain, arg(metavar="PORT")] = None) -> NoReturn:
    """Serve the app on this machine, for a browser: the runs are those of the current folder.

    Ctrl-C ends it; its jobs go on. Streamlit has variables for other settings, among them
    STREAMLIT_SERVER_ADDRESS.

    Args:
        port: Port to listen on; without it 8501, or the next one that is free.
    """
    if absent := [name for name in EXTRAS["app"].packages if find_spec(name) is None]:
        raise InputError(extra_sentence("app", *(EXTRAS["app"].packages[name] for name in absent)))
    # In the place of this process: signals and the exit code are Streamlit's.
    os.execv(sys.executable, app_command(port))


def app_command(port: int | None = None) -> list[str]:
    """Return the command that opens the app: a clone's, or the one that a wheel holds."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "assets" / "_studio" / "app.py"
    script = shipped if shipped.is_file() else package.parent / "app.py"
    # -P: files of the current folder are no modules, as with the command `streamlit`.
    command = [sys.executable, "-P", "-m", "streamlit", "run", str(script)]
    if port is None:
        return command
    if not 1 <= port <= 65535:
        raise InputError(f"--port: expected a number from 1 to 65535, got {port}")
    with socket.socket() as trial:
        # As servers do: a port of which connections are still closing is free.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise InputError(
                f"--port: expected one to listen on, got {port} ({error.strerror}); name "
                "another, or leave --port out for the next one that is free"
            ) from error
    return [*command, f"--server.port={port}"]


def pull(
    address: Annotated[Positional[str], arg(metavar="REPO[:PATH][@REV]")],
    to: Annotated[Path | None, _Plain, arg(metavar="DIR")] = None,
    list: _Switch = False,
    model: _Name = None,
    layer: _Number = None,
    site: _Site = None,
    fold_decoder_norms: _Switch = False,
) -> None:
    """Fetch an SAE from the Hub and make a run of it, to evaluate and explore like any other.

    Says what it fetches and how large that is, goes on where an interrupted download stopped, and
    keeps to the commit it began with. The token is the environment's (HF_TOKEN) or that of
    `hf auth login`.

    Args:
        address: OWNER/NAME; after a colon the SAE's folder or file in it; after an @ a branch,
            tag or commit.
        to: New folder for the run; without it, one under runs/.
        list: Only list the SAEs there and their sizes.
        model: Language model of the SAE, where its files do not say.
        layer: Its block, where its files do not say.
        site: Its place in the block, where its files do not say.
        fold_decoder_norms: Multiply features by the norms of their directions, as SAELens'
            fold_W_dec_norm and Neuronpedia show them.
    """
    repository = look(parse_address(address))
    if repository.renamed:
        say(repository.renamed)
    if list:
        show(*report.listing(repository))
        return
    sae = one_sae(repository)
    root = runs_root()
    name = transfer.run_name(repository.repo, sae.path)
    folder = to or root / transfer.free_name(root, name)
    files = (repository.repo, repository.commit, sae.path, sae.library, sae.files)
    request = transfer.PullRequest(*files, folder.name, model, layer, site, fold_decoder_norms)
    count = f"{len(sae.files)} file{'s' * (len(sae.files) > 1)}"
    say(
        f"{sae.path or repository.repo}: {sae.library}, {count}, {readable(sae.n_bytes)}, "
        f"commit {repository.commit[:12]}"
    )
    _carry_out(transfer.ask(folder.absolute().parent, request))


def push(
    run: _Run,
    sae: Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")],
    to: Annotated[str, arg(metavar="OWNER/NAME")],
    public: _Switch = False,
) -> None:
    """Send finished SAEs of a run to the Hub, with a card, in one commit.

    A new repository is private unless --public says otherwise; an existing one stays as it is.

    Args:
        sae: Names of the SAEs to send.
        to: Repository on the Hub, made if it is not there.
        public: Let everybody see a repository that is made for it.
    """
    opened = Run.open(run)
    parcel = pack(opened, sae, to, public=public)
    check_token()
    say(f"{len(parcel.files)} files, {readable(parcel.n_bytes)}, to {parcel.repo}")
    for note in parcel.notes:
        say(note)
    request = transfer.PushRequest(opened.id, sae, to, public)
    _carry_out(transfer.ask(opened.folder.parent, request))


def _carry_out(asked: transfer.Transfer) -> None:
    """Do a transfer, or what is left of it."""
    if asked.status.state == "finished":
        raise InputError(
            f"expected a transfer that is not done, got one that led to {asked.result}; give "
            "its command again to do it anew"
        )
    if _follow(transfer.work(asked)) != "finished":
        raise Ended(
            INTERRUPTED,
            f"stopped; what came is kept: give the same command again, or {PROGRAM} resume "
            f"{asked.folder}",
        )
    result = str(asked.result)
    show(f"run {asked.root / result}" if asked.is_pull else result)


def _follow(
    progress: Iterator[Progress],
    *,
    before_training: Sequence[str] = (),
    warned: set[str] | None = None,
) -> str:
    """Draw a bar for each stage until the work ends; return the last stage.

    `before_training` are sentences to say before the bar of that stage, `warned` those that were
    said before and are not repeated.
    """
    stage, bar, began = "", None, time.monotonic()
    line_at = began + LINE_SECONDS
    shown = _warnings(set() if warned is None else warned)
    # train_run and evaluate_run are generators, though their type says Iterator: closed, they save.
    with contextlib.closing(progress), contextlib.ExitStack() as bars, shown:  # pyright: ignore
        for now in progress:
            if now.stage != stage:
                bars.close()
                stage, bar = now.stage, None
                if stage == "loading":
                    print(WORDS[now.unit or "token"].loading, file=sys.stderr, flush=True)
                elif stage == "waiting":
                    runs = "1 run goes" if now.total == 1 else f"{now.total} runs go"
                    say(f"waiting for the device: {runs} first; Ctrl-C leaves the line")
                elif stage in BARS:
                    for sentence in before_training if stage == "training" else ():
                        say(sentence)
                    bar = bars.enter_context(_bar(now))
            # Reading a number waits for the device; as often as the bar is drawn is cheap.
            if bar is not None and bar.update(now.done - bar.n) and now.report is not None:
                bar.set_postfix_str(_glance(now.report))
            if bar is not None and bar.disable and (at := time.monotonic()) >= line_at:
                line_at = at + max(LINE_SECONDS, (at - began) / 10)
                seen = "" if now.report is None else f"; {_glance(now.report)}"
                say(f"{now.stage}: {now.done:,} of {now.total:,} {now.unit}s{seen}")
    return stage


@contextlib.contextmanager
def _warnings(warned: set[str]) -> Iterator[None]:
    """Say once what setting up work warns of, which a worker's log alone would."""
    names = ("gsae_core.runs.work.setup", "gsae_core.lm.vectors")
    loggers, handler = [*map(logging.getLogger, names)], logging.Handler("WARNING")

    def emit(record: logging.LogRecord) -> None:
        if (sentence := record.getMessage()) not in warned:
            warned.add(sentence)
            say(sentence)

    handler.emit = emit
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _bar(now: Progress) -> "tqdm[NoReturn]":
    from tqdm import tqdm

    return tqdm(
        total=now.total,
        # A resumed run begins where it stands: the bar's speed is of this process alone.
        initial=now.done if now.stage == "training" else 0,
        desc=now.stage,
        unit=f" {now.unit}",
        unit_scale=now.unit
        in ("token", "vector", "byte"),  # steps and features are counted in full
        disable=None,  # no bar where stderr is a file
    )


def _glance(report: "StepReport") -> str:
    """Return L0 and loss over the SAEs that learn, lowest to highest."""
    learning = [sae for sae in report.saes if sae.loss is not None]
    if not learning:
        return "no SAE learns"
    l0 = sorted(sae.l0 for sae in learning)
    loss = sorted(float(sae.loss.total) for sae in learning if sae.loss is not None)
    return f"L0 {l0[0]:.3g} to {l0[-1]:.3g}, loss {loss[0]:.3g} to {loss[-1]:.3g}"


MOST_MISUNDERSTOOD = 3
"""Answers in a row that are not understood before no more is asked: the others would not be."""


def label(
    run: _Run,
    sae: _Name = None,
    features: _Numbers = (),
    most: _Number = None,
    with_: Annotated[_Name, arg(name="with", metavar="MODEL")] = None,
    remote: _Switch = False,
    score: Literal["detection", "fuzzing", "none"] = "detection",
    again: _Switch = False,
    device: _Name = None,
) -> int:
    """Let a language model write labels of features, and score how well each tells where it fires.

    A label is kept beside the feature index with the model that wrote it and its score, of which
    0.5 is guessing. What has a label already keeps it, so the same command goes on where it was
    interrupted. No text leaves this machine without --remote.

    Args:
        sae: Name of the SAE; without it the only one.
        features: Numbers of features.
        most: In place of numbers: the INT features that fire most often.
        with_: Model that writes: a folder, or the name of one on this machine; with --remote the
            name of one at the address in OPENAI_BASE_URL.
        remote: Send texts of the index to the address in OPENAI_BASE_URL, which speaks OpenAI's
            chat completions, with the token in OPENAI_API_KEY if there is one.
        score: How: by telling texts in which it fires from others, or marked tokens on which it
            fires from others; none leaves labels unscored.
        again: Also label what has a label; the old one stays in labels.jsonl.
        device: Where a model on this machine works; without it as the run.
    """
    from gsae_core.analysis.autointerp import RemoteWriter

    if with_ is None:
        raise InputError(
            "expected --with MODEL, got none; give a folder or the name of a model on this "
            "machine, or with --remote the name of one at the address in OPENAI_BASE_URL"
        )
    opened = Run.open(run)
    name = sae or report.only_sae(opened)
    index = opened.features(name)
    if is_example(opened):
        # Where the Features page keeps them: the example itself is only read.
        index.labels = Labels(labels_folder(runs_root().absolute(), name))
    numbers = _chosen(index, features, most)
    if index.labels.damaged:
        say(left_out(index.labels.damaged, "labels.jsonl"))
    known = {} if again else index.labels.latest("label")
    asked = [number for number in numbers if number not in known]
    if len(asked) < len(numbers):
        n = len(numbers) - len(asked)
        say(f"{n} of {len(numbers)} features have a label, which stays; --again asks anew")
    if not asked:
        return 0
    writer = RemoteWriter(with_) if remote else _local(with_, opened.on(device).config.device)
    by = None if score == "none" else score
    say(_announcement(index, writer, len(asked), scored=by is not None))
    return _label(index, writer, asked, by=by, again=again)


def _label(
    index: "FeatureIndex",
    writer: "LocalWriter | RemoteWriter",
    asked: Sequence[int],
    *,
    by: "By | None",
    again: bool,
) -> int:
    """Label features; return the exit code, 1 if some could not be labelled.

    What is labelled is kept, also where an error or Ctrl-C ends this.
    """
    from gsae_core.analysis.autointerp import NotLabelled, NotUnderstood, label_feature

    done: list[Annotation] = []
    failed: dict[int, str] = {}

    def labelling() -> Iterator[Progress]:
        misunderstood = 0
        for i, number in enumerate(asked):
            yield Progress("labelling", i, len(asked), "feature")
            try:
                done.append(label_feature(index.feature(number), writer, by=by))
                misunderstood = 0
            except NotLabelled as error:
                failed[number] = str(error)
                misunderstood += isinstance(error, NotUnderstood)
            if misunderstood == MOST_MISUNDERSTOOD:
                return
        yield Progress("labelling", len(asked), len(asked), "feature")

    try:
        _follow(labelling())
    except KeyboardInterrupt:
        how = "the same command goes on from there"
        if again:
            labelled = {said.feature for said in done}
            rest = " ".join(str(number) for number in asked if number not in labelled)
            how = f"for the others give --again --features {rest}"
        say(f"stopped after {len(done)} of {len(asked)}; {how}")
        return INTERRUPTED
    finally:
        if done:
            show("feature  score  label")
        for said in done:
            show(f"{said.feature:<7}  {fixed(said.score, 2):>5}  {said.text}")
        for number, sentence in failed.items():
            say(f"feature {number}: {sentence}")
    if len(done) + len(failed) < len(asked):
        say(
            f"stopped after {MOST_MISUNDERSTOOD} answers in a row that were not understood; try "
            "another model, or --score none"
        )
    return FAILURE if failed else 0


def _chosen(index: "FeatureIndex", features: tuple[int, ...], most: int | None) -> list[int]:
    """Return the features to label, each once and none of them dead."""
    import numpy as np

    from gsae_core.analysis.autointerp import check_fires

    if (most is None) == (not features):
        came = "neither" if most is None else "both"
        raise InputError(f"expected --features with numbers or --most with how many, got {came}")
    if most is None:
        for number in features:
            check_fires(index.feature(number))
        return list(dict.fromkeys(features))
    if most < 1:
        raise InputError(f"--most: expected a number of at least 1, got {most}")
    fired = np.diff(index.array("offsets"))
    order = np.argsort(-fired, kind="stable")[:most]
    return [int(number) for number in order if fired[number]]


def _local(name: str, device: str) -> "LocalWriter":
    """Return a model on this machine; nothing is fetched."""
    from gsae_core.analysis.autointerp import LocalWriter
    from gsae_core.lm.catalog import cached_models, model_folder
    from gsae_core.runs.plan.cost import device_here, resolve_device

    folder = model_folder(name) or cached_models().get(name)
    if folder is None:
        raise InputError(
            f"expected a model on this machine, found no {name!r}; fetch it first, with "
            f"hf download {name}, or give --remote if it is at the address in OPENAI_BASE_URL"
        )
    say(f"loading {name}")
    called = Path(name).name if model_folder(name) else name
    device = str(resolve_device(device_here(device)))
    return LocalWriter(str(folder), device=device, name=called)


def _announcement(
    index: "FeatureIndex", writer: "LocalWriter | RemoteWriter", n: int, *, scored: bool
) -> str:
    """Return what will be asked of whom, and what of it leaves this machine."""
    from gsae_core.analysis.autointerp import AFTER, BEFORE, N_SCORED, N_SHOWN, LocalWriter

    features = f"{n} feature{'s' * (n > 1)} of {index.manifest.sae}"
    if isinstance(writer, LocalWriter):
        return f"{features}: {writer.name} on this machine writes; no text leaves it"
    n_texts = N_SHOWN + 2 * N_SCORED * scored
    texts = f"{n_texts} texts of each, of at most {BEFORE + 1 + AFTER} tokens out of"
    if index.manifest.unit == "vector":
        texts = f"{n_texts} captions of each, out of"
    token = ", and the token in OPENAI_API_KEY" if writer.has_token else ""
    is_bare = urlsplit(writer.where).scheme == "http"
    bare = ", over a connection that is not encrypted" * is_bare
    return (
        f"{features}: sending to {writer.where}, for {writer.name}, up to {texts} "
        f"{index.manifest.text}{token}{bare}"
    )


_FUNCTIONS = (resume, finetune, extend, evaluate, index, label, import_, export, list_, pull, push)
COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "harvest": Harvest,
    **{command.__name__.strip("_"): command for command in (*_FUNCTIONS, app, bench, doctor)},
}
