"""Processes that do the same work in different ways, one at a time, in turns."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from gsae_core.errors import InputError

Say = Callable[[str], None]

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds the package: a peer's interpreter needs it to find `serve`."""

# What torch says, on a CPU and on a GPU, and what we say of a process that the kernel killed.
OUT_OF_MEMORY = ("allocate memory", "out of memory", "killed")


class Entry(NamedTuple):
    """Who takes part: a name for the table, the program that does the work, and its job."""

    name: str
    command: tuple[str, ...]
    job: dict[str, Any]
    ours: bool


class Result(NamedTuple):
    """What one contestant took, round by round."""

    name: str
    rounds: tuple[float, ...]
    """Milliseconds."""
    temporary: int | None
    """Most bytes held at once beyond what lies there between two rounds; None where unknown."""
    resident: int | None
    """Most bytes held at once, libraries and weights included; None where unknown."""
    facts: dict[str, Any]
    """What it said of itself and of its rounds."""

    @property
    def ms(self) -> float:
        """Median over the rounds."""
        return median(self.rounds)


class Outcome(NamedTuple):
    """A contest: who finished, and a sentence about each peer that did not."""

    results: tuple[Result, ...]
    notes: tuple[str, ...]


class Failed(Exception):
    """A contestant gave up; the text is the last line that it wrote."""


def our_entry(name: str, way: str, job: dict[str, Any]) -> Entry:
    """Return one of our own ways (`own.WAYS`), run by this interpreter."""
    command = (sys.executable, "-m", "benchmarks.ours")
    return Entry(name, command, job | {"way": way}, ours=True)


class Contestant:
    """A running process that speaks the protocol of `serve`.

    Raises:
        Failed: from `prepare` and `ask`, if the process ended instead of answering.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  read after the process ends
        self._process = subprocess.Popen(
            [*entry.command, json.dumps(entry.job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(entry.job["threads"]),
        )
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def prepare(self) -> dict[str, Any]:
        """Wait until the work is prepared and return the facts about it."""
        return self._answer()

    def ask(self, word: str) -> dict[str, Any]:
        """Say `go`, `weigh` or `look` and return the answer."""
        assert self._requests is not None
        # A broken pipe means that there is no answer either, and that is where it is told.
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(f"{word}\n")
            self._requests.flush()
        return self._answer()

    def close(self) -> None:
        """End the process, at once."""
        self._process.kill()
        self._process.wait()
        for stream in (self._requests, self._answers, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._answers is not None
        line = self._answers.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        lines = [text.strip() for text in self._errors if text.strip()]
        if code == -9:
            raise Failed("killed by the system, as happens when memory runs out")
        raise Failed(lines[-1] if lines else f"exit code {code}, without a word")


def _environment(n_threads: int) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # Before torch loads: OpenMP and MKL settle their pools when they are first used.
        "OMP_NUM_THREADS": str(n_threads),
        "MKL_NUM_THREADS": str(n_threads),
    }


def contest(
    entries: Sequence[Entry], *, rounds: int, warm_up: int, say: Say, weigh: bool = True
) -> Outcome:
    """Return what each contestant took.

    They take turns, a round at a time: while one computes, the others wait for their input.

    Args:
        entries: in the order of the table.
        rounds: that count.
        warm_up: rounds before them that do not.
        say: told what is going on.
        weigh: whether a further round of each, not timed, measures its memory.

    Raises:
        InputError: if one of our own ways runs out of memory.
        RuntimeError: if one of our own ways fails otherwise.
    """
    with contextlib.ExitStack() as stack:
        field = _Field()
        for entry in entries:
            say(f"preparing {entry.name}")
            contestant = Contestant(entry)
            stack.callback(contestant.close)
            # One after the other: preparing is heavy as well.
            field.admit(contestant)
        for i in range(warm_up + rounds):
            say(f"round {i + 1} of {warm_up + rounds}{' (warm-up)' if i < warm_up else ''}")
            for contestant in list(field.answers):
                field.turn(contestant, "go")
        say("measuring memory" if weigh else "asking what came of it")
        for word in ("weigh", "look") if weigh else ("look",):
            for contestant in list(field.answers):
                field.turn(contestant, word)
        results = [
            _result(contestant.entry.name, answers, warm_up=warm_up)
            for contestant, answers in field.answers.items()
        ]
    return Outcome(tuple(results), tuple(field.notes))


class _Field:
    """Those still in, with all they have answered, and a sentence about each that is not."""

    def __init__(self) -> None:
        self.answers: dict[Contestant, list[dict[str, Any]]] = {}
        self.notes: list[str] = []

    def admit(self, contestant: Contestant) -> None:
        self.answers[contestant] = []
        self._listen(contestant, contestant.prepare)

    def turn(self, contestant: Contestant, word: str) -> None:
        self._listen(contestant, lambda: contestant.ask(word))

    def _listen(self, contestant: Contestant, act: Callable[[], dict[str, Any]]) -> None:
        name = contestant.entry.name
        try:
            self.answers[contestant].append(act())
        except Failed as failure:
            if not contestant.entry.ours:
                del self.answers[contestant]
                self.notes.append(f"{name} dropped out: {failure}")
            elif any(words in str(failure) for words in OUT_OF_MEMORY):
                raise InputError(
                    f"expected more memory than there is for {name} ({failure}); "
                    "lower the batch or the width"
                ) from None
            else:
                raise RuntimeError(f"{name}: {failure}") from None


def _result(name: str, answers: list[dict[str, Any]], *, warm_up: int) -> Result:
    said = {key: value for answer in answers for key, value in answer.items()}
    rounds = [float(answer["ms"]) for answer in answers if "ms" in answer]
    del said["ready"], said["ms"]
    return Result(
        name=name,
        rounds=tuple(rounds[warm_up:]),
        temporary=said.pop("temporary", None),
        resident=said.pop("resident", None),
        facts=said,
    )


Peer = Literal["saelens", "dictionary_learning", "saedashboard"]

NAMES: dict[Peer, str] = {
    "saelens": "SAELens",
    "dictionary_learning": "dictionary_learning",
    "saedashboard": "SAEDashboard",
}
FOLDER = ROOT / ".peers"
SCRIPTS = ROOT / "benchmarks" / "peers"


def interpreter(folder: Path, peer: Peer) -> Path:
    return folder / peer / "bin" / "python"


def found(folder: Path | None, peers: tuple[Peer, ...]) -> tuple[list[Peer], list[str]]:
    """Return the peers that are there, and a sentence on how to make those that are not.

    Raises:
        InputError: if `folder` was given and holds no environment at all.
    """
    place = FOLDER if folder is None else folder
    there: list[Peer] = [peer for peer in peers if interpreter(place, peer).is_file()]
    if folder is not None and not there:
        raise InputError(
            f"--peers: expected a folder made by benchmarks/peers.sh, found none of "
            f"{', '.join(peers)} in {folder}; make it with benchmarks/peers.sh {folder}"
        )
    missing = [NAMES[peer] for peer in peers if peer not in there]
    if not missing:
        return there, []
    return there, [
        f"{' and '.join(missing)} not measured: no environment here; make it with "
        "benchmarks/peers.sh"
    ]


def peer_entry(
    name: str, peer: Peer, script: str, job: dict[str, Any], *, folder: Path | None
) -> Entry:
    """Return a script of benchmarks/peers as a contestant, run by the peer's interpreter."""
    place = (FOLDER if folder is None else folder).absolute()
    # Not resolved: a link to the interpreter is what makes it the environment's.
    command = (str(interpreter(place, peer)), str(SCRIPTS / script))
    return Entry(name, command, job, ours=False)
