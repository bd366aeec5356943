"""A sweep made after another: other architectures, other sparsities, what else it says kept."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gsae_core.config import Architecture, SAESpec
from gsae_core.errors import InputError
from gsae_core.validation import validated

# What the number that sets an architecture's sparsity counts: where two differ, one says nothing
# about the other.
WEIGHS: dict[Architecture, str] = {"gated": "L1", "relu": "L1", "jumprelu": "L0", "topk": "k"}


class Knob(NamedTuple):
    """What sets the sparsity of an architecture's SAEs."""

    flag: str
    """What the caller calls it."""

    values: tuple[float | int, ...]
    """A number for each SAE; none keeps those of the base."""


def resweep(
    base: tuple[SAESpec, ...],
    knobs: Mapping[Architecture, Knob],
    *,
    width: int | None,
    equal_width: bool,
    changes: Mapping[str, Any],
    called: Mapping[str, str],
) -> list[SAESpec]:
    """Return the base's SAEs of each architecture, or its first for each of the knob's values.

    An architecture the base lacks is made after those it has.

    Args:
        base: may be empty; then every knob has values and there is a width.
        knobs: of each architecture of the sweep, in its order.
        width: of all but ReLU SAEs, which are 1.5x as wide; None keeps the base's widths.
        equal_width: leaves the extra width of ReLU SAEs out.
        changes: settings of all SAEs.
        called: what the caller calls a setting.

    Raises:
        InputError: if a setting is wrong, or the base's sparsities mean another thing for an
            architecture whose knob has no values.
    """
    specs = []
    for architecture, knob in knobs.items():
        own = [spec.model_dump() for spec in base if spec.architecture == architecture]
        alike = own or [_turned(spec, architecture) for spec in base] or [{}]
        if knob.values:
            alike = [alike[0] | {"sparsity": value} for value in dict.fromkeys(knob.values)]
        elif "sparsity" not in alike[0]:
            theirs = " and ".join(dict.fromkeys(spec.architecture for spec in base))
            raise InputError(
                f"expected {knob.flag} for {architecture}, got none; what sets the sparsity of "
                f"{theirs} in the set-up means another thing there"
            )
        for fields in alike:
            fields = {**fields, "architecture": architecture, **changes}
            if width is not None:
                wider = architecture == "relu" and not equal_width
                fields["d_sae"] = width * 3 // 2 if wider else width
            if knob.values or not own:
                fields["name"] = f"{architecture}-{fields['sparsity']:g}"
            specs.append(validated(SAESpec, fields, {**called, "sparsity": knob.flag}))
    return specs


def _turned(spec: SAESpec, architecture: Architecture) -> dict[str, Any]:
    """Return a spec's settings for another architecture: as wide as that one is beside it."""
    fields = spec.model_dump()
    if architecture == "relu":
        fields["d_sae"] = spec.d_sae * 3 // 2
    elif spec.architecture == "relu":
        fields["d_sae"] = spec.d_sae * 2 // 3
    if WEIGHS[spec.architecture] != WEIGHS[architecture]:
        del fields["sparsity"]
    return fields
