"""Parts of the Prompt page: numbers of a text, its tokens, the features of one of them."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import streamlit as st

from gsae_core.analysis.features.export import Row, strips
from gsae_core.app import cache
from gsae_core.app.glossary import definition
from gsae_core.app.parts import PAGE_TEMPLATE, SIGNS, marked, overlap
from gsae_core.app.pickers import architecture, stacking, ticked_row
from gsae_core.runs.run import Run
from gsae_core.text import (
    STRONGEST,
    explained_variance,
    fixed,
    macros,
    marked_fvu,
    percent,
    quoted,
    visible,
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
    """A text through one or two SAEs of a run, which read the same place."""

    run: Run
    names: tuple[str, ...]
    text: str
    looks: "list[PromptAnalysis]"
    alignment: pd.DataFrame | None
    seconds: float
    """What reading it took, when it was read."""


@st.cache_resource(max_entries=16, show_spinner=False, hash_funcs={Run: cache.identity})
def read(run: Run, names: tuple[str, ...], text: str) -> Seen:
    """Return a text through SAEs of a run, from memory where it was read before."""
    began, place = time.perf_counter(), run.config.place_of(names[0])
    saes = [cache.sae(run, name) for name in names]
    prompt = cache.prompt(run, text)
    from gsae_core.analysis.prompt import align, analyse

    with cache.alone(run) as model:
        looks = analyse(model, saes, prompt, layer=place.layer, site=place.site)
    aligned = align(looks[0], looks[1], saes[0], saes[1]) if len(looks) == 2 else None
    return Seen(run, names, text, looks, aligned, time.perf_counter() - began)


# The likeliest of every token of a vocabulary, or a pass back through the model: a page that is
# opened again, or drawn anew for another choice, does not pay for them again.
BY_TEXT: Any = {Seen: lambda seen: (cache.identity(seen.run), seen.names, seen.text)}


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs=BY_TEXT)
def next_tokens(seen: Seen, position: int) -> "list[Candidate]":
    """Return what may follow a token: what does follow first, then the likeliest."""
    from gsae_core.analysis.prompt import candidates

    with cache.alone(seen.run) as model:
        return candidates(model, seen.looks[0].prompt, position=position)


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs=BY_TEXT)
def attributed(seen: Seen, *, position: int, token: int) -> list[pd.DataFrame]:
    """Return the features of each SAE with their effect on a next token, in logits."""
    from gsae_core.analysis.prompt import effects
    from gsae_core.lm.model import logit_slope

    place, ids = seen.run.config.place_of(seen.names[0]), seen.looks[0].prompt.ids
    where: dict[str, Any] = place._asdict() | {"position": position}
    with cache.alone(seen.run) as model:
        slope = logit_slope(model, ids, token=token, **where)
    saes = [cache.sae(seen.run, name) for name in seen.names]
    return [effects(look, sae, slope) for look, sae in zip(seen.looks, saes, strict=True)]


def cells(seen: Seen, tables: Sequence[pd.DataFrame], measure: str) -> list[dict[str, Any]]:
    """Return the strip: the first SAE's measure as shading, the second's as an underline.

    Of each token its `text`, what hovering says as `about`, the opacity of its shading and of the
    line under it as `shade` and `below`, and whether it is `special`: no SAE is trained on it.
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
        found.append(
            {
                # A line ends where the text's does, and the sign for it stays in sight.
                "text": visible(token).replace("↵", "↵\n"),
                "about": about,
                "shade": round(STRONGEST * shares[0], 3),
                "below": round(shares[-1], 3),
                "special": not counted,
            }
        )
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
    here: Any = table[table["position"] == position]
    here = here.sort_values(SORTS[sort], key=abs, ascending=False, kind="stable")
    return here.reset_index(drop=True)


def say_reading(seen: Seen) -> None:
    """Say how much text was read, and what of it was not."""
    prompt = seen.looks[0].prompt
    parts = [f"{len(prompt.tokens):,} tokens, read in {seen.seconds:.1f} s"]
    if prompt.n_left_out:
        parts.append(f"the last {prompt.n_left_out:,} do not fit in the context and are left out")
    if prompt.n_unknown:
        parts.append(f"{prompt.n_unknown:,} are unknown to this model's tokenizer; use other words")
    st.caption(" · ".join(parts))


def numbers(seen: Seen) -> None:
    """Draw L0, ΔCE and FVU of this text for each SAE."""
    with stacking("prompt.numbers", least=20):
        spots = st.columns(max(len(seen.looks), 2), border=True)
    for spot, name, look in zip(spots, seen.names, seen.looks, strict=False):
        with spot:
            marked(architecture(seen.run, name), name)
            cells, found = st.columns(3), look.numbers
            cells[0].metric("L0", fixed(found.l0, 1), help=definition("l0"))
            loss = f"From {fixed(found.ce_clean)} to {fixed(found.ce_sae)} on this text."
            about = f"{loss}\n\n{definition('delta_ce')}"
            cells[1].metric("ΔCE (nats)", fixed(found.delta_ce, 3), help=about)
            explained = percent(explained_variance(found.fvu), 2)
            about = f"Explained variance {explained} on this text.\n\n{definition('fvu')}"
            cells[2].metric("FVU", marked_fvu(found.fvu), help=about)


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
    about_gate = "The gate's pre-activation; it fires above 0."
    event = st.dataframe(
        rows.assign(share=100 * rows["share"]),
        hide_index=True,
        key=key,
        on_select="rerun",
        selection_mode="single-row",
        column_order=["latent", "activation", *(["gate"] if gated else []), "share", "effect"],
        column_config={
            "latent": number("feature", format="%d"),
            "activation": number(format="%.3g", help="f, in the activations' own units."),
            "gate": number("gate π", format="%.3g", help=about_gate),
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
    row = ticked_row(event, len(rows))
    return None if row is None else int(rows["latent"].iloc[row])


def on_every_token(seen: Seen, latent: int, *, at: int) -> None:
    """Draw the activation of one of the first SAE's features on every token of the text."""
    look = seen.looks[0]
    values: Any = look.features[look.features["latent"] == latent].set_index("position")
    values = values["activation"].reindex(look.tokens["position"]).fillna(0.0)
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
    overlap({whose: int((here["where"] == where).sum()) for where, whose in names.items()})
    number = st.column_config.NumberColumn
    f = number("f", format="%.3g", help="Activation, in the activations' own units.")
    columns: Any = {
        "where": "fires in",
        "gated": number(name, format="%d", help="Its feature."),
        "gated_activation": f,
        "baseline": number(other, format="%d", help="Its feature."),
        "baseline_activation": f,
        "cosine": number(format="%.3f", help="Of the two decoder directions."),
    }
    st.dataframe(
        here.replace({"where": names}),
        hide_index=True,
        key="prompt.aligned",
        placeholder="–",
        column_order=list(columns),
        column_config=columns,
        alt="Features of the token in both SAEs, or in one alone",
    )
    st.caption(
        "Two features match where each is the other's best match by decoder cosine and the cosine "
        f"is at least {MATCHED:g}. Activation 0: it does not fire here."
    )
