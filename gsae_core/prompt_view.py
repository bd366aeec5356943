"""Parts of the Prompt page: numbers of a text, its tokens, the features of one of them."""

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from gsae_core.inspect_parts import quoted, stacking
from gsae_core.pieces import SIGNS, marked
from gsae_core.prompt_reading import MEASURES, Chosen, Seen, chosen_row
from gsae_core.token_strip import token_strip
from gsae_core.wording import WORSE, fixed, marked_fvu, percent

if TYPE_CHECKING:
    from gsae_core.analysis.attribution import Candidate

MAX_ROWS = 200


def say_reading(seen: Seen) -> None:
    """Say how much text was read, and what of it was not."""
    prompt = seen.looks[0].prompt
    parts = [f"{len(prompt.tokens):,} tokens, read in {seen.seconds:.1f} s"]
    if prompt.n_left_out:
        parts.append(f"the last {prompt.n_left_out:,} had no room and are left out")
    if prompt.n_unknown:
        parts.append(
            f"{prompt.n_unknown:,} are unknown to this model's tokenizer, which lacks these words "
            "or this alphabet; use words it knows"
        )
    st.caption(" · ".join(parts))


def numbers(chosen: Chosen, seen: Seen) -> None:
    """Draw L0, ΔCE and FVU of this text for each SAE."""
    with stacking("prompt.numbers", least=20):
        spots = st.columns(max(len(seen.looks), 2), border=True)
    kinds = chosen.architectures()
    for spot, name, kind, look in zip(spots, chosen.names, kinds, seen.looks, strict=False):
        with spot:
            marked(kind, name)
            cells, found = st.columns(3), look.numbers
            cells[0].metric(
                "L0",
                fixed(found.l0, 1),
                help="Features that fire on a token of this text, on average.",
            )
            cells[1].metric(
                "ΔCE (nats)",
                fixed(found.delta_ce, 3),
                help=f"Loss a token that reading reconstructions adds on this text: from "
                f"{fixed(found.ce_clean)} to {fixed(found.ce_sae)}.",
            )
            cells[2].metric(
                "FVU",
                marked_fvu(found.fvu),
                help="Residual over total sum of squares about this text's own mean activation; "
                f"{WORSE} above 1, where that mean would do better.",
            )


def legend(chosen: Chosen, measure: str) -> None:
    """Say what the strip's shades mean."""
    kinds = chosen.architectures()
    ground = (
        '<span style="background:rgba(0,114,178,.5);border-radius:3px;padding:0 .5em">ground</span>'
    )
    line = '<span style="border-bottom:4px solid #D55E00">line</span>'
    parts = [f"{ground} {SIGNS[kinds[0]]} {html.escape(chosen.name)}"]
    if chosen.other:
        parts.append(f"{line} {SIGNS[kinds[1]]} {html.escape(chosen.other)}")
    about = html.escape(MEASURES[measure][1])
    st.html(
        '<div style="display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.875rem">'
        f"{''.join(f'<span>{part}</span>' for part in parts)}"
        f'<span style="opacity:.75">{about}; one scale for both</span></div>'
    )


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
    row = chosen_row(event, len(shown))
    return None if row is None else int(shown["latent"].iloc[row])


def on_every_token(seen: Seen, latent: int, *, at: int, which: int = 0) -> None:
    """Draw one feature's activation on every token of the text."""
    look = seen.looks[which]
    own: Any = look.features[look.features["latent"] == latent]
    values: Any = (
        own.set_index("position")["activation"].reindex(look.tokens["position"]).fillna(0.0)
    )
    top = float(values.max())
    strip = token_strip(look.prompt.tokens, values.tolist(), at=at, top=top)
    st.html(f'<div style="overflow-wrap:anywhere;line-height:1.9">{strip}</div>')
    st.caption(f"fires on {int((values > 0).sum())} of {len(values)} tokens, at most {top:.3g}")


def alignment_view(seen: Seen, chosen: Chosen, *, position: int) -> None:
    """Draw what both SAEs see of a token, and what only one does."""
    aligned = seen.alignment
    assert aligned is not None
    here: Any = aligned.table[aligned.table["position"] == position]
    names = _names(chosen)
    _bar({names[where]: int((here["where"] == where).sum()) for where in names})
    number = st.column_config.NumberColumn
    # An SAE's name stands once, above both of its columns: in each of their heads it was too wide.
    columns = {
        "where": ("", "fires in"),
        "gated": (chosen.name, "feature"),
        "gated_activation": (chosen.name, "f"),
        "baseline": (chosen.other, "feature"),
        "baseline_activation": (chosen.other, "f"),
        "cosine": ("", "cosine"),
    }
    shown = here.loc[:, list(columns)].replace({"where": names})
    shown.columns = pd.MultiIndex.from_tuples(list(columns.values()))
    formats = {
        "feature": number(format="%d"),
        "f": number(format="%.3g", help="Activation, in the activations' own units."),
        "cosine": number(format="%.3f", help="Of the two decoder directions."),
    }
    # Under two heads a column is known by its place; the index is 0. The type is of names alone.
    heads = enumerate((head for _, head in columns.values()), start=1)
    places: Any = {place: formats[head] for place, head in heads if head in formats}
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
        "Two features are the same where each is the other's best match by decoder cosine and the "
        f"cosine is at least {aligned.threshold:g}; an activation of 0: it does not fire here."
    )


BAR = ("#0072B2", "#009E73", "#D55E00")


def _names(chosen: Chosen) -> dict[str, str]:
    only = {"only gated": f"only {chosen.name}", "both": "both"}
    return only | {"only baseline": f"only {chosen.other}"}


def _bar(counts: Mapping[str, int]) -> None:
    whole = max(sum(counts.values()), 1)
    parts = "".join(
        f'<div style="width:{100 * n / whole:.2f}%;background:{colour}"></div>'
        for n, colour in zip(counts.values(), BAR, strict=True)
    )
    words = "".join(
        f'<span style="white-space:nowrap"><span style="display:inline-block;width:.7em;'
        f'height:.7em;border-radius:2px;background:{colour}"></span> {n} {html.escape(name)}</span>'
        for (name, n), colour in zip(counts.items(), BAR, strict=True)
    )
    st.html(
        '<div style="display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.875rem">'
        f'{words}</div><div style="display:flex;height:.7rem;border-radius:4px;overflow:hidden;'
        f'margin:.4rem 0">{parts}</div>'
    )
