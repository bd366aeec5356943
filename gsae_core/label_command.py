"""`label` on the command line: which features, who writes, and what goes where before it does."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from gsae_core.errors import InputError
from gsae_core.label_flags import Label
from gsae_core.launch import runs_root
from gsae_core.store.json_lines import left_out
from gsae_core.store.labels import Labels, Said
from gsae_core.store.runs import Run

if TYPE_CHECKING:
    from gsae_core.analysis.features import FeatureIndex
    from gsae_core.analysis.writers import LocalWriter, RemoteWriter

FAILURE = 1
INTERRUPTED = 130
MOST_MISUNDERSTOOD = 3
"""Answers in a row that are not understood before no more is asked: the others would not be."""

Say = Callable[[str], None]
Follow = Callable[[Iterator[Any]], str]


class Progress(NamedTuple):
    """How many features have been asked about."""

    stage: str
    done: int
    total: int


def label(command: Label, *, say: Say, show: Say, follow: Follow) -> int:
    """Label features of a run's SAE; return the exit code, 1 if some could not be labelled.

    What is labelled is kept, also where an error or Ctrl-C ends this.

    Args:
        say: takes a sentence for the person who watches.
        show: takes a line of the answer.
        follow: draws progress until the work ends, and returns its last stage.

    Raises:
        InputError: for anything that a person can mend.
    """
    if command.with_ is None:
        raise InputError(
            "expected --with MODEL, got none; give a folder or the name of a model on this "
            "machine, or with --remote the name of one at the address in OPENAI_BASE_URL"
        )
    run = Run.open(command.run)
    index = _index(run, command)
    numbers = _chosen(command, index)
    if index.labels.damaged:
        say(left_out(index.labels.damaged, "labels.jsonl"))
    known = {} if command.again else index.labels.latest("label")
    asked = [number for number in numbers if number not in known]
    if len(asked) < len(numbers):
        n = len(numbers) - len(asked)
        say(f"{n} of {len(numbers)} features have a label, which stays; --again asks anew")
    if not asked:
        return 0
    device = command.device or run.config.device
    writer = _remote(command) if command.remote else _local(command.with_, device, say)
    say(_announcement(command, index, writer, len(asked)))
    done, failed = [], {}
    try:
        follow(_work(command, index, writer, asked, done, failed))
    except KeyboardInterrupt:
        say(f"stopped after {len(done)} of {len(asked)}; {_rest(command, asked, done)}")
        return INTERRUPTED
    finally:
        for line in _table(done):
            show(line)
        for number, sentence in failed.items():
            say(f"feature {number}: {sentence}")
    if len(done) + len(failed) < len(asked):
        say(
            f"stopped after {MOST_MISUNDERSTOOD} answers in a row that were not understood; try "
            "another model, or --score none"
        )
    return FAILURE if failed else 0


def _index(run: Run, command: Label) -> "FeatureIndex":
    """Return the index, with the labels that the Features page shows."""
    from gsae_core.example import is_example, labels_folder
    from gsae_core.exchange import only_sae

    name = command.sae or only_sae(run)
    index = run.features(name)
    if is_example(run):
        index.labels = Labels(labels_folder(runs_root().absolute(), name))
    return index


def _chosen(command: Label, index: "FeatureIndex") -> list[int]:
    """Return the features to label, each once and none of them dead.

    Raises:
        InputError: if none or an unknown or dead one is asked for.
    """
    import numpy as np

    from gsae_core.analysis.labelling import check_fires

    if (command.most is None) == (not command.features):
        came = "neither" if command.most is None else "both"
        raise InputError(f"expected --features with numbers or --most with how many, got {came}")
    if command.most is None:
        for number in command.features:
            check_fires(index.feature(number))
        return list(dict.fromkeys(command.features))
    if command.most < 1:
        raise InputError(f"--most: expected a number of at least 1, got {command.most}")
    fired = np.diff(index.array("offsets"))
    order = np.argsort(-fired, kind="stable")[: command.most]
    return [int(number) for number in order if fired[number]]


def _remote(command: Label) -> "RemoteWriter":
    from gsae_core.analysis.writers import RemoteWriter

    return RemoteWriter(str(command.with_))


def _local(name: str, device: str, say: Say) -> "LocalWriter":
    """Return a model on this machine; nothing is fetched.

    Raises:
        InputError: if it is not here, or not one that can be read.
    """
    from gsae_core.analysis.writers import LocalWriter
    from gsae_core.catalogue import cached_models
    from gsae_core.footprint import model_folder
    from gsae_core.training.memory import resolve_device

    folder = model_folder(name) or cached_models().get(name)
    if folder is None:
        raise InputError(
            f"expected a model on this machine, found no {name!r}; fetch it first, with "
            f"hf download {name}, or give --remote if it is at the address in OPENAI_BASE_URL"
        )
    say(f"loading {name}")
    called = Path(name).name if model_folder(name) else name
    return LocalWriter(str(folder), device=str(resolve_device(device)), name=called)


def _announcement(
    command: Label, index: "FeatureIndex", writer: "LocalWriter | RemoteWriter", n: int
) -> str:
    """Return what will be asked of whom, and what of it leaves this machine."""
    from gsae_core.analysis.labelling import AFTER, BEFORE, N_SCORED, N_SHOWN
    from gsae_core.analysis.writers import LocalWriter

    features = f"{n} feature{'s' * (n > 1)} of {index.manifest.sae}"
    if isinstance(writer, LocalWriter):
        return f"{features}: {writer.name} on this machine writes; no text leaves it"
    texts = N_SHOWN if command.score == "none" else N_SHOWN + 2 * N_SCORED
    token = ", and the token in OPENAI_API_KEY" if writer.has_token else ""
    is_bare = urlsplit(writer.where).scheme == "http"
    bare = ", over a connection that is not encrypted" if is_bare else ""
    return (
        f"{features}: sending to {writer.where}, for {writer.name}, up to {texts} texts of each, "
        f"of at most {BEFORE + 1 + AFTER} tokens out of {index.manifest.text}{token}{bare}"
    )


def _work(
    command: Label,
    index: "FeatureIndex",
    writer: "LocalWriter | RemoteWriter",
    asked: Sequence[int],
    done: list[Said],
    failed: dict[int, str],
) -> Iterator[Progress]:
    """Label one feature after another, and yield how many; `done` and `failed` grow."""
    from gsae_core.analysis.labelling import NotLabelled, NotUnderstood, label_feature

    by = None if command.score == "none" else command.score
    misunderstood = 0
    for i, number in enumerate(asked):
        yield Progress("labelling", i, len(asked))
        try:
            done.append(label_feature(index.feature(number), writer, by=by))
            misunderstood = 0
        except NotLabelled as error:
            failed[number] = str(error)
            misunderstood += isinstance(error, NotUnderstood)
        if misunderstood == MOST_MISUNDERSTOOD:
            return
    yield Progress("labelling", len(asked), len(asked))


def _rest(command: Label, asked: Sequence[int], done: Sequence[Said]) -> str:
    if not command.again:
        return "the same command goes on from there"
    labelled = {said.feature for said in done}
    rest = " ".join(str(number) for number in asked if number not in labelled)
    return f"for the others give --again --features {rest}"


def _table(done: Sequence[Said]) -> list[str]:
    """Return a line for each label: feature, score, label, as far as there are any."""
    from gsae_core.report import aligned

    if not done:
        return []
    rows = [
        [str(said.feature), "–" if said.score is None else f"{said.score:.2f}"] for said in done
    ]
    lines = aligned([["feature", "score"], *rows])
    return [
        f"{line}  {text}"
        for line, text in zip(lines, ["label", *(s.text for s in done)], strict=True)
    ]
