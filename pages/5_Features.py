"""Features: one at a time, where it fires, how its gate decides, its logit effects."""

import streamlit as st

from gsae_core.analysis.features.feature import Feature
from gsae_core.analysis.features.filter import Chosen
from gsae_core.analysis.features.index import FeatureIndex
from gsae_core.app import feature_list, feature_view, shell
from gsae_core.app.feature_index import Opened, open_index, open_sae, panel, weights_of
from gsae_core.app.parts import notice, noticed, plain, say_refused
from gsae_core.app.pickers import need_saes, pick_pair, stacking
from gsae_core.errors import InputError
from gsae_core.runs.run import Run

frame = shell.page(
    "Features",
    icon="🔎",
    purpose="What each feature means: where it fires, how its gate decides, what it makes likely.",
)


@noticed()
def choose() -> tuple[Run, Opened, str | None]:
    """Draw the pickers; return the SAE that is shown, and the name of the one beside it."""
    run, names = need_saes(frame, "its features")
    name, base = pick_pair(run, names, page="features")
    return run, open_sae(run, name), base


def other_index(run: Run, base: str | None) -> FeatureIndex | None:
    """Return the index of the SAE beside; None without one that can be read."""
    try:
        return None if base is None else open_index(run, base)
    except InputError:
        return None  # its own page says why


def ask(sae: Opened) -> tuple[Chosen, int]:
    """Draw the filters; return what they leave, and the feature that is shown."""
    wanted, order = feature_list.ask(sae.unit)
    chosen = feature_list.find(sae, wanted, order)
    if chosen.rows.empty:
        feature_list.nothing_left(sae, chosen)
    with right:
        return chosen, feature_view.which(sae, feature_list.landing(sae, chosen))


def one_feature(sae: Opened, chosen: Chosen, other: FeatureIndex | None, base: str | None) -> None:
    """Draw the feature that is chosen."""
    say_refused()
    number = feature_view.navigation(sae, chosen)
    if st.session_state.pop("features.list_is_old", False):
        st.rerun()
    if sae.index is None:
        st.header(f"Feature {number}", anchor=False)
        feature_view.from_weights(sae, weights_of(sae.run, sae.name).iloc[number].to_dict())
        return
    feature = sae.index.feature(number)
    feature_view.said(feature)
    if feature.is_dead:
        dead(sae, feature)
    else:
        alive(sae, feature, other, base)
    feature_view.take_along(sae, feature)


def dead(sae: Opened, feature: Feature) -> None:
    """Draw a feature that never fired: its weights, what it nearly fired on, who is near."""
    text = f"It did not fire in {feature.index.n_tokens:,} {feature.index.manifest.unit}s."
    notice(text, kind="info", title=f"Feature {feature.number} is dead")
    feature_view.from_weights(sae, feature.stats)
    feature_view.similar(sae, feature, alive_only=True)
    if len(feature.near_misses[0]):
        st.subheader("Where it came nearest to firing", anchor=False)
        feature_view.just_missed(feature)


def alive(sae: Opened, feature: Feature, other: FeatureIndex | None, base: str | None) -> None:
    """Draw all there is to a feature that fires."""
    feature_view.summary(feature)
    feature_view.numbers(feature)
    pictures = st.container()
    st.subheader("Where it fires", anchor=False)
    found, problem = feature_view.match(feature, other)
    like = found.feature if found is not None else None
    feature_view.examples(feature, like, name=sae.name, beside=base or "")
    st.subheader("Logit effects", anchor=False)
    feature_view.logits(feature, sae.run)
    feature_view.relations(sae, feature, found, base=base, problem=problem)
    with pictures:
        feature_view.pictures(feature, frame.theme)


run, sae, base = choose()
other = other_index(run, base)
if sae.index is None:
    missing = [sae.name] if base is None or other is not None else [sae.name, base]
    panel(run, missing, problem=sae.problem)
st.session_state.pop("features.list_is_old", None)  # it is drawn anew
with stacking("features.split", least=19):
    left, right = st.columns([1, 1.75], gap="medium")
with left:
    picture = st.container()
    chosen, current = ask(sae)
    listed = st.container()
if sae.index is not None:
    manifest = sae.index.manifest
    plain(f"Read from {manifest.amount(f' of {manifest.text}')}.", size=".8125rem")
with right:
    st.fragment(one_feature)(sae, chosen, other, base)
# Tables and charts come last, as on Live: a browser that has them draws them before the rest.
with listed:
    if not chosen.rows.empty:
        feature_list.table(sae, chosen, current=current)
with picture:
    feature_list.density_chart(sae, chosen, frame.theme)
