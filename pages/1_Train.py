"""Train: choose a model, a place in it and a sweep; see what it takes; start it."""

import secrets

import streamlit as st

from gsae_core import shell
from gsae_core.config import ARCHITECTURES, SITES, RunConfig
from gsae_core.errors import InputError
from gsae_core.flags import Train, run_config
from gsae_core.footprint import (
    Measured,
    default_chunk_vectors,
    model_shape,
    operations,
    pace,
    state_bytes,
    training_bytes,
)
from gsae_core.launch import command_line, in_labels, launch, numbers, whole
from gsae_core.machine import machine
from gsae_core.pieces import facts, notice, plain
from gsae_core.plots.palette import LOOKS
from gsae_core.presets import presets
from gsae_core.store.files import readable
from gsae_core.wording import count, duration

LABELS = {
    "--layer": "Layer",
    "--site": "Site",
    "--width": "Width",
    "--sparsity": "λ",
    "--tokens": "Tokens",
    "--batch-size": "Batch size",
    "--lr": "Learning rate",
    "--seed": "Seed",
    "--device": "Device",
    "--model": "Model",
    "--data": "Data",
}

frame = shell.page(
    "Train",
    icon="🏋️",
    purpose="One pass over the language model trains every λ, all on the same activations.",
)


def fill() -> None:
    """Put a preset's numbers into the form; called when another preset is chosen."""
    config = presets()[st.session_state["preset"]].config()
    gated = [spec for spec in config.saes if spec.architecture == "gated"] or list(config.saes)
    values = {
        "model_name": config.model.name,
        "layer": config.model.layer,
        "site": config.model.site,
        "archs": list(dict.fromkeys(spec.architecture for spec in config.saes)),
        "width": gated[0].d_sae,
        "lambdas": " ".join(f"{spec.sparsity:g}" for spec in gated),
        "tokens": f"{config.train.n_tokens:_}",
        "batch": config.train.batch_size,
        "lr": f"{config.train.lr:g}",
        "data": config.data.source,
        "seed": config.seed,
        "device": config.device,
    }
    for key, value in values.items():
        st.session_state[key] = value


def form() -> None:
    """Draw the fields."""
    st.selectbox(
        "Start from",
        list(presets()),
        key="preset",
        on_change=fill,
        bind="query-params",
    )
    plain(f"{presets()[st.session_state['preset']].description}.", size=".875rem")
    if "model_name" not in st.session_state:
        fill()
    with st.container(border=True):
        st.markdown("**1 · Where to read**")
        one, two, three = st.columns([3, 2, 3])
        one.text_input(
            "Model",
            key="model_name",
            help="`bundled`, a local Hugging Face folder, or a name on the Hub.",
        )
        two.number_input("Layer", min_value=0, step=1, key="layer", help="Block number, from 0.")
        three.selectbox("Site", SITES, key="site", help="Where in the block activations are read.")
    with st.container(border=True):
        st.markdown("**2 · What to train**")
        one, two = st.columns([1, 1])
        one.multiselect(
            "Architectures",
            ARCHITECTURES,
            key="archs",
            wrap=True,
            format_func=lambda a: LOOKS[a].label,
        )
        two.number_input(
            "Width",
            min_value=1,
            step=256,
            key="width",
            help="Features of a Gated SAE; the baseline gets 1.5x as many, to even the compute.",
        )
        st.text_input(
            "λ",
            key="lambdas",
            help="One SAE of each architecture per value, separated by spaces; larger is sparser.",
        )
    with st.container(border=True):
        st.markdown("**3 · Data and budget**")
        one, two, three = st.columns(3)
        one.text_input(
            "Data",
            key="data",
            help="`stdlib` (Python's own source), a file or folder, or a data set on the Hub.",
        )
        two.text_input("Tokens", key="tokens", help="Activation vectors to train on.")
        three.number_input(
            "Batch size", min_value=1, step=256, key="batch", help="Activation vectors in a step."
        )
        one, two, three = st.columns(3)
        one.text_input("Learning rate", key="lr", help="Peak of Adam's learning rate.")
        two.number_input("Seed", min_value=0, step=1, key="seed")
        three.text_input(
            "Device",
            key="device",
            help="`auto` (CUDA, then Apple, then CPU), `cpu`, `cuda`, `cuda:1` or `mps`.",
        )


def chosen() -> Train:
    """Return the form as the command line's flags, leaving out what the preset says already.

    Raises:
        InputError: if a number cannot be read.
    """
    state = st.session_state
    name = state["preset"]
    base = presets()[name].config()
    gated = [spec for spec in base.saes if spec.architecture == "gated"] or list(base.saes)
    archs = tuple(state["archs"])
    if not archs:
        raise InputError("expected at least one architecture, got none; choose Gated, ReLU or both")
    lambdas = numbers(state["lambdas"], "λ")
    tokens, lr = whole(state["tokens"], "Tokens"), numbers(state["lr"], "Learning rate")
    if len(lr) != 1:
        raise InputError(f"Learning rate: expected one number, got {state['lr']!r}")

    def changed(value, default):
        return None if value == default else value

    return Train(
        preset=name,
        model=changed(state["model_name"].strip(), base.model.name),
        layer=changed(int(state["layer"]), presets()[name].layer),
        site=changed(state["site"], presets()[name].site),
        arch=() if archs == tuple(dict.fromkeys(s.architecture for s in base.saes)) else archs,
        width=changed(int(state["width"]), gated[0].d_sae),
        sparsity=() if lambdas == tuple(spec.sparsity for spec in gated) else lambdas,
        tokens=changed(tokens, base.train.n_tokens),
        batch_size=changed(int(state["batch"]), base.train.batch_size),
        lr=changed(lr[0], base.train.lr),
        data=changed(state["data"].strip(), base.data.source),
        seed=changed(int(state["seed"]), base.seed),
        device=changed(state["device"].strip(), base.device),
    )


def preflight(config: RunConfig) -> None:
    """Draw what the run takes and what there is."""
    here = machine(shell.runs_root())
    shape = model_shape(config.model.name)
    n_steps = config.train.n_tokens // config.train.batch_size
    rows = {
        "SAEs": f"{len(config.saes)}, trained together",
        "Steps": f"{n_steps:,} of {config.train.batch_size:,} tokens",
    }
    if shape is None:
        rows |= {"Memory and time": "known once the model is here; the run checks before it trains"}
        facts(rows)
        return
    d_in = shape.width(config.model.site)
    need = training_bytes(
        config, d_in, chunk_vectors=default_chunk_vectors(d_in, config.train.n_tokens)
    )
    speed = pace(measured(), n_cores=here.n_cores, has_gpu=bool(here.gpus))
    seconds = operations(config, shape) / speed.operations_per_second
    source = (
        "a rough guess: nothing was trained here yet"
        if speed.source is None
        else f"at the speed of run {speed.source}"
    )
    rows |= {
        "Activations": f"{d_in} wide, from {config.model.hook_name}",
        "Memory": f"about {readable(need)}; {readable(here.memory_free)} free",
        "Disk": f"about {readable(3 * state_bytes(config, d_in))}; {readable(here.disk_free)} free",
        "Time": f"about {duration(seconds)}, {source}",
    }
    facts(rows)
    if config.model.layer >= shape.n_layers:
        raise InputError(
            f"Layer: expected 0 to {shape.n_layers - 1}, got {config.model.layer}; "
            f"the model has {shape.n_layers} blocks"
        )
    if need > here.memory_free and not here.gpus:
        notice(
            "This is more memory than is free; lower the width, the batch size or the number of λ.",
            kind="warning",
        )


def measured() -> list[Measured]:
    """Return how long the newest runs took, for the estimate."""
    found = []
    for run in frame.runs[:5]:
        status = shell.status_of(run)
        rows = run.metrics()
        if status is not None and rows and status.n_steps:
            last = rows[-1]
            found.append(
                Measured(run.id, run.config, last["step"] / status.n_steps, last["seconds"])
            )
    return found


def begin(config: RunConfig) -> None:
    """Start the run and show it."""
    nonce = st.session_state.setdefault("nonce", secrets.token_hex(3))
    run = launch(shell.runs_root(), config, nonce=nonce)
    del st.session_state["nonce"]
    shell.go("pages/2_Live.py", run)


left, right = st.columns([3, 2], gap="large")
with left:
    form()
with right, st.container(border=True):
    st.subheader("Before it starts", anchor=False)
    try:
        flags = chosen()
        config = run_config(flags)
        preflight(config)
    except InputError as error:
        notice(in_labels(str(error), LABELS), title="This cannot start yet")
        st.button("Start", type="primary", disabled=True, width="stretch", key="start")
    else:
        if st.button(
            f"Start {count(config.train.n_tokens)} tokens",
            type="primary",
            icon=":material/play_arrow:",
            width="stretch",
            key="start",
        ):
            try:
                begin(config)
            except InputError as error:
                notice(str(error), title="Nothing was started")
        st.caption("The same run from a terminal:")
        st.code(command_line(flags), language="bash", wrap_lines=True)
