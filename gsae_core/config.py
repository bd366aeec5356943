"""What a run is: frozen, validated, a JSON round trip, and the same text as `--help`."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from gsae_core.errors import InputError
from gsae_core.files import read_json


class Config(BaseModel):
    """Base of every config: unknown keys are errors, nothing is written back."""

    # Not as class arguments: type checkers would want `frozen` repeated by every config.
    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


ConfigKind = TypeVar("ConfigKind", bound=Config)


def given(**fields: Any) -> dict[str, Any]:
    """Return the fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def validated(
    kind: type[ConfigKind], fields: dict[str, Any], called: Mapping[str, str] | None = None
) -> ConfigKind:
    """Return `kind(**fields)`; an InputError names the first wrong field as it is `called`.

    `called` says what the caller calls a field, where that is not its name: a flag, a label.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or kind.__name__
        where = (called or {}).get(where, where)
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise InputError(f"{where}: no such setting; {kind.__name__} has {known}") from None
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        message = re.sub("^expected (greater|less)", r"expected a number \1", message)
        came = "" if isinstance(first["input"], dict | Config) else f", got {first['input']!r}"
        raise InputError(f"{where}: {message[0].lower()}{message[1:]}{came}") from None


Architecture = Literal["gated", "relu", "jumprelu", "topk"]
Site = Literal["resid_pre", "resid_post", "mlp_hidden", "mlp_out", "attn_z", "attn_out"]
Recipe = Literal["P", "A", "B"]
Tie = Literal["r_mag", "none", "untied"]
Aux = Literal["frozen", "unfrozen", "off"]
LossNorm = Literal["sum", "mean", "mean_power"]
Positions = Literal["counted", "all"]
"""Of a sequence: those that count, which hold no BOS, separator or padding, or every one."""
IF_SAID = Field(exclude_if=lambda said: said is None or said == ())
"""Of a key that files have only where there is something to say."""
Loss = Literal["mse", "kl"]
"""Squared error, or with it what the language model predicts from reconstructions."""
Start = Literal["zero", "sparse", "sparse_median"]
Tracker = Literal["trackio", "wandb", "tensorboard"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OUTLIER_RATIO = 10.0
"""Activations longer than so many medians are outliers: counted, and never what sets a scale."""

NO_MODEL = "no model"
"""Name of the language model of vectors from elsewhere, of which none is known."""

ARCHITECTURES: tuple[Architecture, ...] = ("gated", "relu", "jumprelu", "topk")
SITES: tuple[Site, ...] = ("resid_pre", "resid_post", "mlp_hidden", "mlp_out", "attn_z", "attn_out")


class Place(NamedTuple):
    """A layer, from 0, and a site of it; `NO_PLACE` of vectors from elsewhere."""

    layer: int
    site: Site

    @property
    def hook_name(self) -> str:
        """Its TransformerLens name, e.g. `blocks.2.hook_resid_post`; `vectors` where it is none."""
        return "vectors" if self == NO_PLACE else hook_name(*self)


NO_PLACE = Place(-1, "resid_post")


def hook_name(layer: int, site: Site) -> str:
    """Return TransformerLens' name of a site."""
    inner = {"mlp_hidden": "mlp.hook_post", "attn_z": "attn.hook_z"}.get(site, f"hook_{site}")
    return f"blocks.{layer}.{inner}"


class ModelConfig(Config):
    """The language model and the place in it whose activations the SAEs learn."""

    name: str = "bundled"
    """`bundled`, a local Hugging Face folder, a name on the Hub, or one like `gelu-1l`."""

    revision: str | None = None
    """Branch, tag or commit on the Hub; None takes the default branch."""

    layer: NonNegativeInt = 2
    """Block number, from 0."""

    site: Site = "resid_post"
    """Place in the block; `attn_z` is the heads concatenated, before W_O."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the language model; activations reach the SAEs as float32."""

    @property
    def place(self) -> Place:
        """The layer and site; `NO_PLACE` of vectors from elsewhere."""
        return NO_PLACE if self.name == NO_MODEL else Place(self.layer, self.site)

    @property
    def hook_name(self) -> str:
        """TransformerLens' name of the place, as `Place` has it."""
        return self.place.hook_name


class DataConfig(Config):
    """The text, and how it becomes token sequences of one length."""

    source: str = "stdlib"
    """`stdlib`, a file or folder, or the name of a data set on the Hub (streamed)."""

    text_column: str | None = None
    """Column that holds the text; None takes token ids (`input_ids`, `tokens`), `text`, `content`,
    or else, if it reads like text, the only column of strings."""

    split: str = "train"
    """Split of a data set: on the Hub, in a `save_to_disk` folder, or as a folder's names tell
    (`train/`, `data/test-00000-of-00001.parquet`, README.md); `all` reads every one."""

    chat: bool = False
    """Read chats (`messages` with role and content, `conversations` with from and value, or the
    text column) as the tokenizer's chat template writes them. What it puts in counts like other
    text, but for BOS, EOS and padding."""

    separator: str | None = None
    """A line that ends a document of plain text; `none` takes none. None takes `<|endoftext|>` and
    the tokenizer's own end of text, in `.txt` files."""

    n_ctx: PositiveInt | None = None
    """Context length in tokens, BOS included; None takes the model's, at most 256."""

    bos: Literal["auto", "always", "never"] = "auto"
    """Whether a sequence starts with BOS; `auto` does so when the tokenizer has one."""

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the sequences kept for evaluation, cut before anything else."""

    reading: Literal[1, 2] = 2
    """How text is read: 2 since 0.2.0. 1, which a config file without it means, keeps padding in
    rows of token ids, and no line of a `.txt` file ends a document; so an earlier run goes on."""

    @field_validator("source")
    @classmethod
    def _source_can_be_written_down(cls, source: str) -> str:
        if any("\ud800" <= character <= "\udfff" for character in source):
            raise ValueError(
                "expected a name in UTF-8: rename it, or name the folder that it is in"
            )
        return source

    @field_validator("separator")
    @classmethod
    def _separator_is_a_line(cls, separator: str | None) -> str | None:
        if separator is not None and not re.fullmatch(r"[^\r\n]+", separator):
            raise ValueError("expected one line of text, or none where no line ends a document")
        return separator

    def context_length(self, model_n_ctx: int) -> int:
        """Return the tokens of a sequence, BOS included, for a model that takes `model_n_ctx`."""
        return self.n_ctx or min(model_n_ctx, 256)

    @property
    def named(self) -> str:
        """What the text is called beside numbers: its source, and its split if that is another."""
        return self.source if self.split == "train" else f"{self.source}, split {self.split}"


# What holds for another text too: columns, splits and chats are each text's own.
OF_ANY_TEXT = ("n_ctx", "bos", "held_out")


class SAESpec(Config):
    """One SAE of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Folder name inside the run."""

    architecture: Architecture
    """`gated` (Eq. 6-8), `relu` (the L1 baseline), `jumprelu` (arXiv:2407.14435) or `topk`
    (arXiv:2406.04093)."""

    d_sae: PositiveInt
    """Number of latents."""

    sparsity: Annotated[
        PositiveFloat, WrapValidator(lambda v, positive: math.nan if v is None else positive(v))
    ]
    """lambda, against squared error normalised as `loss_norm` says, in training units: it weighs
    the sum of latents (L1), for `jumprelu` their number (L0). For `topk` it is k, that number.
    NaN, null in JSON, where an imported SAE's files do not say."""

    loss_norm: LossNorm = "sum"
    """Squared error summed over d_in (Eq. 8), over d_in, or over d_in E|x|^2 (paper D.1)."""

    lr: PositiveFloat | None = None
    """Peak learning rate of this SAE; None takes the run's."""

    recipe: Recipe = "P"
    """P: unit norm, plain L1, frozen auxiliary decoder (the paper). A: L1 weighted by decoder norm,
    unfrozen. B: L1 weighted by the detached norm, frozen."""

    tie: Tie = "r_mag"
    """W_mag = exp(r_mag) W_gate (the paper), W_mag = W_gate, or a free W_mag."""

    aux: Aux | None = None
    """Decoder of the auxiliary term: a frozen copy, the live one, or no such term; None takes the
    recipe's. P with `unfrozen` is the paper's ablation (Fig. 8)."""

    detach_b_dec: bool = False
    """Keep the sparsity and auxiliary terms from moving b_dec through the centred input."""

    init_threshold: PositiveFloat = 0.1
    """Threshold of every latent of a JumpReLU SAE at the start, in units of `threshold_unit`."""

    bandwidth: PositiveFloat = 0.1
    """Width of the window around a JumpReLU threshold in which it learns, in units of
    `threshold_unit`."""

    threshold_unit: PositiveFloat | None = None
    """What a JumpReLU SAE's initial threshold and bandwidth are multiples of, in training units;
    None takes the activations' length, sqrt(E|x|^2), as training begins."""

    k_aux: PositiveInt | None = None
    """Dead latents that a TopK SAE's auxiliary loss listens to; None takes d_in / 2."""

    seed: NonNegativeInt = 0
    """Seed of the initial weights."""

    layer: NonNegativeInt | None = None
    """Block whose activations this SAE reads, from 0; None takes the run's."""

    site: Site | None = None
    """Place in that block; None takes the run's."""

    start: Annotated[str | None, IF_SAID, Field(pattern="^start/[^/]+$")] = None
    """Folder inside the run with the weights to start from, in raw units; None: random ones."""

    @field_validator("sparsity")
    @classmethod
    def _k_is_a_number_of_latents(cls, sparsity: float, info: Any) -> float:
        if info.data.get("architecture") == "topk":
            if sparsity != int(sparsity):
                raise ValueError("expected a whole number of latents, the k of a TopK SAE")
            if sparsity > (d_sae := info.data.get("d_sae", math.inf)):
                raise ValueError(f"expected a k of at most d_sae={d_sae}")
        return sparsity


class Schedule(NamedTuple):
    """What a recipe leaves to the length of the run, in steps; fields as in `TrainRecipe`."""

    lr_warmup_steps: int
    sparsity_warmup_steps: int
    revive_every: int
    revive_window: int


class Stage(NamedTuple):
    """A stretch of training with a schedule of its own."""

    first: int
    """Steps before it."""
    recipe: "TrainRecipe"
    """How SAEs learn in it, as if it were all."""


class TrainRecipe(Config):
    """How SAEs learn. Batch sizes are activation vectors, and tokens are counted after masking."""

    n_tokens: PositiveInt
    """Activation vectors to train on, BOS and padding left out; whole batches, rounded down."""

    batch_size: PositiveInt = 4096
    """Activation vectors in a step."""

    lr: PositiveFloat = 3e-4
    """Peak Adam learning rate, held after warm-up; of JumpReLU thresholds 1 over the number of
    steps, where that is more."""

    threshold_lr: Annotated[PositiveFloat | None, IF_SAID] = None
    """Peak learning rate of JumpReLU thresholds; None takes what `lr` says."""

    beta1: Fraction = 0.0
    """Adam's first-moment decay; the paper's value is 0."""

    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Adam's second-moment decay."""

    lr_warmup_steps: NonNegativeInt | None = None
    """Cosine from 0.1x to 1x over so many steps, at the start and after each revival; None takes
    5 % of the steps, at most 1000."""

    lr_decay_fraction: Fraction = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""

    sparsity_warmup_steps: NonNegativeInt | None = None
    """Steps over which lambda rises linearly from 0; None takes 5 % of the steps, at most 5000."""

    revive_every: NonNegativeInt | None = None
    """Steps between revivals of dead latents; 0 never revives; None takes 20 % of the steps, at
    most 25 000."""

    revive_window: PositiveInt | None = None
    """A latent that did not fire in so many steps before a revival is dead; None takes half of the
    steps between revivals, or where there are none 10 % of the steps, at most 12 500."""

    revive_until: Annotated[float, Field(ge=0, le=1)] = 0.7
    """No revival after this share of the steps, so that what is revived can still learn."""

    start: Annotated[Start, Field(exclude_if=lambda start: start == "zero")] = "zero"
    """Biases of new and revived latents: 0 (`zero`), or such that 64 latents fire on a token
    (`sparse`, `sparse_median`). b_dec begins at 0, at the mean of the activations, or at their
    geometric median."""

    screened: bool = False
    """Find open gates by a bfloat16 product and decide in float32: the same gates, up to twice the
    speed on a CPU with bfloat16 units; slower on one without."""

    extended: Annotated[tuple[PositiveInt, ...], IF_SAID] = ()
    """`n_tokens` that training had before each time it was extended: warm-up, decay and revivals
    begin anew after so many, lambda stays as it is."""

    @property
    def n_steps(self) -> int:
        """Whole batches in `n_tokens`."""
        return self.n_tokens // self.batch_size

    @property
    def stages(self) -> tuple["Stage", ...]:
        """The stretches that training was extended by, in order; one where it never was."""
        if not self.extended:
            return (Stage(0, self),)
        ends = [*(tokens // self.batch_size for tokens in self.extended), self.n_steps]
        stages = []
        for first, end in zip([0, *ends], ends, strict=False):
            alone: dict[str, Any] = {"n_tokens": (end - first) * self.batch_size, "extended": ()}
            if first:
                alone["sparsity_warmup_steps"] = 0
            stages.append(Stage(first, self.model_copy(update=alone)))
        return tuple(stages)

    def stage(self, step: int) -> "Stage":
        """Return the stretch that a step, from 0, lies in."""
        return next(each for each in reversed(self.stages) if each.first <= max(step, 0))

    @property
    def schedule(self) -> Schedule:
        """The settings that may be left to the length of the run, as numbers."""
        n = self.n_steps
        every = _unless_none(self.revive_every, min(25_000, n // 5))
        window = every // 2 if every else min(12_500, n // 10)
        return Schedule(
            lr_warmup_steps=_unless_none(self.lr_warmup_steps, min(1000, n // 20)),
            sparsity_warmup_steps=_unless_none(self.sparsity_warmup_steps, min(5000, n // 20)),
            revive_every=every,
            revive_window=_unless_none(self.revive_window, max(1, window)),
        )


def _unless_none(number: int | None, otherwise: int) -> int:
    return otherwise if number is None else number


def shortfalls(recipe: TrainRecipe) -> list[str]:
    """Return a sentence for each thing that a recipe asks for and its length does not allow."""
    recipe = recipe.stages[-1].recipe
    n = recipe.n_steps
    warmup, lambda_warmup, every, window = recipe.schedule
    decay = recipe.lr_decay_fraction * n
    # The step after which dead latents are last revived; 0 if they never are.
    last = int(recipe.revive_until * n) // every * every if every else 0
    told = []
    if warmup >= n:
        told.append(
            f"all {n:,} steps lie within the learning-rate warm-up of {warmup:,}, so the learning "
            "rate never reaches its peak; shorten the warm-up or train longer"
        )
    elif warmup > n - decay:
        told.append(
            f"the learning rate warms up over {warmup:,} steps and falls over the last {decay:,.0f}"
            f" of {n:,}, so it never reaches its peak; shorten the warm-up or the decay"
        )
    elif last and (warmup >= every or warmup > n - decay - last):
        falls = f" and a decay over the last {decay:,.0f}" if decay else ""
        told.append(
            f"each revival of dead features begins a warm-up of {warmup:,} steps; with one every "
            f"{every:,} until step {last:,} of {n:,}{falls}, what is revived may never learn at "
            "the peak learning rate; shorten the warm-up, revive less often or end revivals earlier"
        )
    if lambda_warmup >= n:
        told.append(
            f"lambda rises over {lambda_warmup:,} steps and there are {n:,}, so it never reaches "
            "what was asked for; shorten its warm-up or train longer"
        )
    if every and recipe.revive_until > 0 and (not last or window > last):
        told.append(
            f"no dead feature is revived: a feature is dead after {window:,} steps in which it did "
            f"not fire, and revivals come every {every:,} steps, none after step "
            f"{int(recipe.revive_until * n):,} of {n:,}; call features dead sooner, revive more "
            "often or train longer"
        )
    return told


if TYPE_CHECKING:
    # A list is taken too, and kept as a tuple; a type checker would refuse it.
    _Lambdas = Sequence[float]
    _Rates = Sequence[float]
else:
    _Lambdas, _Rates = tuple[NonNegativeFloat, ...], tuple[PositiveFloat, ...]


class TrainConfig(TrainRecipe):
    """A recipe and one lambda (and, if need be, one learning rate) for each SAE."""

    sparsity: Annotated[
        _Lambdas, BeforeValidator(lambda v: (v,) if isinstance(v, int | float) else v)
    ]
    """lambda of each SAE, against squared error summed over d_in; one number serves all. A TopK SAE
    has none and takes no notice."""

    lrs: _Rates | None = None
    """Peak learning rate of each SAE; None takes `lr` for all."""


class EvalConfig(Config):
    """What is measured on held-out sequences when training ends."""

    n_tokens: PositiveInt = 131_072
    """Held-out tokens, masked positions left out; fewer if the whole text holds out fewer. Text is
    read for them beyond what training takes."""

    replace: Positions = "counted"
    """Where the model reads reconstructions when its loss is measured: `counted` leaves BOS,
    separators and padding as they are, `all` replaces them too. Zero ablation zeroes every position
    either way."""


class RunConfig(Config):
    """A whole run: one language model, one pass over its text, any number of SAEs.

    SAEs may read different places of the model; all see the same tokens in the same order.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    saes: Annotated[tuple[SAESpec, ...], Field(min_length=1)]
    train: TrainRecipe
    evaluation: EvalConfig = EvalConfig()

    activation_scale: Literal["unit", "none"] = "unit"
    """`unit`: one scalar, folded into saved weights, makes E|x|^2 = 1 on the training split,
    activations longer than ten medians aside."""

    max_norm_ratio: Annotated[Annotated[float, Field(gt=1)] | None, IF_SAID] = None
    """Leave out activations longer than this many times the median, such as those of attention
    sinks, in training and in what is measured; None keeps all, and says what they hold."""

    seed: NonNegativeInt = 0
    """Seed of the data order."""

    device: str = "auto"
    """`auto` (CUDA, then Apple, then CPU), `cpu`, `cuda`, `cuda:1` or `mps`."""

    checkpoint_minutes: PositiveFloat = 2.0
    """Wall-clock minutes between resumable states."""

    activations: Annotated[str | None, IF_SAID] = None
    """Folder of vectors to train on, in place of a language model and a text: what `harvest` wrote,
    or `.safetensors`, `.npy` or `.parquet` files of any other program."""

    cache_activations: bool = False
    """Write the activations to disk first, for later runs of the same model, place and text."""

    track: Tracker | None = None
    """Mirror metrics and evaluations into a tracker too: `trackio` (kept on this machine), `wandb`
    (Weights & Biases) or `tensorboard` (in the run's folder)."""

    preset: str | None = None
    """Name of the preset this came from; a label only."""

    imported: str | None = None
    """Library whose files the SAEs were read from; None for those trained here. An imported run's
    recipe says nothing of how they learnt: its `n_tokens` bounds the text that is read."""

    finetuned: Annotated[str | None, IF_SAID] = None
    """Name of the run whose SAEs these started from."""

    loss: Annotated[Loss, Field(exclude_if=lambda loss: loss == "mse")] = "mse"
    """`mse`, of shuffled activations, or `kl`: end-to-end, on whole sequences."""

    @model_validator(mode="before")
    @classmethod
    def _vectors_are_of_no_model_unless_said(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or (folder := fields.get("activations")) is None:
            return fields
        unsaid = {"model": ModelConfig(name=NO_MODEL), "data": {"source": str(folder)}}
        return unsaid | {key: value for key, value in fields.items() if value is not None}

    def place(self, spec: SAESpec) -> Place:
        """Return the layer and site whose activations one of the SAEs reads."""
        if (there := self.model.place) == NO_PLACE:
            return NO_PLACE
        return Place(there.layer if spec.layer is None else spec.layer, spec.site or there.site)

    def place_of(self, name: str) -> Place:
        """Return the place of the SAE called `name`."""
        return next(self.place(spec) for spec in self.saes if spec.name == name)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the SAEs read, each place once, in the order of the SAEs."""
        return tuple(dict.fromkeys(map(self.place, self.saes)))

    @property
    def unit(self) -> Literal["token", "vector"]:
        """What SAEs learn from and numbers count: a text's tokens, or the vectors of a folder."""
        return "token" if self.activations is None else "vector"

    @property
    def where(self) -> str:
        """Where the SAEs read, short: `resid_post 2, mlp_out 3`; of no model, the folder's name."""
        if self.model.name == NO_MODEL:
            return Path(str(self.activations)).name
        return ", ".join(f"{place.site} {place.layer}" for place in self.places)

    @property
    def hook_names(self) -> str:
        """Names of the hook points that the SAEs read, e.g. `blocks.2.hook_resid_post`."""
        return ", ".join(place.hook_name for place in self.places)

    @property
    def reads(self) -> list[int]:
        """Where in `places` each SAE's place is."""
        places = self.places
        return [places.index(self.place(spec)) for spec in self.saes]

    @model_validator(mode="after")
    def _parts_go_together(self) -> "RunConfig":
        if self.activations is not None and (len(self.places) > 1 or self.cache_activations):
            wrong = "cache_activations" if self.cache_activations else "several places"
            raise ValueError(f"expected activations alone, got {wrong} too")
        names: set[str] = set()
        for spec in self.saes:
            if spec.name in names:
                raise ValueError(f"expected a different name for each SAE, got {spec.name!r} twice")
            names.add(spec.name)
            if self.imported is None and math.isnan(spec.sparsity):
                raise ValueError(f"expected a sparsity to train {spec.name!r} with, got none")
        for name in ("max_norm_ratio", "cache_activations") if self.loss == "kl" else ():
            if value := getattr(self, name):
                raise ValueError(
                    f"expected no {name} with loss kl, which reads whole sequences, got {value}; "
                    "leave one of them out"
                )
        return self

    @field_validator("train")
    @classmethod
    def _one_step_at_least(cls, train: TrainRecipe) -> TrainRecipe:
        if train.n_tokens < train.batch_size:
            raise ValueError(
                f"expected n_tokens of at least one batch ({train.batch_size}), "
                f"got {train.n_tokens}"
            )
        if any(recipe.n_steps < 1 for _, recipe in train.stages):
            raise ValueError(
                "expected n_tokens of at least one batch more than each length before "
                f"{list(train.extended)}, got {train.n_tokens}"
            )
        return train


def load_config(path: Path) -> RunConfig:
    """Return the run described by a JSON file; an InputError says why it describes none."""
    fields = read_json(path, missing=f"expected a config file, found nothing at {path}")
    saes = fields.get("saes")
    saes = list(map(_with_unit, saes)) if isinstance(saes, list) else saes
    if isinstance(data := fields.get("data"), dict):
        fields["data"] = {"reading": 1} | data
    return validated(RunConfig, fields | {"saes": saes})


def _with_unit(spec: Any) -> Any:
    """Return a file's SAE with the unit that thresholds had before a config said which."""
    said = ("init_threshold", "bandwidth")
    if not isinstance(spec, dict) or "threshold_unit" in spec or not {*said} & {*spec}:
        return spec
    if spec.get("architecture") == "jumprelu":
        return spec | {"threshold_unit": 1.0}
    # Written for every SAE; of one without thresholds it says nothing, nor of one made after it.
    return {key: value for key, value in spec.items() if key not in said}


def sweep(
    architectures: list[Architecture],
    sparsity: Sequence[float | int],
    width: int,
    **common: Any,
) -> tuple[SAESpec, ...]:
    """Return the product of `architectures` and `sparsity`; ReLU SAEs are 1.5x as wide."""
    specs = []
    for kind in dict.fromkeys(architectures):
        d_sae = width * 3 // 2 if kind == "relu" else width
        for value in dict.fromkeys(sparsity):
            own = {"name": f"{kind}-{value:g}", "sparsity": value, "d_sae": d_sae}
            specs.append(validated(SAESpec, {"architecture": kind, **own, **common}))
    return tuple(specs)
