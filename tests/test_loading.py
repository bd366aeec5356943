"""Weights, configs and code of a model folder: what does not fit is a sentence, never a guess."""

import html
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from app_pages import edited, opened, text
from families import tiny
from safetensors.torch import load_file, save_file
from tiny_runs import small_run

from gsae_core.cli import main
from gsae_core.errors import InputError
from gsae_core.lm.model import load_model
from gsae_core.runs.run import Run

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2")
IDS = torch.tensor([[2, 3, 5, 7, 11]])

Weights = dict[str, torch.Tensor]


@pytest.fixture
def saved(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Save a tiny model of a family after changing the keys of its weights."""

    def save(family: str, change: Callable[[Weights], Weights], **config: Any) -> Path:
        folder = tmp_path / "model"
        tiny(family).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        configure(folder, **config)
        return folder

    return save


def configure(folder: Path, **fields: Any) -> None:
    with edited(folder / "config.json") as config:
        config |= fields


def same(weights: Weights) -> Weights:
    return weights


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load_model(str(folder))
    return str(error.value).replace(str(folder), "FOLDER")


# Keys


AGAIN = (
    "; save the whole model again with save_pretrained(), out of any wrapper and with adapters "
    "merged, or choose another checkpoint of it"
)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        # A layer of Llama has four projections of attention, three of the MLP and two norms; the
        # model two layers, an embedding, a norm and the output layer: 21.
        (
            lambda w: {f"_orig_mod.{key}": w[key] for key in w},
            "21 missing (lm_head.weight, model.embed_tokens.weight, "
            "model.layers.0.input_layernorm.weight, ...), 21 unexpected "
            "(_orig_mod.lm_head.weight, _orig_mod.model.embed_tokens.weight, "
            "_orig_mod.model.layers.0.input_layernorm.weight, ...)",
        ),
        (
            lambda w: {key: w[key] for key in w if "layers.1." not in key},
            "9 missing (model.layers.1.input_layernorm.weight, "
            "model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight, ...)",
        ),
        (
            lambda w: {**w, "model.layers.0.mlp.down_proj.lora_A.weight": torch.zeros(2, 12)},
            "1 unexpected (model.layers.0.mlp.down_proj.lora_A.weight)",
        ),
    ],
    ids=["wrapper", "layer", "adapter"],
)
def test_keys_that_do_not_fit_are_counted_and_the_first_named(
    saved: Callable[..., Path], change: Callable[[Weights], Weights], found: str
) -> None:
    assert refusal(saved("llama", change)) == (
        f"expected the weights of a LlamaForCausalLM in 'FOLDER', got keys that do not fit, {found}"
        + AGAIN
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_a_wrapper_are_refused_in_every_family(
    saved: Callable[..., Path], family: str
) -> None:
    said = refusal(saved(family, lambda w: {f"module.{key}": value for key, value in w.items()}))
    assert "unexpected (module." in said


def test_weights_of_another_shape_are_refused(saved: Callable[..., Path]) -> None:
    assert refusal(saved("llama", same, vocab_size=41)) == (
        "expected the weights of a LlamaForCausalLM in 'FOLDER', got keys that do not fit, 2 of "
        "another shape (lm_head.weight: (40, 12), not (41, 12), model.embed_tokens.weight: (40, "
        "12), not (41, 12))" + AGAIN
    )


def headless(weights: Weights) -> Weights:
    """As the model without its output layer saves them."""
    return {
        key.removeprefix("model."): value
        for key, value in weights.items()
        if not key.startswith("lm_head")
    }


@pytest.mark.parametrize("architectures", [["LlamaModel"], None])
def test_a_model_saved_without_its_output_layer_loads_only_where_that_is_tied(
    saved: Callable[..., Path], architectures: Any
) -> None:
    folder = saved("llama", headless, architectures=architectures)
    assert "got keys that do not fit, 1 missing (lm_head.weight)" in refusal(folder)
    configure(folder, tie_word_embeddings=True)
    model = load_model(str(folder))
    embedding = load_file(folder / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(model.hf.lm_head.weight, embedding)
    assert torch.equal(model.hf.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        # What transformers 2 to 4 saved beside the weights: causal masks, rotary tables.
        ("gpt2", ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias")),
        (
            "gpt_neox",
            ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"),
        ),
        ("gpt_neox", ("gpt_neox.layers.1.attention.rotary_emb.inv_freq",)),
        ("llama", ("model.layers.0.self_attn.rotary_emb.inv_freq",)),
        ("llama", ("model.layers.0.self_attn.rotary_emb.cos_cached",)),
    ],
)
def test_buffers_of_older_checkpoints_are_no_weights(
    saved: Callable[..., Path], family: str, keys: tuple[str, ...]
) -> None:
    folder = saved(family, lambda w: {**w, **{key: torch.ones(4) for key in keys}})
    model = load_model(str(folder))
    own = {key.partition(".")[2]: value for key, value in tiny(family).named_parameters()}
    for key, value in model.hf.named_parameters():
        assert torch.equal(value, own[key.partition(".")[2]])


def pickled(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def sharded(folder: Path) -> Path:
    """Cut the weights into files of one key each."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: f"model-{i:05}-of-{len(weights):05}.safetensors" for i, key in enumerate(weights)}
    for key, file in where.items():
        save_file({key: weights[key]}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kept", [pickled, sharded])
def test_shards_and_pickles_are_held_to_the_same(
    saved: Callable[..., Path], kept: Callable[[Path], Path]
) -> None:
    whole = load_model(str(kept(saved("llama", same)))).logits(IDS)
    assert torch.equal(whole, tiny("llama")(IDS).logits)
    shutil.rmtree(saved("llama", same))
    folder = kept(saved("llama", lambda w: {key: w[key] for key in w if "layers.1." not in key}))
    assert "9 missing (model.layers.1.input_layernorm.weight" in refusal(folder)


def test_an_adapter_beside_the_weights_is_not_left_out_in_silence(
    saved: Callable[..., Path],
) -> None:
    folder = saved("llama", same)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert refusal(folder) == (
        "expected the weights of one model, got an adapter beside them in 'FOLDER' "
        "(adapter_config.json); merge the two with merge_and_unload() and save the result"
    )


# Files


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
UNUSABLE = (
    "expected weights (model.safetensors) and a config.json that make a model in 'FOLDER', got "
    "some that do not ({}); download or save the model again, or install the package that it needs"
)
CONFIG = (
    "expected the config.json of a causal language model that transformers knows in 'FOLDER', got "
    "one that cannot be used ({}); choose another model, or download or save this one again"
)


def cut(name: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return change


def instead(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def quantised(method: str, **fields: Any) -> Callable[[Path], None]:
    config = {"quant_method": method, **fields}
    return lambda folder: configure(folder, quantization_config=config)


def and_then(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            instead("model.safetensors", POINTER),
            "expected the file itself in FOLDER/model.safetensors, got Git LFS's pointer to it; "
            "fetch it with `git lfs pull`",
        ),
        (
            and_then(pickled, instead("pytorch_model.bin", POINTER)),
            "expected the file itself in FOLDER/pytorch_model.bin, got Git LFS's pointer to it; "
            "fetch it with `git lfs pull`",
        ),
        (
            and_then(sharded, instead("model-00001-of-00021.safetensors", POINTER)),
            "expected the file itself in FOLDER/model-00001-of-00021.safetensors, got Git LFS's "
            "pointer to it; fetch it with `git lfs pull`",
        ),
        (
            and_then(
                sharded, lambda folder: (folder / "model-00001-of-00021.safetensors").unlink()
            ),
            UNUSABLE.format(
                "FileNotFoundError: No such file or directory: "
                "FOLDER/model-00001-of-00021.safetensors"
            ),
        ),
        (
            instead("tokenizer.json", POINTER),
            "expected the file itself in FOLDER/tokenizer.json, got Git LFS's pointer to it; "
            "fetch it with `git lfs pull`",
        ),
        (
            cut("model.safetensors", 5000),
            UNUSABLE.format(
                "SafetensorError: Error while deserializing header: incomplete metadata, file not "
                "fully covered"
            ),
        ),
        (and_then(pickled, cut("pytorch_model.bin", 0)), UNUSABLE.format("EOFError")),
        (
            and_then(pickled, instead("pytorch_model.bin", "nonsense")),
            UNUSABLE.format("UnpicklingError: a file of more than tensors, or damaged"),
        ),
        (
            and_then(sharded, instead("model.safetensors.index.json", "{")),
            UNUSABLE.format(
                "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 "
                "column 2 (char 1)"
            ),
        ),
        (
            lambda folder: configure(folder, hidden_act="nonsense"),
            UNUSABLE.format("KeyError: 'nonsense'"),
        ),
        (
            instead("config.json", "{"),
            CONFIG.format(
                "OSError: It looks like the config file at 'FOLDER/config.json' is not a valid "
                "JSON file"
            ),
        ),
        (
            lambda folder: configure(folder, hidden_size="wide"),
            CONFIG.format(
                "StrictDataclassFieldValidationError: Validation error for field 'hidden_size': "
                "TypeError: Field 'hidden_size' expected int, got str (value: 'wide')"
            ),
        ),
        (
            instead("tokenizer.json", "{"),
            "expected a tokenizer (tokenizer.json) beside the model in 'FOLDER', found none that "
            "can be read (JSONDecodeError: Expecting property name enclosed in double quotes: line "
            "1 column 2 (char 1)); save it there with tokenizer.save_pretrained()",
        ),
    ],
)
def test_damaged_files_are_one_sentence(
    saved: Callable[..., Path], spoil: Callable[[Path], Any], sentence: str
) -> None:
    folder = saved("llama", same)
    spoil(folder)
    assert refusal(folder) == sentence


@pytest.mark.parametrize(
    ("spoil", "package"),
    [
        (quantised("bitsandbytes", load_in_4bit=True), "bitsandbytes"),
        (quantised("gptq", bits=4, group_size=32), "optimum"),
        (quantised("awq", bits=4, group_size=32), "gptqmodel"),
    ],
)
def test_a_package_that_is_not_here_is_one_sentence(
    saved: Callable[..., Path],
    spoil: Callable[[Path], None],
    package: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    folder = saved("llama", same)
    spoil(folder)
    said = refusal(folder)
    assert "got some that do not (ImportError: " in said
    assert package in said
    assert said.endswith("or install the package that it needs")


def test_quantised_weights_that_cannot_be_used_here_are_one_sentence(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("HIGGS quantization is only supported on GPU.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    folder = saved("llama", same)
    with pytest.raises(NotImplementedError):  # of other weights it would be our mistake
        load_model(str(folder))
    quantised("higgs", bits=4)(folder)
    assert refusal(folder) == (
        "expected a model that can be computed with here, got 'FOLDER', quantised by higgs "
        "(NotImplementedError: HIGGS quantization is only supported on GPU); choose the model that "
        "it was made from, or another machine"
    )


def test_the_command_line_says_it_in_one_line_and_leaves_no_run(
    saved: Callable[..., Path],
    small_text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = saved("gpt2", lambda w: {f"_orig_mod.{key}": w[key] for key in w})
    capfd.readouterr()
    assert main.main(small_run(folder, small_text, tmp_path / "run")) == main.MISTAKE
    loading, sentence = capfd.readouterr().err.splitlines()
    assert loading == "loading the model and the text"
    assert sentence == f"gsae_core: {refusal(folder).replace('FOLDER', str(folder))}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("page", ["pages/6_Prompt.py", "pages/7_Steer.py"])
def test_a_page_says_it_where_the_model_has_changed_since(
    saved: Callable[..., Path], finished: Run, root: Path, page: str
) -> None:
    folder = saved("gpt2", lambda w: {f"module.{key}": w[key] for key in w})
    with edited(finished.folder / "config.json") as config:
        config["model"]["name"] = str(folder)
    at = opened(page, run=finished.id, text="w1 w2", sae="gated-0.05", feature="1")
    assert "unexpected (module." in html.unescape(text(at))


# Code that comes with a model


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that the code of `with_code` writes."""
    return tmp_path / "the-folders-code-ran"


def with_code(folder: Path, marker: Path, file: str = "config.json", **auto_map: Any) -> Path:
    """Give a model folder Python of its own, named by one of its JSON files."""
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with edited(folder / file) as fields:
        fields["auto_map"] = auto_map
    return folder


OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(question: str = "") -> str:
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr("builtins.input", asked)


@pytest.mark.usefixtures("nobody_answers")
def test_code_beside_a_known_model_is_left_alone(saved: Callable[..., Path], marker: Path) -> None:
    folder = with_code(saved("llama", same), marker, **OWN)
    with_code(folder, marker, "generation_config.json", custom_generate="own.generate")
    assert torch.equal(load_model(str(folder)).logits(IDS), tiny("llama")(IDS).logits)
    assert not marker.exists()


@pytest.mark.usefixtures("nobody_answers")
def test_a_model_that_is_only_its_own_code_is_refused(
    saved: Callable[..., Path], marker: Path
) -> None:
    folder = with_code(saved("llama", same, model_type="own"), marker, **OWN)
    assert refusal(folder).startswith(CONFIG.partition("{}")[0])
    assert not marker.exists()


def test_nothing_is_asked(
    saved: Callable[..., Path],
    marker: Path,
    small_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = with_code(
        saved("llama", same), marker, "tokenizer_config.json", AutoTokenizer=["own.Words", None]
    )
    with edited(folder / "tokenizer_config.json") as fields:
        fields["tokenizer_class"] = "Words"
    words = small_run(folder, small_text, tmp_path / "run")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    code = main.main(words)
    assert asked == []
    assert code == main.MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"gsae_core: expected a tokenizer (tokenizer.json) beside the model in {str(folder)!r}, "
        "found none that can be read (ValueError: "
    )
    assert not marker.exists()
