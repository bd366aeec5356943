"""The script that makes the catalogue of public SAEs from SAELens' list."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gsae_core.checkpoints.catalog import Release
from scripts import make_catalogue
from scripts.make_catalogue import catalogue, template, written


def release(repo: str, model: str, func: str | None, **saes: tuple[str, float]) -> dict[str, Any]:
    listed = [{"id": name, "path": path, "l0": l0} for name, (path, l0) in saes.items()]
    return {"repo_id": repo, "model": model, "conversion_func": func, "saes": listed}


QWEN = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
LIST = {
    "qwen-50": release(
        QWEN,
        "Qwen/Qwen3-1.7B-Base",
        "qwen_scope",
        layer0=("layer0.sae.pt", 50),
        layer1=("layer1.sae.pt", 50),
    ),
    "scope": release(
        "google/gemma-scope-9b-it-res",
        "gemma-2-9b",
        "gemma_2",
        a=("layer_9/width_16k/average_l0_88", 88),
        b=("layer_20/width_1m/average_l0_14", 14),
        c=("embedding/width_4k/average_l0_6", 6),
    ),
    # The same files again, under another name.
    "scope-canonical": release(
        "google/gemma-scope-9b-it-res",
        "gemma-2-9b-it",
        "gemma_2",
        a=("layer_9/width_16k/average_l0_88", 88),
    ),
    "gone": release("mwhanna/t", "qwen3-4b", "mwhanna_transcoder", a=("layer_0.safetensors", 1)),
    "all": release("google/scope-2", "m", "gemma_3", a=("transcoder_all/layer_0_width_16k", 1)),
}


def test_an_entry_holds_what_the_list_says_and_what_names_say() -> None:
    scope, qwen = sorted(catalogue(LIST, []), key=lambda entry: entry["repo"].lower())
    assert scope["model"] == "google/gemma-2-9b-it"
    assert (scope["site"], scope["layers"], scope["l0"]) == ("resid_post", [9, 20], [14, 88])
    assert (scope["widths"], scope["count"]) == ([2**14, 2**20], 2)
    assert scope["paths"] == ["layer_{layer}/width_{width}/average_l0_{l0}"]
    assert scope["sae_lens"] == ["scope", "scope-canonical"]
    assert (qwen["title"], qwen["architecture"], qwen["widths"]) == ("Qwen Scope", "topk", [32768])
    assert qwen["paths"] == ["layer{layer}.sae.pt"]


def test_what_the_list_does_not_say_is_kept_in_its_place_and_what_it_lost_is_lost() -> None:
    ours = [
        {"title": "Elsewhere", "where": "az://x", "layout": "openai", "model": "m"},
        {"title": "Lost", "repo": "a/b", "layout": "sae_lens", "model": "m", "sae_lens": ["lost"]},
        {"title": "Mine", "repo": QWEN, "model": "x", "widths": [7], "sae_lens": ["qwen-50"]},
    ]
    made = catalogue(LIST, ours)
    assert [entry["title"] for entry in made] == ["Elsewhere", "Mine", "Gemma Scope"]
    assert (made[1]["widths"], made[1]["model"]) == ([7], "Qwen/Qwen3-1.7B-Base")
    text = written(made)
    read = [Release.model_validate(entry) for entry in yaml.safe_load(text)]
    assert [entry.count for entry in read] == [None, 2, 2]
    assert written(catalogue(LIST, yaml.safe_load(text))) == text


@pytest.mark.parametrize(
    ("path", "braces"),
    [
        ("blocks.8.hook_resid_pre_768", "blocks.{layer}.hook_resid_pre_{width}"),
        ("v5_128k_layer_11", "v5_128k_layer_{layer}"),
        ("2-res_sce-ajt", "{layer}-res_sce-ajt"),
        ("Llama3_1-8B-Base-L31A-32x", "Llama3_1-8B-Base-L{layer}A-32x"),
        ("0-Slimpajama-800M-x/L5R", "0-Slimpajama-800M-x/L{layer}R"),
        ("resid_post_layer_5/trainer_0_step_97", "resid_post_layer_{layer}/trainer_{n}_step_{n}"),
        (
            "resid_post_all/layer_3_width_1m_l0_big",
            "resid_post_all/layer_{layer}_width_{width}_l0_{l0}",
        ),
    ],
)
def test_a_path_has_braces_for_what_varies(path: str, braces: str) -> None:
    assert template(path) == braces


def test_a_check_names_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, ours = tmp_path / "list.yaml", tmp_path / "catalogue.yaml"
    listed.write_text(yaml.safe_dump(LIST))
    ours.write_text(
        "# Ours.\n\n- title: Elsewhere\n  where: az://x\n  layout: openai\n  model: m\n"
    )
    monkeypatch.setattr(make_catalogue, "CATALOGUE", ours)
    for words, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr("sys.argv", ["make_catalogue.py", str(listed), *words])
        assert make_catalogue.main() == code
        said = capsys.readouterr().out
        assert ("+- title: Qwen Scope\n" in said) == (code == 1)
        assert "no SAEs of one activation:\nall, gone\n" in said
    assert ours.read_text().startswith("# Ours.\n\n- title: Elsewhere\n  where: az://x\n")
