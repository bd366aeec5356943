"""An SAE in anybody's model: the Prompt page's features, the evaluation's replacement, the Steer
page's steering.

What is compared was computed in other shapes: a text alone or in a batch, counted vectors alone or
among others, a KV cache or none. Sums in another order differ by some float32 roundings (6e-8 each)
of activations up to about 30, through two blocks: hence `TOLERANCE`, and equality to the bit
wherever the shapes are the same.
"""

import copy
import functools
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import perturb_, slopes
from families import CONFIGS, boot, tiny
from refusals import refusal
from torch import Tensor, nn
from torch.nn import functional as F

import gsae_core
from gsae_core.analysis.attach import attach
from gsae_core.analysis.fidelity import fidelity, reconstruct
from gsae_core.analysis.generation import Sampling, continuation, steered_logits
from gsae_core.analysis.prompt import Prompt, PromptAnalysis, analyse, read_prompt
from gsae_core.analysis.steering import Intervention, Steering
from gsae_core.config import SITES, Site
from gsae_core.errors import InputError
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.model import Decoding, LanguageModel, Splice, hooked, load_model
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE
from gsae_core.sae.base import SAE

# Of tensors this small two threads are slower than one where another process computes too.
pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE: Any = {"rtol": 1e-4, "atol": 1e-4}
TEXT = "w1 w2 w3 w2 w9 w30"
HOOKS = {name for name in vars(nn.Module()) if "hooks" in name}
PUSHES = (
    Intervention(3, "add", 2.0, 1.5),
    Intervention(5, "clamp", 3.0, 1.0),
    Intervention(8, "ablate", 0.0, 1.0),
)
FIRST: Any = {"layer": 1, "site": "resid_pre"}


@functools.cache
def hf_of(family: str) -> Any:
    return tiny(family)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> LanguageModel:
    return load_model(hf_of(request.param), tokenizer=tiny_tokenizer)


def gated(d_in: int, seed: int = 0) -> GatedSAE:
    sae = GatedSAE(d_in, 24, seed=seed)
    perturb_(sae, seed=seed + 1)
    return sae.requires_grad_(False)


def dense(analysis: PromptAnalysis, d_sae: int) -> Tensor:
    """Return the Prompt page's features as a matrix (pos, d_sae)."""
    f = torch.zeros(len(analysis.tokens), d_sae)
    table = analysis.features
    where = (torch.tensor(table["position"].to_numpy()), torch.tensor(table["latent"].to_numpy()))
    return f.index_put(where, torch.tensor(table["activation"].to_numpy(), dtype=torch.float32))


@contextmanager
def left_as_it_was(hf: nn.Module) -> Iterator[None]:
    """Fail if a module has other hooks, another `forward` or another mode afterwards."""

    def state() -> list[Any]:
        found = []
        for module in hf.modules():
            hooks = {name: len(each) for name, each in vars(module).items() if name in HOOKS}
            assert len(hooks) == len(HOOKS)
            found.append((hooks, vars(module).get("forward"), module.training))
        return found

    before = state()
    yield
    assert state() == before


# The same numbers as the pages and the evaluation, in every family and at every site


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "attn_z"])
def test_features_are_those_of_the_prompt_page(
    site: Site, model: LanguageModel, tiny_tokenizer: Any
) -> None:
    sae = gated(model.width(site))
    prompt = read_prompt(model, TEXT)
    (page,) = analyse(model, [sae], prompt, layer=1, site=site)
    with torch.no_grad():
        untouched = model.hf(prompt.ids).logits
        with left_as_it_was(model.hf), sae.attach(model.hf, 1, site) as attached:
            logits = model.hf(prompt.ids).logits
    assert torch.equal(logits, untouched)  # it only looks
    f = dense(page, sae.d_sae)
    assert (f > 0).any(1).tolist() == [False] + [True] * 6
    torch.testing.assert_close(attached.features[0], f, **TOLERANCE)
    assert torch.equal(attached.features[0] > 0, f > 0)
    assert torch.equal(attached.counted[0], prompt.counted)
    x = model.harvest(prompt.ids, layer=1, site=site)
    assert torch.equal(attached.activations, x)
    codes = attached.codes()
    latents = codes.latent[codes.magnitude > 0]
    assert latents.tolist() == f[1:].nonzero()[:, 1].tolist()


ROWS = np.random.default_rng(0).integers(2, 40, size=(4, 9))
ROWS[:, 0] = 0  # BOS
ROWS[1, 4] = 0  # a separator inside a sequence
SEQUENCES = SequenceSet(ROWS, (0,))
IDS = torch.from_numpy(ROWS)


@pytest.mark.parametrize(
    ("site", "replace"),
    [("resid_pre", "counted"), ("mlp_out", "counted"), ("attn_z", "counted"), ("mlp_out", "all")],
)
def test_replacement_is_the_evaluations(site: Site, replace: Any, model: LanguageModel) -> None:
    sae = gated(model.width(site))
    (wanted,) = fidelity(
        model, [sae], SEQUENCES, layer=0, site=site, n_tokens=10**6, replace=replace
    )
    counted = {} if replace == "counted" else {"special_ids": ()}
    with left_as_it_was(model.hf), torch.no_grad():
        clean = model.hf(IDS).logits
        with sae.attach(model.hf, 0, site, replace=True, **counted):
            logits = model.hf(IDS).logits
    predicted = (IDS[:, :-1] != 0) & (IDS[:, 1:] != 0)
    targets = IDS[:, 1:][predicted]
    loss = F.cross_entropy(logits[:, :-1][predicted].double(), targets)
    assert float(loss) == pytest.approx(wanted.fidelity.ce_sae, rel=1e-5)
    assert abs(wanted.fidelity.ce_sae - wanted.fidelity.ce_clean) > 1e-3
    # Not only on average: every logit.
    splice = Splice(model, IDS, layer=0, site=site)
    mask = IDS != 0 if replace == "counted" else torch.ones_like(IDS, dtype=torch.bool)
    read = splice.x.masked_scatter(mask[..., None], reconstruct(sae, splice.x[mask])[0])
    torch.testing.assert_close(logits, splice.run(read), **TOLERANCE)
    assert torch.equal(clean, splice.logits)


@pytest.mark.parametrize(
    ("site", "keep_error"),
    [("resid_pre", True), ("mlp_out", True), ("attn_z", True), ("mlp_out", False)],
)
def test_steering_is_the_steer_pages(site: Site, keep_error: bool, model: LanguageModel) -> None:
    sae = gated(model.width(site))
    prompt = read_prompt(model, TEXT)
    steering = Steering(sae, PUSHES, keep_error)
    wanted = steered_logits(model, prompt, steering, layer=1, site=site)
    with left_as_it_was(model.hf), torch.no_grad():
        untouched = model.hf(prompt.ids).logits[0]
        with sae.attach(model.hf, 1, site, steer=PUSHES, replace=not keep_error) as attached:
            logits = model.hf(prompt.ids).logits[0]
    torch.testing.assert_close(logits, wanted, **TOLERANCE)
    assert (logits - untouched)[1:].abs().max() > 1e-2
    assert attached.steering == steering


def test_generate_goes_on_as_the_steer_page(model: LanguageModel) -> None:
    steering = Steering(gated(model.d_model), PUSHES)
    prompt = read_prompt(model, TEXT)
    place: Any = {"layer": 1, "site": "mlp_out"}
    greedy = Sampling(n_tokens=8, temperature=0.0)
    # What a tiny model writes ends soon, unless it cannot write its end.
    with torch.no_grad(), without_token(model, 0):
        wanted = list(continuation(model, prompt, steering, **place, sampling=greedy))
        generate = functools.partial(
            model.hf.generate,
            prompt.ids,
            attention_mask=torch.ones_like(prompt.ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        with steering.sae.attach(model.hf, **place, steer=PUSHES) as attached:
            made = generate(output_logits=True, return_dict_in_generate=True)
            assert attached.features.shape[:2] == (1, 1)  # the last pass read one token
            without_cache = generate(use_cache=False)
            static = generate(cache_implementation="static")
        untouched = generate(output_logits=True, return_dict_in_generate=True)
        # Every step's logits, as the page computes them with its own cache.
        decoding, ids, counted = Decoding(model, **place), prompt.ids, prompt.counted
        for step, token in zip(made.logits, wanted, strict=True):
            logits = decoding.extend(ids, steering.edit(counted))[-1]
            torch.testing.assert_close(step[0], logits, **TOLERANCE)
            ids, counted = torch.tensor([[token]]), torch.tensor([token != 0])
    for sequences in (made.sequences, without_cache, static):
        assert sequences[0, prompt.ids.shape[1] :].tolist() == wanted
    assert len(wanted) == 8
    assert (untouched.logits[0] - made.logits[0]).abs().max() > 1e-2


@contextmanager
def without_token(model: LanguageModel, token: int) -> Iterator[None]:
    """Within, the model never writes a token."""

    def never(_: nn.Module, __: Any, out: Any) -> None:
        out.logits[..., token] = -1e4

    with left_as_it_was(model.hf), model.hf.register_forward_hook(never):
        yield


# Batches, padding, and what counts


def padded(prompts: list[Prompt], pad: int) -> dict[str, Tensor]:
    """Return prompts padded on the left, as `generate` wants them."""
    width = max(prompt.ids.shape[1] for prompt in prompts)
    rows = [F.pad(prompt.ids[0], (width - prompt.ids.shape[1], 0), value=pad) for prompt in prompts]
    ones = [F.pad(torch.ones_like(p.ids[0]), (width - p.ids.shape[1], 0)) for p in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(ones)}


def test_a_row_padded_on_the_left_is_what_it_is_alone(model: LanguageModel) -> None:
    sae = gated(model.d_model)
    prompts = [read_prompt(model, text) for text in (TEXT, "w4 w5 w6", "w7 w8 w30 w31 w20")]
    batch = padded(prompts, pad=1)  # no special id: only the mask tells
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    place: Any = {"layer": 1, "site": "resid_pre"}
    with torch.no_grad(), sae.attach(model.hf, **place, replace=True) as attached:
        logits = model.hf(**batch, position_ids=positions).logits
        f, counted = attached.features, attached.counted
    steered = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    with sae.attach(model.hf, **place, steer=PUSHES):
        made = model.hf.generate(**batch, **steered)
    for row, prompt in enumerate(prompts):
        n = prompt.ids.shape[1]
        (page,) = analyse(model, [sae], prompt, **place)
        assert counted[row].tolist() == [False] * (7 - n) + prompt.counted.tolist()
        torch.testing.assert_close(f[row, -n:], dense(page, 24), **TOLERANCE)
        assert not f[row, :-n].any()
        splice = Splice(model, prompt.ids, **place)
        read = splice.x.clone()
        read[0, 1:] = sae(read[0, 1:])
        torch.testing.assert_close(logits[row, -n:], splice.run(read)[0], **TOLERANCE)
        greedy = Sampling(n_tokens=5, temperature=0.0)
        alone = list(continuation(model, prompt, Steering(sae, PUSHES), **place, sampling=greedy))
        assert made[row, 7:].tolist()[: len(alone)] == alone


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_padding_counts_with_no_kind_of_cache(family: str, attention: str) -> None:
    hf = copy.deepcopy(hf_of(family))
    hf.set_attn_implementation(attention)
    mask = torch.ones_like(IDS)
    mask[1, :4] = mask[2, :7] = 0
    steps: dict[str, list[Tensor]] = {}
    for cache in ("dynamic", "static"):
        found = steps[cache] = []
        with gated(hf.config.hidden_size).attach(
            hf, 1, "resid_pre", special_ids=(), steer=PUSHES
        ) as attached:

            def keep(*_: Any, attached: Any = attached, found: Any = found) -> None:
                found.append(attached.counted)

            with hf.register_forward_hook(keep):
                hf.generate(
                    IDS,
                    attention_mask=mask,
                    max_new_tokens=5,
                    min_new_tokens=5,
                    do_sample=False,
                    pad_token_id=1,
                    cache_implementation=cache,
                )
    assert torch.equal(steps["static"][0], mask.bool())
    assert len(steps["static"]) == len(steps["dynamic"]) == 5
    for static, dynamic in zip(steps["static"], steps["dynamic"], strict=True):
        assert torch.equal(static, dynamic)


def test_masks_of_other_kinds_are_refused(tiny_lm: LanguageModel) -> None:
    with gated(12).attach(tiny_lm.hf, 1, "resid_pre"):
        assert refusal(tiny_lm.hf, IDS, attention_mask=torch.ones(4, 9, 9)) == (
            "expected an attention_mask of two or four dimensions, to tell padding by, got "
            "Tensor; load the model with attn_implementation='sdpa'"
        )


def test_special_tokens_are_the_tokenizers_or_the_configs_or_said(
    tiny_lm: LanguageModel, tiny_tokenizer: Any
) -> None:
    hf = copy.deepcopy(tiny_lm.hf)
    ids = torch.tensor([[0, 5, 7, 9, 11, 0]])
    hf.config.eos_token_id, hf.generation_config.eos_token_id = None, [5, 7]
    sae = gated(12)

    def counted(model: Any = hf, **options: Any) -> list[int]:
        with sae.attach(model, 1, "resid_pre", **options) as attached:
            model.harvest(ids, **FIRST) if model is tiny_lm else model(ids)
        return ids[attached.counted].tolist()

    assert counted() == [9, 11]  # BOS, and both ends that the model's own settings name
    assert counted(tokenizer=tiny_tokenizer) == [5, 7, 9, 11]
    assert counted(special_ids=[9, 11], tokenizer=tiny_tokenizer) == [0, 5, 7, 0]
    assert counted(special_ids=()) == [0, 5, 7, 9, 11, 0]
    assert counted(tiny_lm) == [5, 7, 9, 11]
    hf.config.bos_token_id = hf.generation_config.bos_token_id = None
    hf.generation_config.eos_token_id = None
    assert refusal(counted).endswith(
        "got neither a tokenizer nor ids in the model's own settings; pass tokenizer=..., or "
        "special_ids=() if every token counts"
    )


def test_what_does_not_count_keeps_its_bits(tiny_lm: LanguageModel) -> None:
    sae = gated(12)
    hf = copy.deepcopy(tiny_lm.hf)
    mask = torch.ones_like(IDS)
    mask[:, -2:] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        hf.to(dtype)
        counted = (IDS != 0) & mask.bool()
        wide = torch.promote_types(dtype, torch.float32)
        either: list[Any] = [{"replace": True}, {"steer": PUSHES}]
        for options in either:
            with (
                torch.no_grad(),
                sae.attach(hf, 1, "resid_pre", **options) as first,
                # Attached later at the same place, it reads what the first one wrote.
                gated(12, seed=5).attach(hf, 1, "resid_pre") as second,
            ):
                hf(IDS, attention_mask=mask)
            assert torch.equal(first.counted, counted)
            x, read = first.activations, second.activations
            assert x.dtype == read.dtype == dtype
            assert first.features.dtype == torch.float32
            assert torch.equal(x[~counted], read[~counted])
            # Rounded once.
            assert torch.equal(read[counted], first.steering(x[counted].to(wide)).to(dtype))


def test_in_half_precision_the_model_reads_what_the_page_lets_it_read(
    tiny_lm: LanguageModel, tiny_tokenizer: Any
) -> None:
    model = load_model(copy.deepcopy(tiny_lm.hf).bfloat16(), tokenizer=tiny_tokenizer)
    sae, prompt = gated(12), read_prompt(model, TEXT)
    wanted = steered_logits(model, prompt, Steering(sae, PUSHES), layer=1, site="mlp_out")
    with torch.no_grad(), sae.attach(model.hf, 1, "mlp_out", steer=PUSHES):
        logits = model.hf(prompt.ids).logits[0]
    assert logits.dtype == torch.bfloat16
    # x' in float32 differs in its last digits, so that bfloat16 (2^-8) may round it otherwise.
    torch.testing.assert_close(logits.float(), wanted, rtol=2**-6, atol=0.1)


def test_embeddings_tell_no_special_tokens(tiny_lm: LanguageModel) -> None:
    hf, sae = tiny_lm.hf, gated(12)
    vectors = hf.transformer.wte(IDS)
    with torch.no_grad(), sae.attach(hf, 1, "resid_pre") as attached:
        hf(inputs_embeds=vectors)
        assert attached.activations.shape == (4, 9, 12)
        said = refusal(lambda: attached.features)
    assert said == (
        "expected a pass that starts from input_ids, to tell special tokens by, got one from "
        "embeddings or of a part of the model; pass special_ids=() to count every position"
    )
    with left_as_it_was(hf), sae.attach(hf, 1, "resid_pre", replace=True):
        assert refusal(hf, inputs_embeds=vectors) == said
    with torch.no_grad(), sae.attach(hf, 1, "resid_pre", special_ids=()) as attached:
        hf(inputs_embeds=vectors)
    assert attached.counted.all()
    assert torch.equal(attached.features, sae.encode(attached.activations))


@pytest.mark.parametrize("sae", [ReluSAE(12, 24), JumpReluSAE(12, 24)])
def test_other_architectures_do_too(sae: SAE, tiny_lm: LanguageModel) -> None:
    perturb_(sae)
    prompt = read_prompt(tiny_lm, TEXT)
    sae.input_norm = "layer_norm"
    (page,) = analyse(tiny_lm, [sae], prompt, layer=1, site="resid_pre")
    with torch.no_grad(), sae.attach(tiny_lm, 1, "resid_pre", replace=True) as attached:
        logits = tiny_lm.logits(prompt.ids)
    torch.testing.assert_close(attached.features[0], dense(page, 24), **TOLERANCE)
    loss = F.cross_entropy(logits[0, 1:-1], prompt.ids[0, 2:])
    assert float(loss) == pytest.approx(page.numbers.ce_sae, rel=1e-5)


# Our own model objects


@pytest.mark.filterwarnings("ignore")  # TransformerLens' own
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_bridge_is_a_model_like_any_other(family: str, tiny_tokenizer: Any) -> None:
    bridge = boot(hf_of(family), tiny_tokenizer)
    model = load_model(bridge)
    prompt = read_prompt(model, TEXT)
    for site in SITES:
        sae = gated(model.width(site))
        (page,) = analyse(model, [sae], prompt, layer=1, site=site)
        wanted = steered_logits(model, prompt, Steering(sae, PUSHES), layer=1, site=site)
        for whole in (bridge, model):
            run = bridge if whole is bridge else model.logits
            with torch.no_grad(), sae.attach(whole, 1, site) as attached:
                run(prompt.ids)
            torch.testing.assert_close(attached.features[0], dense(page, 24), **TOLERANCE)
            with torch.no_grad(), sae.attach(whole, 1, site, steer=PUSHES):
                torch.testing.assert_close(run(prompt.ids)[0], wanted, **TOLERANCE)


def test_threads_that_share_the_model_keep_their_own_special_tokens(
    tiny_lm: LanguageModel,
) -> None:
    sae = gated(12)
    rows = [IDS[i : i + 1].roll(i, dims=1) for i in range(4)]  # BOS elsewhere in each
    with sae.attach(tiny_lm, 0, "resid_pre", replace=True):
        alone = [tiny_lm.harvest(ids, layer=1, site="resid_post") for ids in rows]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                found = pool.map(lambda ids: tiny_lm.harvest(ids, layer=1, site="resid_post"), rows)
                torch.testing.assert_close(list(found), alone, **TOLERANCE)


def test_threads_that_attached_meet_their_own(tiny_lm: LanguageModel) -> None:
    hf, mine, other = tiny_lm.hf, gated(12), gated(12, seed=7)
    rolled, place = IDS.roll(1, 0), {"layer": 0, "site": "resid_pre"}

    def logits(ids: Tensor, *attached: Any) -> Tensor:
        with torch.no_grad(), ExitStack() as blocks:
            for each in attached:
                blocks.enter_context(each)
            return hf(ids).logits

    alone = [logits(IDS, sae.attach(hf, **place, replace=True)) for sae in (mine, other)]
    assert (alone[0] - alone[1]).abs().max() > 0.1
    with ThreadPoolExecutor(1) as pool, mine.attach(hf, **place, replace=True) as seen:
        wanted = logits(rolled)
        features = seen.features
        block = other.attach(hf, **place, replace=True)
        # Not to the bit: another thread's sums may be split otherwise.
        torch.testing.assert_close(pool.submit(logits, IDS, block).result(), alone[1], **TOLERANCE)
        assert seen.features is features
        # A thread that attached nothing runs the model as it is now; readers keep their own pass.
        torch.testing.assert_close(pool.submit(logits, IDS).result(), alone[0], **TOLERANCE)
        assert seen.features is features
        assert torch.equal(
            pool.submit(lambda: seen.activations).result(),
            hf.transformer.wte(IDS) + hf.transformer.wpe.weight[:9],
        )
        assert torch.equal(logits(rolled), wanted)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_z"])
def test_an_analysis_of_an_edited_model_edits_once(site: Site, tiny_lm: LanguageModel) -> None:
    """`Splice` replays modules whose outputs were edited already."""
    outer, inner = gated(12), gated(12, seed=7)
    with outer.attach(tiny_lm, 0, site, replace=True):
        splice = Splice(tiny_lm, IDS, layer=1, site="mlp_out")
        assert torch.equal(splice.run(splice.x), splice.logits)
        assert torch.equal(splice.logits, tiny_lm.logits(IDS))
        (found,) = fidelity(tiny_lm, [inner], SEQUENCES, layer=0, site=site, n_tokens=10**6)
        clean = Splice(tiny_lm, IDS, layer=0, site=site)
        assert torch.equal(clean.run(clean.x), clean.logits)
    assert found.fidelity.ce_sae != found.fidelity.ce_clean


# Several at once


def test_saes_at_two_places_each_do_their_part(tiny_lm: LanguageModel) -> None:
    hf, low, high = tiny_lm.hf, gated(12), gated(12, seed=9)
    with torch.no_grad():
        with low.attach(hf, 0, "mlp_out", replace=True) as below:
            hf(IDS)
            with high.attach(hf, 1, "resid_post") as above:
                logits = hf(IDS).logits
            assert torch.equal(hf(IDS).logits, logits)
        assert not torch.equal(hf(IDS).logits, logits)
    splice = Splice(tiny_lm, IDS, layer=0, site="mlp_out")
    read = torch.where((IDS != 0)[..., None], low(splice.x), splice.x)
    torch.testing.assert_close(below.activations, splice.x)
    seen: list[Tensor] = []
    with hooked(tiny_lm._tap(1, "resid_post"), seen.append):
        torch.testing.assert_close(splice.run(read), logits, **TOLERANCE)
    torch.testing.assert_close(above.activations, seen[0], **TOLERANCE)


# Gradients


def test_features_have_gradients_where_the_caller_has_them_on(tiny_lm: LanguageModel) -> None:
    hf, sae = copy.deepcopy(tiny_lm.hf), gated(12)
    for grad in (nullcontext, torch.no_grad, torch.inference_mode):
        with grad(), sae.attach(hf, 1, "resid_pre") as attached:
            hf(IDS)
        assert attached.features.requires_grad == (grad is nullcontext)
        assert attached.features is attached.features
    with sae.attach(hf, 1, "resid_pre") as attached:
        hf(IDS)
    (slope,) = torch.autograd.grad(attached.features.sum(), hf.transformer.wte.weight)
    assert slope.abs().max() > 0
    hf.requires_grad_(False)
    with sae.attach(hf, 1, "resid_pre") as attached:
        hf(IDS)
    assert not attached.features.requires_grad


@pytest.mark.parametrize("kind", [GatedSAE, ReluSAE])
@pytest.mark.parametrize("options", [{"replace": True}, {"steer": PUSHES[1:]}, {"steer": PUSHES}])
def test_gradients_go_through_what_the_model_reads(
    options: Any, kind: Any, tiny_lm: LanguageModel
) -> None:
    hf = copy.deepcopy(tiny_lm.hf).double().requires_grad_(False)
    sae = kind(12, 24).double()
    perturb_(sae)
    embedding = hf.transformer.wte.weight.requires_grad_()

    def loss() -> Tensor:
        with sae.attach(hf, 1, "resid_pre", **options):
            return hf(IDS).logits.log_softmax(-1)[..., 3].mean()

    loss().backward()
    for parameter in (embedding, sae.W_dec, sae.b_dec):
        assert parameter.grad is not None
        found = parameter.grad.flatten().tolist()
        for first in range(0, len(found), 60):  # embeddings of every fifth id; every fifth latent
            entries = parameter.data.view(-1)[first:]
            wanted = slopes(entries, lambda: float(loss().detach()), 3)
            assert found[first : first + 3] == pytest.approx(wanted, abs=1e-7)
        assert any(found)


def test_with_replace_the_logits_have_a_gradient_to_the_features(tiny_lm: LanguageModel) -> None:
    hf = copy.deepcopy(tiny_lm.hf).double()
    sae = GatedSAE(12, 24).double()
    perturb_(sae)
    with sae.attach(hf, 1, "resid_post", replace=True) as attached:
        logit = hf(IDS).logits[0, -1, 7]
        (slope,) = torch.autograd.grad(logit, attached.features)
    position, latent = 8, int(attached.features[0, 8].argmax())
    found = []
    for change in (1e-5, -1e-5):
        # One feature a little stronger, at one position: the same that `b_dec` would add there.
        with torch.no_grad(), sae.attach(hf, 1, "resid_post", replace=True) as attached:
            moved = torch.zeros(4, 9, 12, dtype=torch.float64)
            moved[0, position] = change * sae.W_dec[latent]
            with hooked(load_tap(hf), lambda x, moved=moved: x + moved):
                found.append(float(hf(IDS).logits[0, -1, 7]))
    assert float(slope[0, position, latent]) == pytest.approx(
        (found[0] - found[1]) / 2e-5, abs=1e-7
    )
    assert not slope[0, 0].any()  # BOS


def load_tap(hf: Any) -> Any:
    from gsae_core.lm.model import model_of

    return model_of(hf)._tap(1, "resid_post")


def test_gradient_checkpointing_repeats_the_same_edit(tiny_lm: LanguageModel) -> None:
    hf, sae = copy.deepcopy(tiny_lm.hf), gated(12)
    grads = []
    for _ in range(2):
        hf.train().zero_grad()
        for module in hf.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with left_as_it_was(hf), sae.attach(hf, 1, "mlp_out", replace=True):
            loss = hf(IDS, use_cache=False).logits.square().mean()
            # As on a GPU, in a thread that began no pass.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        grads.append(hf.transformer.wte.weight.grad.clone())
        hf.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(*grads)


# Nothing stays


class Stop(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("where", ["block", "forward", "sae", "after the site"])
def test_nothing_stays_hooked_after_an_exception(
    where: str, error: type[BaseException], tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, sae = tiny_lm.hf, gated(12)
    with torch.no_grad():
        before = hf(IDS).logits

    def fail(*_: Any, **__: Any) -> Any:
        raise error("here")

    broken: dict[str, Any] = {
        "forward": (type(hf.transformer.h[0].attn), "forward"),
        "sae": (GatedSAE, "encode"),
        "after the site": (type(hf.lm_head), "forward"),
    }

    def work() -> None:
        with sae.attach(hf, 1, "resid_pre", replace=True):
            hf(IDS)
            if where == "block":
                fail()
            kind, name = broken[where]
            monkeypatch.setattr(kind, name, fail)
            hf(IDS)

    with left_as_it_was(hf), torch.no_grad(), pytest.raises(error, match="here"):
        work()
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits, before)


def test_a_refused_attachment_hooks_nothing(tiny_lm: LanguageModel) -> None:
    hf, sae = tiny_lm.hf, gated(12)
    with left_as_it_was(hf):
        with pytest.raises(InputError), sae.attach(hf, 7, "resid_pre"):
            pass
        with pytest.raises(InputError), sae.attach(hf, 1, "mlp_hidden"):
            pass
        sae.attach(hf, 1, "resid_pre")  # without `with`, nothing happens
        gc.collect()


def test_a_model_in_training_stays_in_training(tiny_lm: LanguageModel) -> None:
    hf = copy.deepcopy(tiny_lm.hf).train()
    with left_as_it_was(hf), gated(12).attach(hf, 1, "resid_pre"):
        assert hf.training
        hf(IDS)


def test_compiled_models_run_uncompiled_within_and_compiled_after(tiny_lm: LanguageModel) -> None:
    hf, sae = copy.deepcopy(tiny_lm.hf), gated(12)
    n_compiled = []

    def backend(graph: Any, _: Any) -> Any:
        n_compiled.append(1)
        return graph.forward

    with torch.no_grad():
        clean = hf(IDS).logits
        with sae.attach(hf, 1, "resid_pre", replace=True):
            wanted = hf(IDS).logits
        compiled = torch.compile(hf, backend=backend)
        with sae.attach(hf, 1, "resid_pre", replace=True):
            assert torch.equal(compiled(IDS).logits, wanted)
        assert not n_compiled  # else the hooks would be part of the compiled code
        torch.testing.assert_close(compiled(IDS).logits, clean)
        assert n_compiled
        with left_as_it_was(hf), sae.attach(compiled, 1, "resid_pre", replace=True):
            assert torch.equal(compiled(IDS).logits, wanted)
        torch.testing.assert_close(compiled(IDS).logits, clean)


def test_blocks_that_overlap_end_in_any_order(tiny_lm: LanguageModel) -> None:
    hf, looks, replaces = copy.deepcopy(tiny_lm.hf), gated(12), gated(12, seed=3)
    compiled = torch.compile(hf, backend="eager")
    stance = torch._dynamo.eval_frame._stance.stance
    with torch.no_grad():
        clean = compiled(IDS).logits
        with replaces.attach(hf, 1, "resid_pre", replace=True):
            wanted = hf(IDS).logits
        with ExitStack() as second:
            with ExitStack() as first:
                first.enter_context(looks.attach(hf, 1, "resid_pre"))
                second.enter_context(replaces.attach(compiled, 1, "resid_pre", replace=True))
            assert torch.equal(compiled(IDS).logits, wanted)
        assert torch._dynamo.eval_frame._stance.stance == stance
        torch.testing.assert_close(compiled(IDS).logits, clean)


def test_a_deep_copy_made_within_is_not_attached_to(tiny_lm: LanguageModel) -> None:
    with torch.no_grad():
        clean = tiny_lm.hf(IDS).logits
        with gated(12).attach(tiny_lm.hf, 1, "resid_pre", replace=True) as attached:
            tiny_lm.hf(IDS[:1])
            assert torch.equal(copy.deepcopy(tiny_lm.hf)(IDS).logits, clean)
            assert len(attached.features) == 1


# Mistakes


def entering(sae: SAE, *args: Any, **named: Any) -> str:
    """Return the sentence with which an attachment is refused."""
    return refusal(attach(sae, *args, **named).__enter__)


def test_special_ids_are_numbers(tiny_lm: LanguageModel) -> None:
    strings: Any = iter(["<s>"])  # a list would be refused by the tests' own check of types
    assert entering(gated(12), tiny_lm, 0, "resid_pre", special_ids=strings) == (
        "expected token ids in special_ids, got something else ('str' object cannot be interpreted "
        "as an integer); give numbers, as tokenizer.convert_tokens_to_ids() returns them"
    )


def test_each_mistake_is_one_sentence(tiny_lm: LanguageModel) -> None:
    hf, sae = tiny_lm.hf, gated(12)
    assert entering(sae, "gpt2", 0, "resid_pre") == (
        "expected a language model to attach to, got the name 'gpt2'; load it first, with "
        "gsae_core.load_model() or transformers"
    )
    assert entering(sae, hf, 2, "resid_pre").startswith("expected a layer from 0 to 1, got 2 (")
    assert entering(gated(13), hf, 0, "resid_pre") == (
        "expected SAE 'GatedSAE' to take activations of width 12, as blocks.0.hook_resid_pre has, "
        "got d_in=13; was it trained on another model or site?"
    )
    assert "a Hugging Face causal LM, got Linear" in entering(sae, nn.Linear(3, 3), 0, "resid_pre")
    five = [Intervention(i, "add", 1.0, 1.0) for i in range(5)]
    assert "at most 3 features to steer at once, got 5" in entering(
        sae, hf, 0, "resid_pre", steer=five
    )


def arguments_of_other_kinds(hf: Any) -> list[dict[str, Any]]:
    one = Intervention(3, "add", 1.0, 1.0)
    cases: list[dict[str, Any]] = [{"layer": layer} for layer in ("1", None, 1.0, True)]
    cases += [{"steer": steer} for steer in (None, one, [(3, "add", 1.0, 1.0)])]
    other: list[dict[str, Any]] = [{"latent": 3.5}, {"latent": True}, {"strength": "1"}]
    other += [{"unit": unit} for unit in (float("nan"), 0.0, -1.0, float("inf"))]
    cases += [{"steer": [one._replace(**changed)]} for changed in other]
    cases += [{"special_ids": ids} for ids in (5, "abc", [None], [10**30])]
    return [*cases, {"replace": "all"}, {"tokenizer": "gpt2"}, {"sae": hf}]


@pytest.mark.usefixtures("as_users_run_it")
def test_arguments_of_other_kinds_are_refused(tiny_lm_folder: Path) -> None:
    hf = load_model(str(tiny_lm_folder)).hf
    place: dict[str, Any] = {
        "sae": GatedSAE(12, 24), "model": hf, "layer": 1, "site": "resid_pre"
    }  # fmt: skip

    def enter(case: dict[str, Any]) -> None:
        gsae_core.attach(**place | case).__enter__()

    found = [refusal(enter, case) for case in arguments_of_other_kinds(hf)]
    layer, feature = "expected a layer from 0 to 1, got ", "expected a feature from 0 to 23, got "
    steer = "expected a list of Intervention, got "
    amount = "expected a number as strength and one above 0 as unit, got "
    ids = "expected token ids in special_ids, got something else ("
    wanted = [
        *(layer + got for got in ("'1'", "None", "1.0", "True")),
        *(steer + got for got in ("None; ", "Intervention(latent=3", "[(3, 'add', 1.0, 1.0)]; ")),
        *(feature + got for got in ("3.5; ", "True; ")),
        *(amount + got for got in ("'1' and", "1.0 and nan", "1.0 and 0.0", "1.0 and -1.0")),
        amount + "1.0 and inf; intervention() gives the feature's unit",
        *[ids] * 4,
        "expected replace=True or replace=False, got 'all'; see help(gsae_core.attach)",
        "expected a loaded tokenizer, got 'gpt2'; see ",
        "expected an SAE, as gsae_core.load_sae() returns it, got GPT2LMHeadModel(",
    ]
    for said, start in zip(found, wanted, strict=True):
        assert said.startswith(start)


def test_encoders_and_wrappers_are_refused(tiny_lm: LanguageModel) -> None:
    from transformers import BertConfig, BertForMaskedLM

    shape: Any = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=40, num_hidden_layers=1, **shape))
    assert entering(gated(12), bert, 0, "resid_pre") == (
        "expected a causal language model, got 'bert' in 'BertForMaskedLM'; choose a model that "
        "predicts the next token from those before it"
    )

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model, self.config = nn.Module(), tiny_lm.hf.config
            self.base_model.model = tiny_lm.hf

    said = entering(gated(12), Wrapper(), 0, "resid_pre")
    assert said.startswith("expected a gpt2 model as transformers builds it, got Wrapper without")
    assert said.endswith("; pass the model inside the wrapper")


def test_an_sae_on_another_device_is_refused(tiny_lm: LanguageModel) -> None:
    sae = gated(12).to("meta")
    with left_as_it_was(tiny_lm.hf), sae.attach(tiny_lm.hf, 1, "resid_pre"):
        assert refusal(tiny_lm.hf, IDS) == (
            "expected the SAE on cpu, where the model computes blocks.1.hook_resid_pre, got it on "
            "meta; move it with sae.to('cpu')"
        )


def test_there_is_nothing_to_read_before_a_pass(tiny_lm: LanguageModel) -> None:
    with gated(12).attach(tiny_lm.hf, 1, "resid_pre") as attached:
        assert refusal(lambda: attached.features) == (
            "expected a pass of the model up to blocks.1.hook_resid_pre since the SAE was "
            "attached, got none; call the model first"
        )
        tiny_lm.logits(IDS)
        tiny_lm.harvest(IDS, layer=0, site="resid_pre")  # stops before the site
        assert "got none; call the model" in refusal(attached.codes)


def test_the_package_gives_what_the_method_is_short_for() -> None:
    assert gsae_core.attach is attach
    assert "attach" in gsae_core.__all__
