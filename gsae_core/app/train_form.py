"""The Train page's form as values: what a preset fills in, and the flags that its fields mean.

A field is a flag of `train`. It shows the preset's value until it is changed, and only what was
changed becomes a flag. So the page, the command line that it shows and the run are always the same.
What cannot be read raises InputError, which calls the field by its label.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args, get_type_hints

from gsae_core.cli.arguments import SETS, Train
from gsae_core.config import (
    ARCHITECTURES,
    Architecture,
    DataConfig,
    ModelConfig,
    Place,
    RunConfig,
    Site,
)
from gsae_core.errors import InputError
from gsae_core.presets import preset
from gsae_core.runs.plan.cost import gated_width
from gsae_core.text import in_units

Values = dict[str, Any]
"""What a form's widgets hold, by flag: text, whole numbers, switches and lists of names."""

KNOBS: dict[str, tuple[Architecture, ...]] = {
    "sparsity": ("gated", "relu"),
    "jumprelu_sparsity": ("jumprelu",),
    "k": ("topk",),
}
"""Which architectures' sparsity a flag sets: what it weighs is of another size in each."""
LABELS = {flag: flag.replace("_", " ").capitalize() for flag in (*SETS, "width")} | {
    "arch": "Architectures",
    "more_layers": "Further layers",
    "more_sites": "Further sites",
    "sparsity": "λ",
    "jumprelu_sparsity": "λ of JumpReLU",
    "k": "k",
    "equal_width": "Equal width for ReLU baselines",
    "lr": "Learning rate",
    "dtype": "Precision",
    "revision": "Model revision",
    "chat": "Chats by the chat template",
    "n_ctx": "Context length",
    "bos": "BOS",
    "held_out": "Held-out share",
    "tie": "Tied encoder",
    "aux": "Auxiliary decoder",
    "detach_b_dec": "Detached b_dec",
    "loss_norm": "Loss normalisation",
    "beta1": "Adam β₁",
    "beta2": "Adam β₂",
    "lr_warmup_steps": "Warm-up steps",
    "lr_decay_fraction": "Decay share",
    "sparsity_warmup_steps": "λ warm-up steps",
    "revive_every": "Resample every",
    "revive_window": "Dead after",
    "revive_until": "Resample until",
    "start": "Latents start",
    "eval_tokens": "Evaluation tokens",
    "eval_replace": "Reconstructions replace",
    "init_threshold": "Initial threshold",
    "threshold_unit": "Unit of thresholds",
    "k_aux": "Auxiliary k",
    "screened": "Screened encoder",
    "track": "Tracker",
    "activations": "Activations from a folder",
}
"""What the form calls each flag."""
_READ_BY: dict[str, Architecture] = {
    **dict.fromkeys(("init_threshold", "bandwidth", "threshold_unit"), "jumprelu"),
    "k_aux": "topk",
}


class Field(NamedTuple):
    """A flag that sets one field of a config, as a field of the form."""

    help: str
    kind: Any
    """bool, int, float, str, or a Literal."""
    choices: tuple[str, ...]
    default: Any
    """None where there is none."""


def _fields() -> dict[str, Field]:
    hints, found = get_type_hints(Train), {}
    for flag, (of, name) in SETS.items():
        info = of.model_fields[name]
        kind = (get_args(hints[flag]) or (hints[flag],))[0]
        text = " ".join((info.description or "").split())
        default = None if info.is_required() else info.default
        found[flag] = Field(text, kind, get_args(kind), default)
    return found


FIELDS = _fields()
"""Every flag of `train` that sets one field of a config, by name."""
OF_A_MODEL = {flag for flag, (of, _) in SETS.items() if of in (ModelConfig, DataConfig)}
OF_A_MODEL |= {"eval_replace", "cache_activations"}
OF_A_MODEL -= {"held_out"}
"""Flags that say nothing of a folder of vectors."""


class Base(NamedTuple):
    """What a form starts from, a preset or an earlier run, and the one flag that stands for it."""

    config: RunConfig
    flags: Train


def at_place(base: Base, layer: int, site: Site) -> Base:
    """Return a paper's set-up at another of its places: widths and lambdas are those found there.

    At a place that it does not cover, and for any other base, return `base`.
    """
    name = base.flags.preset
    if name is None or (layer, site) not in preset(name).choices:
        return base
    return base._replace(config=preset(name).config(layer=layer, site=site))


def covers(base: Base, layer: int, site: str) -> bool:
    """Whether a base's set-up has runs at this place."""
    chosen = preset(base.flags.preset).choices if base.flags.preset else ()
    return not chosen or (layer, site) in chosen


def shown(config: RunConfig) -> Values:
    """Return what the form shows of a run; of a knob, the first architecture's values."""
    baselines = {spec.d_sae for spec in config.saes if spec.architecture == "relu"}
    others = {spec.d_sae for spec in config.saes if spec.architecture != "relu"}
    values: Values = {flag: _shown(flag, config) for flag in FIELDS}
    # Of a folder of vectors no place is shown.
    own = (Place(config.model.layer, config.model.site),)
    places = config.places if config.activations is None else own
    layers, sites = (list(dict.fromkeys(each)) for each in zip(*places, strict=True))
    values |= {
        "layer": layers[0],
        "site": sites[0],
        "more_layers": layers[1:],
        "more_sites": sites[1:],
        "arch": list(dict.fromkeys(spec.architecture for spec in config.saes)),
        "width": gated_width(config),
        "equal_width": len(others) == 1 and baselines == others,
    }
    for knob, architectures in KNOBS.items():
        own = [spec for spec in config.saes if spec.architecture in architectures]
        first = [spec.sparsity for spec in own if spec.architecture == own[0].architecture]
        first = dict.fromkeys(first)  # of a sweep at several places, each value once
        values[knob] = " ".join(repr(number).removesuffix(".0") for number in first)
    return values


def _shown(flag: str, config: RunConfig) -> str | bool:
    of, name = SETS[flag]
    # What one architecture alone reads is shown as its SAEs have it.
    own = [spec for spec in config.saes if spec.architecture == _READ_BY.get(name)]
    parts = (config, config.model, config.data, config.train, config.evaluation)
    part = next(part for part in (*parts, (own or config.saes)[0]) if isinstance(part, of))
    value = getattr(part, name)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def to_flags(values: Values, base: Base) -> Train:
    """Return the flags of the run that a form describes: what `base` says already is left out.

    Where a field of the base was emptied, or the base has no runs at this place, every setting is
    spelt out and the base's name is dropped: no flag could take its setting back.
    """
    wanted = _parsed(values)
    places = [(layer, site) for layer in wanted["layer"] for site in wanted["site"]]
    covered = all(covers(base, *place) for place in places)
    own = _parsed(shown(base.config))
    base = at_place(base, *places[0])
    given = _parsed(shown(base.config)) | {name: own[name] for name in ("layer", "site")}
    # Neither an empty field nor a switch that is off can be said over a base that has it.
    empty = {flag for flag in FIELDS if wanted[flag] is None or wanted[flag] is False}
    emptied = any(given[flag] is not None and given[flag] is not False for flag in empty)
    start = base.flags
    if emptied or not covered:
        given = {flag: field.default for flag, field in FIELDS.items()}
        given |= {name: (given[name],) for name in ("layer", "site")}
        start, given["equal_width"] = Train(), False
    changed = {flag: value for flag, value in wanted.items() if value != given.get(flag)}
    if wanted["activations"]:  # the folder says what its vectors are of
        unsaid = OF_A_MODEL - {"cache_activations"}  # which is refused in a sentence
        changed = {name: changed[name] for name in changed if name not in unsaid}
    if {"width", "equal_width"} & set(changed):
        changed |= {"width": wanted["width"], "equal_width": wanted["equal_width"]}
    return replace(start, **changed)


def _parsed(values: Values) -> dict[str, Any]:
    """Return a form's values as flags take them; None where a field is empty."""
    for flag in ("model", "data", "arch", "width"):
        if not str(values[flag] or "").strip():
            raise InputError(f"{LABELS[flag]}: expected a value, got none")
    found = {flag: _read(flag, values[flag]) for flag in FIELDS}
    chosen = found["arch"] = tuple(a for a in ARCHITECTURES if a in values["arch"])
    for knob, architectures in KNOBS.items():
        turned = set(architectures) & set(chosen)
        words = re.split(r"[\s,;]+", values[knob].strip()) if turned else ()
        read = whole if knob == "k" else number
        found[knob] = tuple(read(word, LABELS[knob]) for word in words)
    for name in ("layer", "site"):
        found[name] = tuple(dict.fromkeys([values[name], *values[f"more_{name}s"]]))
    found["width"] = int(values["width"])
    found["equal_width"] = bool(values["equal_width"]) and "relu" in chosen and len(chosen) > 1
    return found


def _read(flag: str, value: Any) -> Any:
    kind = FIELDS[flag].kind
    if kind is bool:
        return bool(value)
    text = "" if value is None else str(value).strip()
    read = {int: whole, float: number}.get(kind)
    return read(text, LABELS[flag]) if text and read else text or None


def log_spaced(low: float | int, high: float | int, n: int) -> list[float]:
    """Return `n` >= 2 values from `low` to `high` in equal ratios, to three significant digits."""
    if not 0 < low < high or not math.isfinite(high):
        raise InputError(
            f"expected two numbers above 0, the smaller first, got {low:g} and {high:g}"
        )
    return [float(f"{low * (high / low) ** (i / (n - 1)):.3g}") for i in range(n)]


def corrected(asked: Mapping[str, list[str]], values: Values) -> list[str]:
    """Return a sentence for each value that the address asked for and the form does not show."""
    sentences = []
    for flag in [flag for flag in values if flag in asked]:
        value, names = values[flag], ", ".join(asked[flag])
        mine = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if names.lower() != mine.lower():
            sentences.append(
                f"{LABELS[flag]}: {names[:80]} is not a choice here; showing {mine or 'none'}"
            )
    return sentences


def notebook_cell(config: RunConfig, *, name: str = "my-run") -> str:
    """Return Python that trains and evaluates `config` in `runs/<name>`, defaults left out."""
    given = json.loads(config.model_dump_json(exclude_defaults=True))
    # In ASCII, so that nothing hidden is pasted; no string of JSON holds three quotes.
    text = json.dumps(given, indent=2).replace("\\", "\\\\")
    return f'''\
from gsae_core.config import RunConfig
from gsae_core.runs.run import Run
from gsae_core.runs.work.train import train_run

config = RunConfig.model_validate_json("""
{text}
""")
run = Run.create({"runs/" + name!r}, config)
for now in train_run(run):
    print(f"{{now.stage}}: {{now.done}} of {{now.total}}", end="\\r")
run.evals()'''


def number(text: str, field: str) -> float:
    """Return the number in a text field."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{field}: expected a number, like 0.1, got {text!r}") from None


def whole(text: str, field: str) -> int:
    """Return the whole number in a text field; 2e6, 2 M, 2_000_000 and 2,000,000 are all read."""
    try:
        digits = re.sub(r"[\s,_]", "", text)
        unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(digits[-1:].lower())
        number = float(digits) if unit is None else round(float(digits[:-1]) * unit, 3)
        if not number.is_integer():
            raise ValueError
    except ValueError:
        raise InputError(
            f"{field}: expected a whole number, like 2_000_000, got {text!r}"
        ) from None
    return int(number)


def in_labels(sentence: str, unit: str = "token") -> str:
    """Return an error of the command line in the form's words: flags become the fields' labels.

    `unit`: what the form's run counts.
    """
    labels = {
        f"--{flag.replace('_', '-')}": in_units(label, unit) for flag, label in LABELS.items()
    }
    return re.sub(r"--[a-z-]+", lambda flag: labels.get(flag[0], flag[0]), sentence)
