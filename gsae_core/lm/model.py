"""A language model as the rest of the package sees it: up to six sites a block, to read or to edit.

`attn_out` and `mlp_out` are always the tensors that are added to the residual stream, as in
TransformerLens; tests hold every site of every family equal to its cache.

TransformerLens names the sites and serves users who bring a `TransformerBridge`; all else hooks the
Hugging Face modules themselves, which keeps SDPA attention and can stop as soon as a site is
computed (a bridge switches to eager attention and takes about twice the time and memory).
"""

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gsae_core.config import SITES, Place, Site
from gsae_core.errors import InputError, is_whole
from gsae_core.lm.blocks import context_length, find_decoder, text_config
from gsae_core.lm.bridge import bridge_blocks, bridge_sites, find_sites
from gsae_core.lm.catalog import FAMILIES, Family, lens_repo, model_folder
from gsae_core.lm.lens import open_lens
from gsae_core.lm.load import check_config, open_model
from gsae_core.lm.taps import BlockSites, Tap, hooked, recording, replaying

Edit = Callable[[Tensor], Tensor]
Numerics = Literal["raw", "compatibility"]


def _sites(block: nn.Module, family: Family | None) -> BlockSites:
    """Return the sites of a Hugging Face block: the residual stream's, or those of the family."""
    stream: dict[Site, Tap] = {
        "resid_pre": Tap(block, "input"),
        "resid_post": Tap(block, "output"),
    }
    if family is None:
        return BlockSites(block, stream, {"resid_post": (block,)})
    attn, mlp = block.get_submodule(family.attn), block.get_submodule(family.mlp)
    taps: dict[Site, Tap] = {
        # The projections' inputs: after the non-linearity, and the heads side by side.
        "mlp_hidden": Tap(block.get_submodule(family.mlp_proj), "input"),
        "attn_z": Tap(block.get_submodule(family.attn_proj), "input"),
        "mlp_out": Tap(block.get_submodule(family.mlp_out), "output"),
        "attn_out": Tap(block.get_submodule(family.attn_out), "output"),
    }
    before: dict[Site, tuple[nn.Module, ...]] = {
        "attn_out": (attn,),
        "mlp_hidden": (attn,),
        "mlp_out": (attn, mlp),
        "resid_post": (block,),
    }
    return BlockSites(block, stream | taps, before)


class PassLock:
    """Hooks and replayed outputs belong to the modules, which threads share.

    A setting (a hook, say) that serves many passes at once is made for the first of them and undone
    after the last: never while a pass runs, which would see its hooks change.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._key: Hashable = None
        self._setting = ExitStack()
        self._inside: set[int] = set()

    @contextmanager
    def shared(
        self, key: Hashable, setting: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """Within, `setting` holds, and only threads that came with the same key are there too."""
        me = threading.get_ident()
        with self._changed:
            if me in self._inside:
                raise InputError(
                    "expected an edit that leaves the language model alone, got one that runs it; "
                    "harvest first and edit with what was found"
                )
            self._changed.wait_for(lambda: self._key is None or self._key == key)
            if self._key is None:
                self._setting.enter_context(setting())
                self._key = key
            self._inside.add(me)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(me)
                if not self._inside:
                    self._key = None
                    self._setting.close()
                    self._changed.notify_all()

    def alone(self) -> AbstractContextManager[None]:
        """Within, no other thread is there."""
        return self.shared(object(), nullcontext)


class LanguageModel:
    """A causal language model whose activations can be read and replaced.

    A layer (from 0), site or token that it does not have, or more tokens than its context, is an
    InputError wherever they are given.

    Attributes:
        family: the Hugging Face `model_type`, e.g. `gpt2`.
        numerics: `raw`, the weights as published; or `compatibility`, a TransformerBridge whose
            weights TransformerLens has centred and folded, so that its residual stream is another.
        hf: the Hugging Face model (inside the bridge, where there is one).
        module: what is called: the bridge, where there is one, else `hf`.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_ctx: most tokens in a sequence.
        device: of the weights, as the model was loaded.
        dtype: of the weights; activations and logits are float32 all the same.
    """

    def __init__(self, hf: Any, tokenizer: Any, *, name: str, bridge: Any = None) -> None:
        self.name: str = name
        self.hf: Any = hf
        self.tokenizer: Any = tokenizer
        self._bridge = bridge
        self.module: nn.Module = hf if bridge is None else bridge
        self.family: str = getattr(getattr(hf, "config", None), "model_type", "native")
        self.d_model: int
        self.n_ctx: int
        self.d_vocab: int
        self._replays, self._decoder = True, None
        if bridge is None:
            self._decoder, config = find_decoder(hf), text_config(hf)
            family = FAMILIES.get(config.model_type)
            self._blocks = [_sites(block, family) for block in self._decoder.blocks]
            self.d_model, self._replays = self._decoder.d_model, self._decoder.replays
            self.n_ctx, self.d_vocab = context_length(config), config.vocab_size
            # transformers 5.24 gave it another name; Mamba keeps something else.
            takes = inspect.signature(hf.forward).parameters
            names = ("cache", "past_key_values")
            self._cache_name = next((name for name in names if name in takes), None)
            embedding = hf.get_input_embeddings()
        else:
            self._blocks, embedding = bridge_blocks(bridge), None
            self.d_model, self.n_ctx = bridge.cfg.d_model, bridge.cfg.n_ctx
            self.d_vocab = bridge.cfg.d_vocab
        self._n_embedded: int = getattr(embedding, "num_embeddings", self.d_vocab)
        compatible = bridge is not None and bridge.compatibility_mode
        self.numerics: Numerics = "compatibility" if compatible else "raw"
        self.n_layers: int = len(self._blocks)
        weight = next(hf.parameters())
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self._lock, self._looked = PassLock(), False
        self._seen = threading.local()  # what each thread's pass has met: hooks serve several

    def width(self, site: Site) -> int:
        """Return d_in of a site: the length of its activation vectors."""
        if not any(site in each.taps for each in self._blocks):
            self._look_further()
        # Layers of a hybrid model may lack it.
        having = (layer for layer, each in enumerate(self._blocks) if site in each.taps)
        tap = self._tap(layer := next(having, 0), site)
        if site not in ("mlp_hidden", "attn_z"):
            return self.d_model
        if self._bridge is not None:  # whose settings may say otherwise (Falcon)
            one = torch.zeros(1, 1, dtype=torch.int64)
            return self.harvest(one, layer=layer, site=site).shape[-1]
        projection: Any = tap.module
        # GPT-2 keeps its projections as Conv1D, which calls the width of its input nx.
        return projection.nx if hasattr(projection, "nx") else projection.in_features

    def check(self, layer: int, site: str) -> None:
        """Raise InputError, with the valid ones, if the model has no such layer or site."""
        if site not in SITES:
            raise InputError(f"expected a site out of {', '.join(SITES)}, got {site!r}")
        if not is_whole(layer) or not 0 <= layer < self.n_layers:
            raise InputError(
                f"expected a layer from 0 to {self.n_layers - 1}, got {layer!r} "
                f"({self.name} has {self.n_layers} layers)"
            )
        if site not in self._blocks[layer].taps:
            self._look_further()
        if site not in self._blocks[layer].taps:
            whose = (
                f"this {self.family} model" if self._bridge is None else "this TransformerBridge"
            )
            raise InputError(
                f"expected a site that {whose} has, got {site!r}; "
                f"layer {layer} has {', '.join(self._blocks[layer].taps)}"
            )

    def _look_further(self) -> None:
        """Add the sites that TransformerLens can tell, and that a pass over the model confirms.

        It takes seconds, so only when first asked.
        """
        with self._lock.alone():
            if not self._looked:
                find = find_sites if self._bridge is None else bridge_sites
                self._blocks = find(self.module, self._blocks)
                self._looked = True

    def _tap(self, layer: int, site: Site) -> Tap:
        self.check(layer, site)
        return self._blocks[layer].taps[site]

    def harvest(
        self, ids: Int64[Tensor, "rows pos"], *, layer: int, site: Site
    ) -> Float[Tensor, "rows pos d_in"]:
        """Return the activations of a site as float32, on the model's device.

        The forward pass stops there; attention is causal and nothing is padding. Of `attn_z` the
        heads come side by side. Threads that read the same site run side by side (in a
        TransformerBridge, one after the other).
        """
        return self.harvest_places(ids, (Place(layer, site),))[0]

    def harvest_places(
        self, ids: Int64[Tensor, "rows pos"], places: Sequence[Place]
    ) -> list[Float[Tensor, "rows pos _"]]:
        """Return what `harvest` would of each of different places, from one forward pass.

        It stops at the place that is computed last.
        """
        taps = {place: self._tap(*place) for place in places}
        # What a bridge keeps of a pass besides its hooks is not ours to know.
        key = tuple(taps) if self._bridge is None else object()
        with self._lock.shared(key, lambda: self._stopping_at(taps)):
            seen = self._seen.of_pass = {}
            try:
                self._forward(ids)
            except _AllSeen:
                return [seen[place] for place in places]
        missing = ", ".join(place.hook_name for place in taps if place not in seen)
        raise InputError(
            f"expected the forward pass of {self.name} to go through {missing}, it did not; choose "
            "another site"
        )

    @contextmanager
    def _stopping_at(self, taps: Mapping[Place, Tap]) -> Iterator[None]:
        """Within, a pass keeps what its thread meets at the taps, and ends after the last of them.

        Which is last depends on the family: some compute attention and MLP side by side.
        """

        def see(x: Tensor, place: Place) -> None:
            seen = self._seen.of_pass
            # Later modules may write over it. Made outside inference mode it may meet autograd.
            with torch.inference_mode(False):
                seen[place] = x.to(torch.float32, copy=True)
            if len(seen) == len(taps):
                raise _AllSeen

        with ExitStack() as hooks:
            for place, tap in taps.items():
                hooks.enter_context(hooked(tap, partial(see, place=place)))
            yield

    def logits(
        self,
        ids: Int64[Tensor, "rows pos"],
        *,
        layer: int | None = None,
        site: Site | None = None,
        edit: Edit | None = None,
    ) -> Float[Tensor, "rows pos d_vocab"]:
        """Return next-token logits, float32; with `edit`, those that follow from an edited site.

        The rest of the model reads the site's x, float32 (rows, pos, d_in), as `edit(x)`.
        """
        if edit is not None and layer is not None and site is not None:
            hook = hooked(self._tap(layer, site), _in_model_dtype(edit))
        elif edit is layer is site is None:
            hook = nullcontext()
        else:
            raise InputError("expected layer, site and edit together, got only some of them")
        with self._lock.alone(), hook:
            return self._forward(ids)

    @torch.inference_mode()
    def _forward(self, ids: Int64[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_vocab"]:
        if ids.shape[1] > self.n_ctx:
            raise InputError(
                f"expected at most {self.n_ctx} tokens in a sequence ({self.name}'s context), "
                f"got {ids.shape[1]}; cut the text into shorter sequences"
            )
        return self._read(ids)[0].float()

    def _read(self, ids: Tensor, cache: Any = None, *, keep: bool = False) -> tuple[Tensor, Any]:
        """Return logits and, if asked to `keep` them, keys and values of all tokens so far."""
        self._check_ids(ids)
        ids = ids.to(self.device)
        if self._bridge is not None:
            options = {"past_key_values": cache, "use_cache": True} if keep else {}
            return self._bridge(ids, return_type="logits_and_cache", **options)
        if self._cache_name is None:
            return self.hf(input_ids=ids, use_cache=False).logits, None
        out = self.hf(input_ids=ids, use_cache=keep, **{self._cache_name: cache})
        return out.logits, getattr(out, self._cache_name, None)

    def _check_ids(self, ids: Tensor) -> None:
        """Raise InputError for tokens without an embedding: a GPU would only abort."""
        low, high = (int(each) for each in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= self._n_embedded:
            raise InputError(
                f"expected token ids from 0 to {self._n_embedded - 1}, which {self.name} has "
                f"embeddings of, got {low if low < 0 else high}; give it its own tokenizer and "
                "token arrays made with that, or enlarge it with resize_token_embeddings()"
            )


class _AllSeen(Exception):
    """Ends a forward pass that has passed every place it was made for."""


def _in_model_dtype(edit: Edit) -> Edit:
    """Return `edit` of a tensor in the model's own precision."""

    def edited(x: Tensor) -> Tensor:
        new = edit(x.float())
        if new.shape != x.shape:
            raise InputError(
                f"expected an edit that keeps the shape {tuple(x.shape)}, got {tuple(new.shape)}; "
                "was this SAE trained at another site?"
            )
        return new.to(x)

    return edited


class Splice:
    """A clean pass over one batch, and passes that differ from it from one site on.

    What ran before the site is remembered, so a continuation costs only what comes after it.

    Attributes:
        x: the site's activations in the clean pass, float32 (rows, pos, d_in).
        logits: the clean next-token logits, float32 (rows, pos, d_vocab).
    """

    def __init__(
        self, model: LanguageModel, ids: Int64[Tensor, "rows pos"], *, layer: int, site: Site
    ) -> None:
        self._model, self._ids, self._tap = model, ids, model._tap(layer, site)
        earlier = [sites.block for sites in model._blocks[:layer]]
        before = model._blocks[layer].before.get(site, ())
        if not model._replays:
            earlier, before = [], ()
        seen: list[Tensor] = []
        with (
            model._lock.alone(),
            recording((*earlier[-1:], *before)) as outputs,
            hooked(self._tap, seen.append),
        ):
            self.logits: Tensor = model._forward(ids)
        # A copy made outside inference mode may later meet autograd.
        self.x: Tensor = seen[0].to(torch.float32, copy=True)
        # Each block hands on one residual stream, so every earlier one may return the last one's.
        self._outputs = outputs | {block: outputs[earlier[-1]] for block in earlier}
        self._mine = threading.local()  # what each thread that continues the pass puts there

    def run(self, x: Float[Tensor, "rows pos d_in"]) -> Float[Tensor, "rows pos d_vocab"]:
        """Return the logits that follow when the rest of the model reads `x` at the site.

        Threads may continue one pass side by side (in a TransformerBridge, one after the other).
        """
        key = self if self._model._bridge is None else object()
        with self._model._lock.shared(key, self._spliced):
            self._mine.x = x
            return self._model._forward(self._ids)

    def slope(
        self, x: Float[Tensor, "rows pos d_in"], value: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "rows pos d_in"]]:
        """Return `value` of the logits that `run(x)` returns, and its derivative to `x`; float32.

        The model's weights get no gradients. Threads take turns.
        """
        model = self._model
        leaf = x.detach().clone().requires_grad_()
        # What inference mode made cannot be saved for a backward pass; copies can.
        own = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._outputs)
        edit = _in_model_dtype(lambda _: leaf)
        with torch.enable_grad(), model._lock.alone(), replaying(own), hooked(self._tap, edit):
            logits, _ = model._read(self._ids)
            found = value(logits.float())
            (slope,) = torch.autograd.grad(found, leaf)
        return found.detach(), slope

    @contextmanager
    def _spliced(self) -> Iterator[None]:
        edit = _in_model_dtype(lambda _: self._mine.x)
        with replaying(self._outputs), hooked(self._tap, edit):
            yield


class Decoding:
    """Logits of a growing sequence; what was read stays read, with the edits it had.

    Keys and values of earlier tokens are kept, so a token costs one row and not the sequence. An
    edit that changed an earlier token lives on in them, exactly as in a pass over the whole.
    Between two calls of `extend`, others may use the model.

    Attributes:
        n_tokens: tokens read so far.
    """

    def __init__(self, model: LanguageModel, *, layer: int, site: Site) -> None:
        self._model, self._tap = model, model._tap(layer, site)
        self._cache = None
        self.n_tokens: int = 0

    @torch.inference_mode()
    def extend(
        self, ids: Int64[Tensor, "1 new"], edit: Edit | None = None
    ) -> Float[Tensor, "new d_vocab"]:
        """Read more tokens; return the next-token logits after each of them, float32.

        `edit` takes and returns float32 (1, new, d_in), the new tokens' activations at the site.
        """
        model, n_new = self._model, ids.shape[1]
        if self.n_tokens + n_new > model.n_ctx:
            raise InputError(
                f"expected at most {model.n_ctx} tokens in a sequence ({model.name}'s context), "
                f"got {self.n_tokens + n_new}; shorten the prompt or the continuation"
            )
        hook = nullcontext() if edit is None else hooked(self._tap, _in_model_dtype(edit))
        with model._lock.alone(), hook:
            logits, self._cache = model._read(ids, self._cache, keep=True)
        # With transformers 5.24 a bridge of TransformerLens 4.3 leaves it empty: wrong logits.
        if not _n_kept(self._cache):
            other = "another" if model._bridge is None else "a Hugging Face"
            raise InputError(
                f"expected a model that keeps keys and values of earlier tokens, got {model.name}, "
                f"which keeps none; generate with {other} model"
            )
        self.n_tokens += n_new
        return logits[0].float()


def _n_kept(cache: Any) -> int:
    """Return how many tokens a cache keeps keys and values of; 0 without attention, too."""
    try:
        return 0 if cache is None else cache.get_seq_length()
    except ValueError:
        return 0


def logit_slope(
    model: LanguageModel,
    ids: Int64[Tensor, "1 pos"],
    *,
    layer: int,
    site: Site,
    position: int,
    token: int,
) -> Float[Tensor, "pos d_in"]:
    """Return d logit(token after `position`) / d x(q), for every position q; float32.

    It goes through all that lies between the site and the logits. Positions after `position` have
    slope 0: attention is causal.
    """
    splice = Splice(model, ids, layer=layer, site=site)
    for name, index, n in (("position", position, ids.shape[1]), ("token", token, model.d_vocab)):
        if not 0 <= index < n:
            raise InputError(f"expected a {name} from 0 to {n - 1}, got {index}")
    return splice.slope(splice.x, lambda logits: logits[0, position, token])[1][0]


def load_model(
    source: Any,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tokenizer: Any = None,
) -> LanguageModel:
    """Return the language model that `source` names or is.

    Args:
        source: `bundled`, a local Hugging Face folder, a name on the Hub, that of a small model of
            TransformerLens (`gelu-1l`), a `TransformerBridge`, or a Hugging Face causal LM. The
            last two are used as they are, on their own device.
        revision: branch, tag or commit of a model on the Hub.
        device: of a model that is loaded here, as torch names it.
        dtype: of a model that is loaded here; activations leave it as float32.
        tokenizer: of a Hugging Face model given as an object.

    Raises:
        InputError: if there is no such model, it is no decoder, its files are damaged, its weights
            are another model's, or it has no tokenizer.
    """
    if isinstance(source, str) and model_folder(source) is None and (repo := lens_repo(source)):
        bridge, own = open_lens(repo, revision=revision, device=device, dtype=dtype)
        model = LanguageModel(bridge.original_model, own, name=source, bridge=bridge)
    elif isinstance(source, str):
        hf, tokenizer = open_model(source, revision=revision, device=device, dtype=dtype)
        model = LanguageModel(hf, tokenizer, name=source)
    else:
        model = model_of(source, tokenizer)
    if model.tokenizer is None:
        raise InputError(
            f"expected a tokenizer with the {type(source).__name__} given as an object, got none; "
            "pass load_model(model, tokenizer=AutoTokenizer.from_pretrained(...))"
        )
    # Dropout would make activations depend on when they are harvested.
    model.module.eval()
    return model


def model_of(source: Any, tokenizer: Any = None) -> LanguageModel:
    """Return a Hugging Face causal LM or a TransformerBridge, as it is, as a LanguageModel.

    Nothing of it changes, not even its mode; it may lack a tokenizer. Anything else, another family
    or a model inside a wrapper is an InputError.
    """
    from transformers import CONFIG_MAPPING

    kind = type(source).__name__
    # By its name: to import TransformerLens takes seconds.
    if any(base.__name__ == "TransformerBridge" for base in type(source).__mro__):
        tokenizer = source.tokenizer if tokenizer is None else tokenizer
        hf, name = source.original_model, source.cfg.model_name
        return LanguageModel(hf, tokenizer, name=name, bridge=source)
    if not hasattr(getattr(source, "config", None), "model_type"):
        raise InputError(
            "expected 'bundled', a folder, a name on the Hub, a TransformerBridge or a Hugging "
            f"Face causal LM, got {kind}"
        )
    # Of a class that transformers does not know, its blocks tell.
    if source.config.model_type in CONFIG_MAPPING:
        check_config(kind, source.config)
    try:
        return LanguageModel(source, tokenizer, name=source.config._name_or_path or kind)
    except AttributeError as error:
        raise InputError(
            f"expected a {source.config.model_type} model as transformers builds it, got {kind} "
            f"without some of its modules ({error}); pass the model inside the wrapper"
        ) from error
