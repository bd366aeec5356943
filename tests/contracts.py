"""What later versions must keep: how it is measured, and the files that hold what was found.

    python tests/contracts.py                     write tests/fixtures/contracts, the run left out
    python tests/contracts.py --bits FILE         write exact numbers, to compare two versions with
    python tests/contracts.py --compare FILE      exit 1 unless this version computes the same bits

Only a change of a contract, which its commit explains, is a reason to write them anew: one kind at
a time, as `--only help`. The run is what the version before the reorganisation wrote; a run made by
a later one would prove nothing. It names the model and the text of `fixtures/version_0_1`. Bits
hold on one machine only: write and compare them in one sitting.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file
from torch import Tensor

import gsae_core
import gsae_core.training
from gsae_core import (
    GatedSAE,
    JumpReluSAE,
    ReluSAE,
    TopKSAE,
    attach,
    load_model,
    load_sae,
    open_index,
    open_run,
    push_sae,
    read_sae,
)
from gsae_core.checkpoints.checkpoint import save_sae
from gsae_core.checkpoints.formats.libraries import EXPORTS
from gsae_core.checkpoints.formats.write import write_sae
from gsae_core.cli.main import main as command
from gsae_core.config import RunConfig
from gsae_core.sae.base import SAE
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.training import TrainConfig, Trainer, train
from gsae_core.training.optimizer import DictionaryAdam

FIXTURES = Path(__file__).parent / "fixtures"
CONTRACTS = FIXTURES / "contracts"
LM = FIXTURES / "version_0_1"
RUN = CONTRACTS / "run"

COMMANDS = (
    "",
    "train",
    "harvest",
    "resume",
    "finetune",
    "extend",
    "evaluate",
    "index",
    "label",
    "import",
    "export",
    "list",
    "pull",
    "push",
    "app",
    "doctor",
    "bench",
    "bench step",
    "bench harvest",
    "bench train",
    "bench index",
    "bench curves",
)

D_IN, D_SAE, BATCH, N_STEPS = 6, 16, 16, 30
ADAM: dict[str, Any] = {"beta1": 0.5, "beta2": 0.99}

# Sparsity weighs L1, for JumpReLU L0.
SAES: dict[str, tuple[Callable[..., SAE], dict[str, Any], float]] = {
    "gated": (GatedSAE, {}, 0.1),
    "gated-A": (GatedSAE, {"recipe": "A"}, 0.1),
    "gated-B": (GatedSAE, {"recipe": "B"}, 0.1),
    "gated-none": (GatedSAE, {"tie": "none"}, 0.1),
    "gated-untied": (GatedSAE, {"tie": "untied"}, 0.1),
    "gated-unfrozen": (GatedSAE, {"aux": "unfrozen"}, 0.1),
    "gated-detached": (GatedSAE, {"detach_b_dec": True}, 0.1),
    "relu": (ReluSAE, {}, 0.1),
    "relu-A": (ReluSAE, {"recipe": "A"}, 0.1),
    "jumprelu": (JumpReluSAE, {"bandwidth": 0.5, "threshold_unit": 1.0}, 0.05),
    "topk": (TopKSAE, {"k": 3}, 0.1),
}
ARCHITECTURES = ("gated", "relu", "jumprelu", "topk")

Way = Callable[..., StepResult]
WAYS: dict[str, Way] = {
    "autograd": dense_step,
    "sparse": sparse_step,
    "by-hand": manual_dense_step,
    "screened": functools.partial(sparse_step, screened=True),
}


def ways(name: str) -> tuple[str, ...]:
    """Return the ways of computing a step of an SAE that later versions keep."""
    match name:
        case "gated-untied":
            return ("autograd",)
        case "jumprelu":
            return ("autograd", "sparse", "screened")
        case "topk":
            return ("autograd", "sparse")
    return tuple(WAYS)


def exact(*shape: int, salt: int = 0) -> Tensor:
    """Return multiples of 1/128 in [-1, 1), in float64: the same on every machine."""
    i = torch.arange(math.prod(shape))
    return ((i * (i + 7) * (i + 12) + salt * i + 3 * salt) % 251 - 125).double().reshape(
        shape
    ) / 128


def exact_sae(name: str) -> SAE:
    """Return an SAE in float64 whose parameters are `exact`, biases and thresholds smaller."""
    kind, options, _ = SAES[name]
    sae = kind(D_IN, D_SAE, **options).double()
    with torch.no_grad():
        for salt, (key, parameter) in enumerate(sae.named_parameters()):
            numbers = exact(*parameter.shape, salt=salt)
            if parameter.ndim == 1:
                numbers = numbers / 4
            parameter.copy_(numbers.abs() + 0.25 if key == "threshold" else numbers)
    return sae


def some_batches() -> list[Tensor]:
    return list(exact(N_STEPS, BATCH, D_IN, salt=5).unbind())


def learner(name: str, dtype: torch.dtype) -> SAE:
    """Return `exact_sae` with directions of length one, in that precision."""
    sae = exact_sae(name)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae.to(dtype)


class Stepped(NamedTuple):
    """An SAE after 30 steps, each computed in one way."""

    sae: SAE
    loss: list[float]
    """The three terms, summed over the steps."""
    fired: list[int]
    """Of each latent, likewise."""


def stepped(name: str, way: str, *, dtype: torch.dtype) -> Stepped:
    """Take 30 steps with `learner`; a latent silent in 3 steps is dead."""
    sae, coeff = learner(name, dtype), SAES[name][2]
    adam = DictionaryAdam(sae, **ADAM)
    silent = torch.zeros(D_SAE, dtype=torch.int64)
    loss, fired = torch.zeros(3, dtype=torch.float64), torch.zeros_like(silent)
    for number, x in enumerate(some_batches(), 1):
        result = WAYS[way](sae, x.to(dtype), sparsity_coeff=coeff, dead=silent >= 3)
        loss += torch.stack(list(result.loss))
        fired += result.stats.fired
        silent = torch.where(result.stats.fired > 0, 0, silent + 1)
        adam.step(0.02 * min(1.0, number / 4), threshold_lr=0.03)
    return Stepped(sae, loss.tolist(), fired.tolist())


def trained(dtype: torch.dtype) -> tuple[list[SAE], list[dict[str, float]]]:
    """Return SAEs after 30 steps of the training loop, with revivals, and numbers of the last."""
    saes = [learner(name, dtype) for name in ARCHITECTURES]
    for sae in saes:
        bias = sae.b_gate if isinstance(sae, GatedSAE) else sae.get_parameter("b_enc")
        bias.data[3] = -100.0  # dead until it is revived
    cfg = TrainConfig(
        n_tokens=N_STEPS * BATCH,
        batch_size=BATCH,
        lr=0.01,
        sparsity=tuple(SAES[name][2] for name in ARCHITECTURES),
        lr_warmup_steps=4,
        sparsity_warmup_steps=5,
        revive_every=10,
        revive_window=3,
        **ADAM,
    )
    numbers = ("l0", "fvu", "gamma", "lr", "sparsity_coeff")
    rows: list[dict[str, float]] = []
    for report in train(saes, [x.to(dtype) for x in some_batches()], cfg):
        rows = [{name: getattr(each, name) for name in numbers} for each in report.saes]
    return saes, rows


def described(sae: SAE) -> dict[str, list[float]]:
    """Return of each parameter its sum, sum of squares, and up to five of its numbers."""
    found = {}
    for name, parameter in sae.named_parameters():
        flat = parameter.detach().double().flatten()
        some = flat[:: max(1, len(flat) // 5)][:5]
        found[name] = [float(flat.sum()), float(flat.square().sum()), *some.tolist()]
    return found


def in_numbers(done: Stepped) -> dict[str, Any]:
    """Return what is held of an SAE after 30 steps."""
    return described(done.sae) | {"loss": done.loss, "fired": done.fired}


def steps_in_numbers() -> dict[str, Any]:
    """Return what 30 steps in float64 come to, in autograd's way and in the loop."""
    found = {name: in_numbers(stepped(name, "autograd", dtype=torch.float64)) for name in SAES}
    return found | loop_in_numbers()


def loop_in_numbers() -> dict[str, Any]:
    """Return what the training loop comes to in float64, and where SAEs start."""
    found: dict[str, Any] = {}
    saes, rows = trained(torch.float64)
    for name, sae, row in zip(ARCHITECTURES, saes, rows, strict=True):
        found[f"train {name}"] = described(sae) | {"report": row}
    for name in ARCHITECTURES:
        kind, options, _ = SAES[name]
        found[f"start {name}"] = described(kind(D_IN, D_SAE, seed=3, **options))
    return found


def help_of(words: str) -> str:
    """Return what a command's --help prints, 100 columns wide."""
    out = io.StringIO()
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    code: object = None
    with patch.dict(os.environ, plain), contextlib.redirect_stdout(out):
        try:
            command([*words.split(), "--help"])
        except SystemExit as stop:
            code = stop.code
    assert code == 0, (words, code)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def help_file(words: str) -> Path:
    return CONTRACTS / "help" / f"{words.replace(' ', '-') or 'gsae_core'}.txt"


def signature(function: Callable[..., Any]) -> list[str]:
    """Return a function's parameters: stars, names and defaults."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        name = stars.get(parameter.kind, "") + parameter.name
        kind = " (by name)" if parameter.kind is parameter.KEYWORD_ONLY else ""
        default = parameter.default
        said = "" if default is parameter.empty else f" = {default!r}"
        found.append(name + said + kind)
    return found


def public_names() -> dict[str, Any]:
    """Return the public names, what they take, and the shapes of parameters."""
    kinds = {
        "GatedSAE": GatedSAE,
        "ReluSAE": ReluSAE,
        "JumpReluSAE": JumpReluSAE,
        "TopKSAE": TopKSAE,
    }
    functions = {
        "load_sae": load_sae,
        "push_sae": push_sae,
        "read_sae": read_sae,
        "SAE.from_pretrained": SAE.from_pretrained,
        "SAE.push_to_hub": SAE.push_to_hub,
        "SAE.attach": SAE.attach,
        "attach": attach,
        "load_model": load_model,
        "open_run": open_run,
        "open_index": open_index,
        "train": train,
        "Trainer": Trainer,
    }
    for name, kind in kinds.items():
        functions[name] = kind.__init__
        functions |= {f"{name}.{each}": getattr(kind, each) for each in ("encode", "decode")}
        functions[f"{name}()"] = kind.forward
    fields = TrainConfig.model_fields
    return {
        "gsae_core": sorted(gsae_core.__all__),
        "gsae_core.training": sorted(gsae_core.training.__all__),
        "takes": {name: signature(function) for name, function in functions.items()},
        "TrainConfig": {
            name: "required" if field.is_required() else repr(field.default)
            for name, field in fields.items()
        },
        "parameters": {
            name: {key: list(p.shape) for key, p in exact_sae(name).named_parameters()}
            for name in SAES
        },
    }


METADATA = {
    "name": "frozen",
    "model_name": "bundled",
    "hook_name": "blocks.1.hook_resid_pre",
    "dataset_path": "stdlib",
    "context_size": 16,
    "prepend_bos": True,
    "sparsity": 0.25,
}


def written_files(folder: Path) -> dict[str, dict[str, str]]:
    """Write each SAE as a checkpoint and in every export format; return what each file holds."""
    found = {}
    for name in SAES:
        sae = exact_sae(name).float()
        save_sae(sae, folder / name, metadata=METADATA)
        found[name] = digests(folder / name)
        save_sae(sae, folder / f"{name}-bf16", metadata=METADATA, dtype=torch.bfloat16)
        found[f"{name} bfloat16"] = digests(folder / f"{name}-bf16")
        for format in EXPORTS:
            if (name == "gated-untied" and format != "gsae_core") or (
                (name, format) == ("topk", "jumprelu")
            ):
                continue  # refused
            write_sae(sae, folder / format / name, format=format, metadata=METADATA)
            found[f"{name} {format}"] = digests(folder / format / name)
    return found


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file, of a torch file that of its tensors."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def content(path: Path) -> bytes:
    if path.suffix != ".pt":
        return path.read_bytes()
    # The archive around the tensors is torch's affair.
    state = torch.load(path, weights_only=True)
    parts = [
        f"{name} {t.dtype} {list(t.shape)}".encode() + t.contiguous().numpy().tobytes()
        for name, t in state.items()
    ]
    return b"".join(parts)


@contextlib.contextmanager
def world(folder: Path) -> Iterator[None]:
    """Make a folder the current one, with the model and the text that runs name, one thread."""
    shutil.copytree(LM / "model", folder / "model", dirs_exist_ok=True)
    shutil.copy(LM / "text.txt", folder / "text.txt")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder), patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        yield
    torch.set_num_threads(n_threads)


def run_command(*words: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = command(list(words))
    assert code == 0, (words, code)


def first_config() -> dict[str, Any]:
    """Return the config of the run that is kept; defaults are written out by the run."""
    saes = [
        {"name": "gated", "architecture": "gated", "d_sae": 24, "sparsity": 0.3},
        {"name": "relu", "architecture": "relu", "d_sae": 20, "sparsity": 0.3},
        {"name": "jumprelu", "architecture": "jumprelu", "d_sae": 24, "sparsity": 0.03},
        {"name": "topk", "architecture": "topk", "d_sae": 24, "sparsity": 4},
    ]
    recipe = {
        "n_tokens": 16 * 12,
        "batch_size": 16,
        "lr": 1e-2,
        "lr_warmup_steps": 2,
        "revive_every": 5,
        "revive_window": 3,
    }
    config = RunConfig.model_validate(
        {
            "model": {"name": "model", "layer": 1, "site": "resid_pre"},
            "data": {"source": "text.txt", "held_out": 0.2},
            "saes": saes,
            "train": recipe,
            "evaluation": {"n_tokens": 100},
            "device": "cpu",
        }
    )
    return config.model_dump(mode="json")


def make_run(config: Path, folder: str) -> None:
    """Train, evaluate and index, by the command line, in the `world`."""
    run_command("train", "--config", str(config), "--out", folder)
    run_command("index", folder, "--sae", "gated", "--tokens", "80")


def layout(run: Path) -> list[str]:
    """Return a run's files; locks left out, the name of an index's data without its time."""
    found = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    shown = [
        "/".join("data-*" if part.startswith("data-") else part for part in name.split("/"))
        for name in found
        if not Path(name).name.startswith(".")
    ]
    return sorted(shown)


def keys(value: Any, at: str = "") -> set[str]:
    """Return the paths of all keys of a JSON value; items of a list share theirs."""
    match value:
        case dict():
            found = {f"{at}.{key}".lstrip(".") for key in value}
            return found.union(*(keys(each, f"{at}.{key}") for key, each in value.items()))
        case list():
            return set().union(*(keys(each, f"{at}[]") for each in value))
    return set()


def keys_of_files(run: Path) -> dict[str, Any]:
    """Return the keys of every JSON file of a run, the tensors of others, and a table's columns."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        # A state to resume from is read by the version that wrote it.
        if not path.is_file() or path.name.startswith(".") or "resume" in path.parts:
            continue
        name = path.relative_to(run).as_posix()
        match path.suffix:
            case ".json" if path.name != "vocabulary.json":
                found[name] = sorted(keys(json.loads(path.read_text(encoding="utf-8"))))
            case ".jsonl":
                lines = path.read_text(encoding="utf-8").splitlines()
                found[name] = sorted({", ".join(sorted(json.loads(line))) for line in lines})
            case ".safetensors":
                tensors = load_file(path)
                found[name] = {key: [str(t.dtype), list(t.shape)] for key, t in tensors.items()}
            case ".parquet":
                table = pd.read_parquet(path)
                found["features.parquet"] = {str(k): str(d) for k, d in table.dtypes.items()}
            case ".npy":
                found[path.name] = str(np.load(path).dtype)
    return found


def answers(run_folder: Path) -> dict[str, Any]:
    """Return what the public names say of a run, its SAEs and its feature index."""
    run = open_run(run_folder)
    index = open_index(run_folder / "features" / "gated")
    assert run.features("gated").manifest == index.manifest
    feature = index[int(index.table["max"].argmax())]
    found: dict[str, Any] = {
        "status": [run.status.state, run.status.step, run.status.n_steps],
        "evals": run.evals(),
        "metrics": [(row["step"], row["sae"]) for row in run.metrics()],
        "loss": [row["fvu"] for row in run.metrics()],
        "fired": run.feature_stats("gated")["fired"].tolist(),
        "index": [index.n_features, index.n_tokens, index.n_places, index.alive().tolist()],
        "table": {
            str(name): column.tolist()
            for name, column in index.table.items()
            if column.dtype.kind in "iuf"
        },
        "feature": feature.number,
        "is_dead": feature.is_dead,
        "top": [[*each.tokens, each.value, each.split] for each in feature.top(3)],
        "least": [each.value for each in feature.near_threshold(3)],
        "missed": [each.value for each in feature.just_missed(3)],
        "histogram": feature.histogram.counts.tolist(),
        "logits": [[each.text, each.effect] for each in feature.logits.top],
        "neighbours": feature.neighbours.to_numpy().tolist(),
        "co_firing": feature.co_firing.to_numpy().tolist(),
        "by_token": index.by_token(7).to_numpy().tolist(),
        "by_text": index.by_text("w1").to_numpy().tolist(),
        "select": index.select(density=(0.1, None)).index.tolist(),
    }
    x = exact(2, 12).float()
    with torch.no_grad():
        for name in ARCHITECTURES:
            sae = load_sae(run_folder / "saes" / name)
            found[name] = [sae.encode(x).tolist(), sae(x).tolist()]
    # As JSON holds it: tuples become lists.
    return json.loads(json.dumps(found))


def index_arrays(run_folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the run's index, firings and near misses of a feature by token."""
    data = next((run_folder / "features" / "gated").glob("data-*"))
    arrays = {path.stem: np.load(path) for path in sorted(data.glob("*.npy"))}
    for offsets, token, value in (
        ("offsets", "token", "value"),
        ("near_offsets", "near_token", "near_margin"),
    ):
        latent = np.repeat(np.arange(len(arrays[offsets]) - 1), np.diff(arrays[offsets]))
        order = np.lexsort([arrays[token], latent])
        arrays[token], arrays[value] = arrays[token][order], arrays[value][order]
    return arrays


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def held(name: str) -> Any:
    """Return one of the JSON fixtures."""
    return json.loads((CONTRACTS / f"{name}.json").read_text(encoding="utf-8"))


def write_help() -> None:
    shutil.rmtree(CONTRACTS / "help", ignore_errors=True)
    for words in COMMANDS:
        help_file(words).parent.mkdir(parents=True, exist_ok=True)
        help_file(words).write_text(help_of(words), encoding="utf-8")


def write_layout() -> None:
    with tempfile.TemporaryDirectory() as scratch, world(Path(scratch)):
        make_run(RUN / "config.json", "runs/new")
        write_json(CONTRACTS / "layout.json", layout(Path("runs/new")))
        write_json(CONTRACTS / "keys.json", keys_of_files(Path("runs/new")))


def write_run() -> None:
    with tempfile.TemporaryDirectory() as scratch, world(Path(scratch)):
        write_json(Path("config.json"), first_config())
        make_run(Path("config.json"), "runs/run")
        run = Path("runs/run")
        # A finished run no longer needs its state, and locks are of a process.
        shutil.rmtree(run / "resume")
        for lock in run.rglob(".*"):
            lock.unlink()
        shutil.rmtree(RUN, ignore_errors=True)
        shutil.copytree(run, RUN)


def write_files() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_json(CONTRACTS / "files.json", written_files(Path(scratch)))


KINDS: dict[str, Callable[[], None]] = {
    "help": write_help,
    "names": lambda: write_json(CONTRACTS / "names.json", public_names()),
    "files": write_files,
    "steps": lambda: write_json(CONTRACTS / "steps.json", steps_in_numbers()),
    "run": write_run,
    "layout": write_layout,
    "answers": lambda: write_json(CONTRACTS / "answers.json", answers(RUN)),
}


def weights(at: str, sae: SAE) -> dict[str, np.ndarray]:
    return {f"{at}/{name}": p.detach().numpy() for name, p in sae.named_parameters()}


def bits() -> dict[str, np.ndarray]:
    """Return float32 weights of every kept way, of the loop and of a run, and a feature index.

    Of the loop (`train/`) and the run (`run/`) a version computes other bits, correctly, if it
    takes a step in another way than the one before.
    """
    found: dict[str, np.ndarray] = {}
    for name in SAES:
        for way in ways(name):
            done = stepped(name, way, dtype=torch.float32)
            found |= weights(f"steps/{name}/{way}", done.sae)
    saes, _ = trained(torch.float32)
    for name, sae in zip(ARCHITECTURES, saes, strict=True):
        found |= weights(f"train/{name}", sae)
    with tempfile.TemporaryDirectory() as scratch, world(Path(scratch)):
        make_run(RUN / "config.json", "runs/new")
        for name in ARCHITECTURES:
            found |= weights(f"run/{name}", load_sae(Path("runs/new/saes") / name))
        copy = shutil.copytree(RUN, "runs/run", ignore=shutil.ignore_patterns("features"))
        run_command("index", str(copy), "--sae", "gated", "--tokens", "80")
        arrays = index_arrays(Path(copy))
        found |= {f"index/{name}": array for name, array in arrays.items()}
    return found


def differences(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> list[str]:
    """Return a line for each array that is not the same to the bit."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            lines.append(f"{name}: only {'before' if name in before else 'after'}")
            continue
        old, new = before[name], after[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            lines.append(f"{name}: {old.dtype} {old.shape} before, {new.dtype} {new.shape} after")
        elif old.tobytes() != new.tobytes():
            gap = np.abs(old.astype(float) - new.astype(float)).max()
            lines.append(f"{name}: other bits, largest difference {gap:.3g}")
    return lines


def main() -> int:
    """Write fixtures, or bits, or compare them; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=KINDS, help="write fixtures of one kind")
    parser.add_argument("--bits", metavar="FILE", type=Path, help="write exact numbers (.npz)")
    parser.add_argument("--compare", metavar="FILE", type=Path, help="compare with such a file")
    asked = parser.parse_args()
    if asked.bits is None and asked.compare is None:
        usual = [kind for kind in KINDS if kind != "run" or not RUN.exists()]
        for kind in [asked.only] if asked.only else usual:
            KINDS[kind]()
            print(f"wrote {kind}")
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, XDG_CACHE_HOME=cache):
        found = bits()
    if asked.bits is not None:
        np.savez(asked.bits, allow_pickle=False, **found)
        print(f"wrote {len(found)} arrays to {asked.bits}")
    if asked.compare is None:
        return 0
    with np.load(asked.compare) as saved:
        lines = differences(dict(saved), found)
    print("\n".join(lines) or f"all {len(found)} arrays are the same to the bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
