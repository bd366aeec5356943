"""What the Train page asks before a run: models, room, time, earlier results, the first lines."""

import csv
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import config, evaluation

from gsae_core.app.components import read_choice
from gsae_core.config import DataConfig, RunConfig
from gsae_core.errors import InputError
from gsae_core.lm import preview as previewing
from gsae_core.lm.catalog import (
    FAMILIES,
    ModelShape,
    cached_models,
    check_family,
    choices,
    count_parameters,
    known_models,
    model_facts,
)
from gsae_core.lm.preview import preview, preview_within
from gsae_core.machine import Machine
from gsae_core.runs.plan.cost import (
    Finished,
    Fix,
    Pace,
    Preflight,
    alike,
    expected_l0,
    gpu_memory,
    operations,
    preflight,
    streamed,
)

ROOMY = Machine(2, 10**12, 10**12, 10**12, ())
PACE = Pace(1e9, None)


def rows() -> list[dict[str, str]]:
    text = resources.files("gsae_core").joinpath("assets/models.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["name"])
def test_the_listed_parameters_are_those_of_the_listed_shape(row: dict[str, str]) -> None:
    def of(name: str) -> int:
        return int(row[name])

    n, d, mlp = of("layers"), of("d_model"), of("d_mlp")
    q, kv = of("heads") * of("head_dim"), of("kv_heads") * of("head_dim")
    ends = of("vocabulary") * d * (1 if row["tied"] == "yes" else 2)
    if row["family"] in ("gpt2", "gpt_neox"):
        # Four d x d and two d x 4d matrices with their biases, two norms; one more norm at the end.
        ends += 2 * d + (1024 * d if row["family"] == "gpt2" else 0)
        block = 12 * d * d + 13 * d
    else:
        norms = 4 if row["family"] in ("gemma2", "gemma3_text") else 2
        block = 2 * d * (q + kv) + 3 * d * mlp + norms * d
        block += q + 2 * kv if row["family"] == "qwen2" else 0  # biases of q, k and v
        block += (
            2 * of("head_dim") if row["family"] in ("qwen3", "gemma3_text") else 0
        )  # q, k norms
        ends += d
    assert of("parameters") == ends + n * block


def test_the_listed_families_are_those_that_can_be_trained_on() -> None:
    assert {model.family for model in known_models().values()} == set(FAMILIES)


def test_the_bundled_model_comes_first_and_is_counted_in_its_file() -> None:
    assert choices({})[0] == "bundled"
    facts = model_facts("bundled", {})
    assert facts.where == "bundled"
    assert facts.shape is not None
    assert facts.shape.n_layers == 4
    # 4 blocks of 12 d^2 + 13 d, a norm of 2 d; the rest are embeddings of d = 256 numbers each.
    assert facts.parameters is not None
    assert (facts.parameters - 4 * (12 * 256**2 + 13 * 256) - 2 * 256) % 256 == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 12, "num_layers": 3, "num_heads": 2},  # GPT-Neo
        {"d_model": 12, "n_layers": 3, "n_heads": 2},  # MPT
        {"d_model": 12, "num_layers": 3, "attention_heads": 2, "ffn_dim": 48},  # XGLM
        {"text_config": {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}},
    ],
)
def test_a_shape_is_read_under_its_names(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert model_facts(str(tmp_path), {}).shape == ModelShape(12, 48, 12, 3)


def test_a_listed_model_is_known_before_it_is_here() -> None:
    facts = model_facts("google/gemma-2-2b", {})
    assert (facts.where, facts.gated, facts.family) == ("hub", True, "gemma2")
    assert facts.shape == known_models()["google/gemma-2-2b"].shape
    assert model_facts("someone/else", {})[1:] == ("hub", None, None, None, None)


def test_a_local_folder_says_its_shape_and_size(tiny_lm_folder: Path) -> None:
    facts = model_facts(str(tiny_lm_folder), {})
    assert (facts.where, facts.family) == ("folder", "gpt2")
    assert facts.shape is not None
    assert (facts.shape.d_model, facts.shape.n_layers, facts.shape.d_mlp) == (12, 2, 20)
    # 40 + 16 embeddings of 12; per block 4 * 144 + 48 of attention, 2 * 240 + 32 of the MLP and
    # two norms of 24; a norm of 24 at the end.
    assert facts.parameters == 56 * 12 + 2 * (576 + 48 + 480 + 32 + 48) + 24


def test_damaged_weights_have_no_known_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert count_parameters(tmp_path) is None
    assert model_facts(str(tmp_path), {}).shape is None


def test_a_folder_whose_config_is_no_json_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert model_facts(str(tmp_path), {})[2:] == (None, None, None, None)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/x", "a\0b", ""])
def test_a_name_that_can_be_no_path_is_a_name_on_the_hub(name: str) -> None:
    assert model_facts(name, {}).where == "hub"


def test_models_in_the_cache_are_found_with_their_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "models--someone--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    fields = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3}
    (snapshot / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (snapshot / "model.safetensors").write_bytes(b"")
    tokenizer_only = tmp_path / "models--someone--tokenizer" / "snapshots" / "abc"
    tokenizer_only.mkdir(parents=True)
    (tokenizer_only / "config.json").write_text("{}", encoding="utf-8")
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path))
    found = cached_models()
    assert list(found) == ["someone/small"]
    assert choices(found)[1] == "someone/small"
    facts = model_facts("someone/small", found)
    assert facts.where == "cached"
    assert facts.shape is not None
    assert facts.shape.n_layers == 3
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path / "none"))
    assert cached_models() == {}


def flight(changed: RunConfig, here: Machine, *, model: str | None = None) -> Preflight:
    return preflight(changed, model_facts(model or changed.model.name, {}), here, PACE)


def replaced(part: str, **fields: Any) -> RunConfig:
    base = config()
    return base.model_copy(update={part: getattr(base, part).model_copy(update=fields)})


def test_memory_is_weights_step_chunk_and_model() -> None:
    memory, disk = flight(config(), ROOMY).bars
    sizes = memory.parts
    # d_in 256; four Gated SAEs of 512 (2 matrices, 3 vectors), four ReLU of 768 (2 and 1).
    learnt = 4 * (512 * 515 + 256) + 4 * (768 * 513 + 256)
    assert sizes["weights, gradients, moments"] == 4 * 4 * learnt
    assert sizes["one step"] == 4 * 3.5 * 2048 * (768 + 768)  # on each of two cores
    assert sizes["chunk of activations"] == 4 * 2 * (2**20 // 8) * 256
    assert sizes["language model"] == 4 * (model_facts("bundled", {}).parameters or 0)
    assert disk.parts == {
        "resumable state": 2 * 4 * 3 * learnt,
        "SAEs": 4 * learnt,
        "tokens": 2 * 2**20,
        "model": 0,
        "activations": 0,
    }
    cached = replaced("model", dtype="bfloat16").model_copy(update={"cache_activations": True})
    assert flight(cached, ROOMY).bars[1].parts["activations"] == 2 * 2**20 * 256


def test_time_is_operations_over_speed() -> None:
    shape = model_facts("bundled", {}).shape
    assert shape is not None
    assert flight(config(), ROOMY).seconds == operations(config(), shape) / 1e9


def test_what_does_not_fit_is_refused_with_changes_that_make_it_fit() -> None:
    need = flight(config(), ROOMY).bars[0].needed
    tight = ROOMY._replace(memory_free=need - 20_000_000)
    (refusal,) = flight(config(), tight).refusals
    assert refusal.sentence.startswith("expected memory for about ")
    # 20 MB less: dropping one of four lambdas frees a quarter of 55 MB; so does half the width.
    assert [fix.flag for fix in refusal.fixes] == ["sparsity", "width", "batch_size"]
    lambdas, width, batch = (fix.value for fix in refusal.fixes)
    saes = tuple(s for s in config().saes if f"{s.sparsity:g}" in lambdas.split())
    assert not flight(config().model_copy(update={"saes": saes}), tight).refusals
    assert not flight(config(width=int(width)), tight).refusals
    assert not flight(replaced("train", batch_size=int(batch)), tight).refusals
    need = flight(config(), ROOMY).bars[1].needed
    (refusal,) = flight(config(), ROOMY._replace(disk_free=need - 1)).refusals
    assert refusal.sentence.startswith("expected disk for about ")
    assert refusal.fixes


def test_a_gpu_is_held_against_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    here = ROOMY._replace(memory_free=0, gpus=("NVIDIA A, 100 MiB", "NVIDIA B, 900000 MiB"))
    assert gpu_memory(here, "auto") == ("NVIDIA A", 100 * 2**20)
    assert gpu_memory(here, "cpu") is None
    on_b = config().model_copy(update={"device": "cuda:1"})
    assert not flight(on_b, here).refusals
    assert flight(on_b, here).bars[0].label == "Memory of NVIDIA B"
    assert flight(config(), here).refusals


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:x"])
def test_a_device_there_is_not_is_refused(device: str) -> None:
    (refusal,) = flight(config().model_copy(update={"device": device}), ROOMY).refusals
    assert refusal.sentence.startswith("--device: expected a device of this machine (auto, cpu")
    assert refusal.fixes == (Fix("device", "auto"),)


def test_a_layer_the_model_lacks_is_refused_with_the_last() -> None:
    (refusal,) = flight(replaced("model", layer=7), ROOMY).refusals
    assert refusal.sentence == "--layer: expected 0 to 3, got 7; the model has 4 blocks"
    assert refusal.fixes == (Fix("layer", "3"),)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    fields = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    facts = model_facts(str(tmp_path), {})
    with pytest.raises(InputError, match="expected a causal language model, got 'bert'"):
        check_family(facts.name, facts.family)
    (refusal,) = preflight(config(), facts, ROOMY, PACE).refusals
    assert refusal.fixes == (Fix("model", "bundled"),)


def test_a_download_is_the_model_and_the_text() -> None:
    text = replaced("data", source="someone/texts")
    assert streamed("someone/texts")
    assert not streamed("stdlib")
    assert flight(config(), ROOMY).download == 0
    assert flight(text, ROOMY).download == 4 * 2**20
    gpt2 = flight(text, ROOMY, model="openai-community/gpt2")
    assert gpt2.download == 2 * 124_439_808 + 4 * 2**20


def test_nothing_is_claimed_of_a_model_that_is_not_known() -> None:
    unknown = flight(config(), ROOMY, model="someone/else")
    assert unknown == ((), 0, None, ())


def finished(name: str, shrink: float = 1.0) -> Finished:
    """Return a run with L0 of 12 (16) / lambda, times `shrink`, at lambda 0.1, 0.2, 0.4, 0.8."""
    run = config()
    evals = [evaluation(spec) for spec in run.saes]
    return Finished(name, run, [row | {"l0": row["l0"] * shrink} for row in evals])


def test_expected_l0_is_interpolated_in_log_lambda() -> None:
    spec = config().saes[0].model_copy(update={"sparsity": 0.3})
    # On a line in log-log, 12 / lambda stays 12 / lambda between its points: 40.
    found = expected_l0(spec, config().places[0], [finished("a"), finished("b", shrink=0.5)])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((20, 40))
    assert found.runs == ("a", "b")
    at_a_point = expected_l0(config().saes[0], config().places[0], [finished("a")])
    assert at_a_point is not None
    assert (at_a_point.low, at_a_point.high) == pytest.approx((120, 120))


@pytest.mark.parametrize("sparsity", [0.05, 0.9])
def test_nothing_is_expected_beyond_the_ends(sparsity: float) -> None:
    spec = config().saes[0].model_copy(update={"sparsity": sparsity})
    assert expected_l0(spec, config().places[0], [finished("a")]) is None


def test_runs_at_another_place_or_of_another_loss_say_nothing() -> None:
    spec = config().saes[0]
    assert alike(config(), config())
    assert not alike(config(), replaced("model", layer=1))
    assert not alike(config(), config().model_copy(update={"activation_scale": "none"}))
    mean = spec.model_copy(update={"loss_norm": "mean"})
    assert expected_l0(mean, config().places[0], [finished("a")]) is None


def test_saes_that_fire_on_nothing_or_were_not_measured_are_left_out() -> None:
    run = finished("a")
    spoilt = [row | {"l0": None if row["sparsity"] == 0.2 else 0.0} for row in run.evals]
    spec = config().saes[0]
    assert expected_l0(spec, config().places[0], [run._replace(evals=spoilt)]) is None


def test_ten_lines_of_the_standard_library_are_its_text(tmp_path: Path) -> None:
    found = preview(DataConfig(), "bundled")
    assert len(found.lines) == 10
    assert all(0 < len(line) <= 40 for line in found.lines)
    assert found.n_tokens is not None
    assert found.n_tokens > 10**6


def test_lines_put_together_are_the_text_they_were_cut_from(tmp_path: Path) -> None:
    text = "".join(f"def f{i}(x):\n\treturn 'é 漢 🙂' * {i}\n" for i in range(40))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = preview(DataConfig(source=str(tmp_path / "a.txt")), "bundled")
    assert len(found.lines) == 10
    assert text.startswith("".join(token for line in found.lines for token in line))
    # The file is its own sample, so the estimate is the count.
    assert found.sampled_bytes == len(text.encode())
    assert found.n_tokens == found.sampled_tokens


def test_token_arrays_are_shown_in_the_words_of_the_tokenizer(tmp_path: Path) -> None:
    ids = np.arange(100, 160, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    found = preview(DataConfig(source=str(tmp_path / "ids.npy")), "bundled")
    tokenizer = previewing.load_tokenizer("bundled")
    assert found.lines[0] == [tokenizer.decode([i]) for i in range(100, 140)]
    assert found.sampled_bytes == 0
    # 128 bytes of header besides 60 ids of 2 bytes.
    assert found.n_tokens == (128 + 120) // 2


def test_how_much_a_table_holds_takes_reading_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x = 1"}\n', encoding="utf-8")
    found = preview(DataConfig(source=str(tmp_path / "a.jsonl")), "bundled")
    assert ["".join(line) for line in found.lines] == ["x = 1"]
    assert found.n_tokens is None


def test_a_folder_without_a_tokenizer_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"expected a tokenizer in .*: No such file"):
        preview(DataConfig(), str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"expected a tokenizer in .*, got something else"):
        preview(DataConfig(), str(tmp_path))


def test_an_empty_corpus_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="expected some text in"):
        preview(DataConfig(source=str(tmp_path / "a.txt")), "bundled")


def test_a_tokenizer_that_cannot_be_fetched_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for error, sentence in (
        (LocalEntryNotFoundError("x"), "but we are offline and it is not in the cache; give"),
        (HFValidationError("x"), "expected a Hub repository as OWNER/NAME, got 'someone/model'"),
    ):

        def refuse(*_: object, error: Exception = error, **__: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
        with pytest.raises(InputError, match=sentence):
            preview(DataConfig(), "someone/model")


def test_a_preview_in_its_own_process_is_the_same_or_the_same_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n", encoding="utf-8")
    data = DataConfig(source=str(tmp_path / "a.txt"))
    assert preview_within(60, data, "bundled") == preview(data, "bundled")
    gone = DataConfig(source=str(tmp_path / "b.txt"))
    with pytest.raises(InputError, match=r"nothing at .*: check the path"):
        preview_within(60, gone, "bundled")


def test_a_preview_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected the first lines of stdlib as tokens of bundled"):
        preview_within(0.001, DataConfig(), "bundled")


def test_a_preview_that_breaks_says_its_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'MemoryError: all of it' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(InputError, match="got a failure: MemoryError: all of it"):
        preview_within(60, DataConfig(), "bundled")


@pytest.mark.parametrize(
    ("sent", "choice"),
    [
        ("site attn_z", ("site", "attn_z")),
        ("layer 3", ("layer", 3)),
        ("layer 4", None),
        ("layer -1", None),
        ("layer x", None),
        ("site <img>", None),
        ("", None),
        (None, None),
        ({"site": "attn_z"}, None),
    ],
)
def test_only_a_place_there_is_can_be_clicked(sent: object, choice: object) -> None:
    assert read_choice(sent, 4) == choice
