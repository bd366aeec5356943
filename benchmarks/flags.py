"""The flags of `bench`, checked; loads no torch, so that --help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from gsae_core.errors import InputError

Device = Literal["cpu", "cuda"]


def _flag(text: str, metavar: str | None = None) -> Any:
    return arg(help=text, metavar=metavar)


def _optional(text: str, metavar: str | None = None) -> Any:
    return arg(help=text, metavar=metavar, help_behavior_hint="")


_Device = Annotated[Device, _flag("Where to compute.")]
_Rounds = Annotated[int, _flag("Rounds that count; each way's median is shown.", "INT")]
_Threads = Annotated[
    int | None,
    _optional("Processor threads of every contestant; without it as many as torch takes.", "INT"),
]
_Json = Annotated[
    FlagCreatePairsOff[bool], _optional("Print JSON, every round in it, and no table.")
]
_Peers = Annotated[
    Path | None,
    _optional(
        "Folder of the peers' environments; without it .peers in the repository, which "
        "benchmarks/peers.sh makes.",
        "DIR",
    ),
]
_NoPeers = Annotated[FlagCreatePairsOff[bool], _optional("Leave the other libraries out.")]


@dataclass(frozen=True)
class Step:
    """Time one training step: ours, dense references, and the peers' where they are installed.

    Every way starts from the same weights and batch, held at the same L0, and they take turns.
    Ratios are to one encoder product of the same shape.
    """

    batch: Annotated[int, _flag("Activation vectors in a step.", "INT")] = 4096
    d_in: Annotated[int, _flag("Width of the activations.", "INT")] = 512
    d_sae: Annotated[int, _flag("Number of latents.", "INT")] = 16384
    l0: Annotated[float, _flag("Latents that fire on an average input.", "FLOAT")] = 32.0
    saes: Annotated[int, _flag("SAEs that learn at once; times are then for each.", "INT")] = 1
    device: _Device = "cpu"
    rounds: _Rounds = 7
    threads: _Threads = None
    brief: Annotated[
        FlagCreatePairsOff[bool],
        _optional("Leave out other architectures, the screened encode and half-active latents."),
    ] = False
    json: _Json = False
    peers: _Peers = None
    no_peers: _NoPeers = False

    def check(self) -> None:
        """Raise InputError for the first flag that cannot be."""
        _at_least_one(self, "batch", "d_in", "d_sae", "saes", "rounds", "threads")
        if not 0 < self.l0 < self.d_sae:
            raise InputError(
                f"--l0: expected a number above 0 and below --d-sae ({self.d_sae}), got {self.l0:g}"
            )


@dataclass(frozen=True)
class Harvest:
    """Time reading activations: ours, the bare Hugging Face model, and TransformerLens.

    All stop at the site, resid_post of --layer, over the same tokens of the standard library.
    """

    model: Annotated[
        str, _flag("`bundled`, a local Hugging Face folder, or a name on the Hub.", "NAME")
    ] = "bundled"
    layer: Annotated[int, _flag("Block number, from 0.", "INT")] = 2
    n_ctx: Annotated[int, _flag("Tokens in a sequence.", "INT")] = 256
    rows: Annotated[int, _flag("Sequences in a forward pass.", "INT")] = 8
    passes: Annotated[int, _flag("Forward passes in a round.", "INT")] = 8
    device: _Device = "cpu"
    rounds: _Rounds = 7
    threads: _Threads = None
    json: _Json = False

    def check(self) -> None:
        """Raise InputError for the first flag that cannot be."""
        _at_least_one(self, "n_ctx", "rows", "passes", "rounds", "threads")


@dataclass(frozen=True)
class Train:
    """Time whole training runs on the bundled model: ours, a sweep of ours, and SAELens' runner.

    Everybody reads the same tokens, already tokenised, and logs and saves as it does by default.
    """

    width: Annotated[int, _flag("Number of latents.", "INT")] = 4096
    tokens: Annotated[int, _flag("Activation vectors to train on.", "INT")] = 2**20
    batch: Annotated[int, _flag("Activation vectors in a step.", "INT")] = 2048
    layer: Annotated[int, _flag("Block whose resid_post is read, from 0.", "INT")] = 2
    sparsity: Annotated[float, _flag("lambda of the single SAE.", "FLOAT")] = 0.5
    saes: Annotated[int, _flag("SAEs in the sweep.", "INT")] = 8
    device: _Device = "cpu"
    rounds: Annotated[int, _flag("Times each of them trains.", "INT")] = 1
    threads: _Threads = None
    json: _Json = False
    peers: _Peers = None
    no_peers: _NoPeers = False

    def check(self) -> None:
        """Raise InputError for the first flag that cannot be."""
        _at_least_one(self, "width", "tokens", "batch", "saes", "rounds", "threads")
        if self.tokens < self.batch:
            raise InputError(
                f"--tokens: expected at least one batch ({self.batch}), got {self.tokens}"
            )
        if not self.sparsity > 0:
            raise InputError(f"--sparsity: expected a number above 0, got {self.sparsity:g}")


@dataclass(frozen=True)
class Index:
    """Time building a feature index: ours beside reading and encoding alone, and SAEDashboard.

    SAEDashboard makes dashboards of --slice features from activations it has on disk already; the
    time for all is counted as so many slices, which is the least that it could be.
    """

    width: Annotated[int, _flag("Number of latents.", "INT")] = 16384
    tokens: Annotated[int, _flag("Tokens to read.", "INT")] = 2**17
    l0: Annotated[float, _flag("Latents that fire on an average token.", "FLOAT")] = 50.0
    layer: Annotated[int, _flag("Block whose resid_post is read, from 0.", "INT")] = 2
    slice: Annotated[int, _flag("Features that SAEDashboard shows in a round.", "INT")] = 256
    device: _Device = "cpu"
    rounds: Annotated[int, _flag("Rounds that count.", "INT")] = 2
    threads: _Threads = None
    json: _Json = False
    peers: _Peers = None
    no_peers: _NoPeers = False

    def check(self) -> None:
        """Raise InputError for the first flag that cannot be."""
        _at_least_one(self, "width", "tokens", "slice", "rounds", "threads")
        if not 0 < self.l0 < self.width:
            raise InputError(
                f"--l0: expected a number above 0 and below --width ({self.width}), got {self.l0:g}"
            )
        if self.slice > self.width:
            raise InputError(
                f"--slice: expected at most --width ({self.width}) features, got {self.slice}"
            )


@dataclass(frozen=True)
class Curves:
    """Draw how a step's time grows with the width, with L0 and with the number of SAEs.

    Measures `bench step` at every point, keeps each in FOLDER/scaling.json as soon as it is known,
    and draws three figures beside it. Interrupted, it goes on where it was; --fresh begins anew.
    """

    folder: Annotated[Path, _flag("Where figures and numbers go.", "DIR")] = Path("docs")
    batch: Annotated[int, _flag("Activation vectors in a step.", "INT")] = 4096
    d_in: Annotated[int, _flag("Width of the activations.", "INT")] = 512
    d_sae: Annotated[tuple[int, ...], _flag("Widths of the first curve.", "INT [INT ...]")] = (
        2048,
        4096,
        8192,
        16384,
        32768,
        65536,
        131072,
    )
    l0: Annotated[tuple[float, ...], _flag("L0s of the second curve.", "FLOAT [FLOAT ...]")] = (
        8.0,
        16.0,
        32.0,
        64.0,
        128.0,
        256.0,
        512.0,
        1024.0,
    )
    saes: Annotated[tuple[int, ...], _flag("SAEs of the third.", "INT [INT ...]")] = (
        1,
        2,
        4,
        8,
        16,
    )
    at_d_sae: Annotated[int, _flag("Width of the second and the third curve.", "INT")] = 16384
    at_l0: Annotated[float, _flag("L0 of the first and the third curve.", "FLOAT")] = 32.0
    device: _Device = "cpu"
    rounds: _Rounds = 3
    threads: _Threads = None
    peers: _Peers = None
    no_peers: _NoPeers = False
    fresh: Annotated[FlagCreatePairsOff[bool], _optional("Measure every point again.")] = False

    def steps(self) -> dict[str, list[Step]]:
        """Return the points of each curve, by the flag that it runs over."""

        def point(d_sae: int, l0: float, saes: int) -> Step:
            return Step(
                batch=self.batch,
                d_in=self.d_in,
                d_sae=d_sae,
                l0=l0,
                saes=saes,
                device=self.device,
                rounds=self.rounds,
                threads=self.threads,
                brief=True,
                peers=self.peers,
                # They learn one SAE at a time, and have that point from the first curve.
                no_peers=self.no_peers or saes > 1,
            )

        return {
            "d_sae": [point(d_sae, self.at_l0, 1) for d_sae in sorted(self.d_sae)],
            "l0": [point(self.at_d_sae, l0, 1) for l0 in sorted(self.l0)],
            "saes": [point(self.at_d_sae, self.at_l0, saes) for saes in sorted(self.saes)],
        }

    def check(self) -> None:
        """Raise InputError for the first flag that cannot be."""
        for name in ("d_sae", "l0", "saes"):
            if not getattr(self, name):
                raise InputError(f"{_said(name)}: expected at least one number, got none")
        for points in self.steps().values():
            for step in points:
                step.check()


Benchmark = Step | Harvest | Train | Index | Curves
BENCHES: dict[str, type[Benchmark]] = {
    "step": Step,
    "harvest": Harvest,
    "train": Train,
    "index": Index,
    "curves": Curves,
}


def _said(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least_one(flags: Benchmark, *names: str) -> None:
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise InputError(f"{_said(name)}: expected a number of at least 1, got {value}")
