"""Parts of the Prompt page: numbers of a text, its tokens, the features of one of them."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import streamlit as st

from gsae_core.analysis.features.export import Row, strips
from gsae_core.app import cache
from gsae_core.app.components import Cell
from gsae_core.app.parts import OVERLAP, PAGE_TEMPLATE, SIGNS, marked
from gsae_core.app.pickers import architecture, stacking, ticked_row
from gsae_core.runs.run import Run
from gsae_core.text import (
    STRONGEST,
    WORSE,
    explained_variance,
    fixed,
    macros,
    marked_fvu,
    percent,
    quoted,
)

if TYPE_CHECKING:
    from gsae_core.analysis.prompt import Candidate, PromptAnalysis

MEASURES = {
    "active features": ("n_active", "features that fire on the token"),
    "strongest": ("strongest", "the largest activation on the token"),
    "loss added": ("added", "increase of the token's loss with reconstructions, in nats"),
    "attribution": ("effect", "summed effect of the token's features on the chosen next token"),
}
"""What the strip can be shaded by: column, and definition."""

SORTS = {"activation": "activation", "share": "share", "attribution": "effect"}


class Seen(NamedTuple):
    """A text through one or two SAEs of a run."""

    run: Run
    names: tuple[str, ...]
    looks: "list[PromptAnalysis]"
    alignment: pd.DataFrame | None
    seconds: float
    """What reading it took, when it was read."""
    key: tuple[Any, ...]
    """Says which text, model and weights."""


def read(run: Run, names: tuple[str, ...], text: str) -> Seen:
    """Return a text through SAEs of a run, from memory where it was read before."""
    hook, bos = run.config.model, run.config.data.bos
    key = (cache.identity(run, names), bos, text, hook.layer, hook.site)
    return _read(key, names, text, _run=run)


# The key says which model and weights; arguments with an underscore are no part of it.
@st.cache_resource(max_entries=16, show_spinner=False)
def _read(key: tuple[Any, ...], names: tuple[str, ...], text: str, _run: Run) -> Seen:
    began = time.perf_counter()
    (model, lock), hook = cache.language_model(_run), _run.config.model
    saes = [cache.sae(_run, name) for name in names]
    prompt = cache.prompt(_run, text)
    from gsae_core.analysis.prompt import align, analyse

    with lock.held():
        looks = analyse(model, saes, prompt, layer=hook.layer, site=hook.site)
    aligned = align(looks[0], looks[1], saes[0], saes[1]) if len(looks) == 2 else None
    return Seen(_run, names, looks, aligned, time.perf_counter() - began, key)


# The likeliest of every token of a vocabulary, or a pass back through the model: a page that is
# opened again, or drawn anew for another choice, does not pay for them again.
BY_TEXT: Any = {Seen: lambda seen: seen.key}


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs=BY_TEXT)
def next_tokens(seen: Seen, position: int) -> "list[Candidate]":
    """Return what may follow a token: what does follow first, then the likeliest."""
    from gsae_core.analysis.prompt import candidates

    model, lock = cache.language_model(seen.run)
    with lock.held():
        return candidates(model, seen.looks[0].prompt, position=position)


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs=BY_TEXT)
def attributed(seen: Seen, *, position: int, token: int) -> list[pd.DataFrame]:
    """Return the features of each SAE with their effect on a next token, in logits."""
    from gsae_core.analysis.prompt import effects
    from gsae_core.lm.model import logit_slope

    (model, lock), hook = cache.language_model(seen.run), seen.run.config.model
    where: dict[str, Any] = {"layer": hook.layer, "site": hook.site, "position": position}
    with lock.held():
        slope = logit_slope(model, seen.looks[0].prompt.ids, token=token, **where)
    saes = [cache.sae(seen.run, name) for name in seen.names]
    return [effects(look, sae, slope) for look, sae in zip(seen.looks, saes, strict=True)]


def cells(seen: Seen, tables: Sequence[pd.DataFrame], measure: str) -> list[Cell]:
    """Return the strip: the first SAE's measure as shading, the second's as an underline.

    Both are on one scale, so that equal shades are equal numbers.
    """
    values = [
        _measured(look, table, measure) for look, table in zip(seen.looks, tables, strict=True)
    ]
    top = max(float(column.abs().max()) for column in values)
    top = top if top > 0 else 1.0
    prompt, found = seen.looks[0].prompt, []
    digits = 0 if measure == "active features" else 3
    for token, counted, *here in zip(prompt.tokens, prompt.counted.tolist(), *values, strict=True):
        shares = [min(abs(value) / top, 1.0) if value == value else 0.0 for value in here]
        named = zip(seen.names, here, strict=True)
        lines = [measure, *(f"{name}: {fixed(value, digits)}" for name, value in named)]
        about = "\n".join(lines) if counted else "special token: not read by the SAE"
        if not token:
            about += "\n∅: the rest of the character before it"
        below = shares[1] if len(shares) > 1 else 0.0
        found.append(Cell(token, about, STRONGEST * shares[0], below, not counted))
    return found


def _measured(look: "PromptAnalysis", table: pd.DataFrame, measure: str) -> Any:
    column = MEASURES[measure][0]
    tokens = look.tokens
    if column == "added":
        return tokens["loss_sae"] - tokens["loss"]
    if column == "effect":
        sums: Any = table.groupby("position")["effect"].sum()
        return sums.reindex(tokens["position"], fill_value=0.0).reset_index(drop=True)
    return tokens[column].astype(float)


def feature_rows(table: pd.DataFrame, *, position: int, sort: str) -> pd.DataFrame:
    """Return the features of a token, the strongest by `sort` first, either sign."""
    column = SORTS[sort]
    here: Any = table[table["position"] == position]
    order = here[column].abs().sort_values(ascending=False, kind="stable").index
    return here.loc[order, ["latent", "activation", "gate", "share", "effect"]].reset_index(
        drop=True
    )


MAX_ROWS = 200


def say_reading(seen: Seen) -> None:
    """Say how much text was read, and what of it was not."""
    prompt = seen.looks[0].prompt
    parts = [f"{len(prompt.tokens):,} tokens, read in {seen.seconds:.1f} s"]
    if prompt.n_left_out:
        parts.append(f"the last {prompt.n_left_out:,} do not fit in the context and are left out")
    if prompt.n_unknown:
        parts.append(
            f"{prompt.n_unknown:,} are unknown to this model's tokenizer, which lacks these words "
            "or this alphabet; use words it knows"
        )
    st.caption(" · ".join(parts))


def numbers(seen: Seen) -> None:
    """Draw L0, ΔCE and FVU of this text for each SAE."""
    with stacking("prompt.numbers", least=20):
        spots = st.columns(max(len(seen.looks), 2), border=True)
    for spot, name, look in zip(spots, seen.names, seen.looks, strict=False):
        with spot:
            marked(architecture(seen.run, name), name)
            cells, found = st.columns(3), look.numbers
            cells[0].metric(
                "L0",
                fixed(found.l0, 1),
                help="Features that fire on a token of this text, on average.",
            )
            cells[1].metric(
                "ΔCE (nats)",
                fixed(found.delta_ce, 3),
                help="Increase of the loss per token on this text when the model reads "
                f"reconstructions: from {fixed(found.ce_clean)} to {fixed(found.ce_sae)}.",
            )
            cells[2].metric(
                "FVU",
                marked_fvu(found.fvu),
                help="Residual over total sum of squares about this text's mean activation; "
                f"explained variance {percent(explained_variance(found.fvu), 2)}. {WORSE}: above "
                "1, where the mean would do better.",
            )


def legend(seen: Seen, measure: str) -> None:
    """Say which SAE the strip's shading and which its underline is."""
    saes = [(SIGNS[architecture(seen.run, name)], name) for name in seen.names]
    about = f"{MEASURES[measure][1]}{'; same scale for both' if len(saes) > 1 else ''}"
    st.html(macros(PAGE_TEMPLATE).strip_legend(saes, about))


def label_of(candidate: "Candidate") -> str:
    """Return a next token as it stands in a list."""
    follows = " · follows here" if candidate.actual else ""
    return f"{quoted(candidate.text)}  {percent(candidate.probability, 2)}{follows}"


def features_table(rows: pd.DataFrame, *, gated: bool, target: str, key: str) -> int | None:
    """Draw the features of a token; return the one whose row is ticked."""
    number = st.column_config.NumberColumn
    shown = rows.head(MAX_ROWS)
    event = st.dataframe(
        shown.assign(share=100 * shown["share"]),
        hide_index=True,
        height=min(38 + 35 * max(len(shown), 1), 430),
        key=key,
        on_select="rerun",
        selection_mode="single-row",
        column_order=["latent", "activation", *(["gate"] if gated else []), "share", "effect"],
        column_config={
            "latent": number("feature", format="%d"),
            "activation": number(format="%.3g", help="f, in the activations' own units."),
            "gate": number(
                "gate π", format="%.3g", help="The gate's pre-activation; it fires above 0."
            ),
            "share": number(
                format="%.1f %%",
                help="Share of the token's reconstruction: f <d, x̂ - b> / |x̂ - b|². A token's "
                "shares add up to 100 %; one that works against the others is negative.",
            ),
            "effect": number(
                "attribution",
                format="%+.3f",
                help=f"f <d, ∂ logit({target}) / ∂x>: what the feature does to this next token's "
                "logit, to first order at the model's own activations, through all later blocks, "
                "the final norm and the unembedding.",
            ),
        },
        alt="Features that fire on the token: number, activation, gate, share and attribution to "
        f"{target}",
    )
    row = ticked_row(event, len(shown))
    return None if row is None else int(shown["latent"].iloc[row])


def on_every_token(seen: Seen, latent: int, *, at: int) -> None:
    """Draw the activation of one of the first SAE's features on every token of the text."""
    look = seen.looks[0]
    own: Any = look.features[look.features["latent"] == latent]
    values: Any = (
        own.set_index("position")["activation"].reindex(look.tokens["position"]).fillna(0.0)
    )
    top = float(values.max())
    row = Row(look.prompt.tokens, values.tolist(), at, f"{values.iloc[at]:.3g}")
    st.html(strips([row], top=top))
    st.caption(f"fires on {int((values > 0).sum())} of {len(values)} tokens, at most {top:.3g}")


def alignment_view(seen: Seen, *, position: int) -> None:
    """Draw what both SAEs see of a token, and what only one does."""
    from gsae_core.analysis.prompt import MATCHED

    aligned, (name, other) = seen.alignment, seen.names
    assert aligned is not None
    here: Any = aligned[aligned["position"] == position]
    names = {"only gated": f"only {name}", "both": "both", "only baseline": f"only {other}"}
    counts = [int((here["where"] == where).sum()) for where in names]
    named = zip(OVERLAP, counts, names.values(), strict=True)
    shares = [(colour, n, f"{n} {where}") for colour, n, where in named]
    st.html(macros(PAGE_TEMPLATE).swatches(shares))
    st.html(macros(PAGE_TEMPLATE).shares(shares))
    number = st.column_config.NumberColumn
    # An SAE's name stands once, above both of its columns: in each of their heads it was too wide.
    columns = {
        "where": ("", "fires in"),
        "gated": (name, "feature"),
        "gated_activation": (name, "f"),
        "baseline": (other, "feature"),
        "baseline_activation": (other, "f"),
        "cosine": ("", "cosine"),
    }
    shown = here.loc[:, list(columns)].replace({"where": names})
    shown.columns = pd.MultiIndex.from_tuples(list(columns.values()))
    feature = number(format="%d")
    f = number(format="%.3g", help="Activation, in the activations' own units.")
    cosine = number(format="%.3f", help="Of the two decoder directions.")
    # Under two heads a column is known by its place; the index is 0. The type is of names alone.
    places: Any = {2: feature, 3: f, 4: feature, 5: f, 6: cosine}
    st.dataframe(
        shown,
        hide_index=True,
        height=min(38 + 38 + 35 * max(len(here), 1), 430),
        key="prompt.aligned",
        placeholder="–",
        column_config=places,
        alt="Features of the token in both SAEs, or in one alone",
    )
    st.caption(
        "Two features match where each is the other's best match by decoder cosine and the cosine "
        f"is at least {MATCHED:g}. Activation 0: it does not fire here."
    )
