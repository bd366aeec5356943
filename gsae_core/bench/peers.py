"""Where the other libraries are: each in an environment of its own, made by benchmarks/peers.sh."""

from pathlib import Path
from typing import Any, Literal

from gsae_core.bench.contestants import ROOT, Entry
from gsae_core.errors import InputError

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
