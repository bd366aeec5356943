"""A hundred thousand made-up vectors, from a folder to the pages, by the commands a user gives."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from app_pages import opened, text
from PIL import Image

from gsae_core.cli.main import main
from gsae_core.runs.run import Run
from gsae_core.text import count

pytestmark = pytest.mark.slow

N, D_IN, N_KINDS = 100_000, 32, 64
NAMES = [f"{what} {how}" for what in ("cat", "tree", "car", "sea") for how in range(N_KINDS // 4)]
NAMES[5] = "<b>fat</b> & $loud$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of two kinds of picture each, told by their captions, with four pictures beside."""
    made = tmp_path_factory.mktemp("vectors") / "embeddings"
    made.mkdir()
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, N_KINDS, (N, 2))
    axes = rng.normal(size=(N_KINDS, D_IN)).astype(np.float32)
    weights = rng.uniform(1, 2, (N, 2, 1)).astype(np.float32)
    x = (axes[kinds] * weights).sum(1) + 0.05 * rng.normal(size=(N, D_IN)).astype(np.float32)
    for k, part in enumerate(np.split(x.astype(np.float16), 4)):
        np.save(made / f"part-{k}.npy", part)
    for k in range(4):
        out = io.BytesIO()
        Image.new("RGB", (300, 200), (60 * k, 0, 0)).save(out, "PNG")
        (made / f"{k}.png").write_bytes(out.getvalue())
    lines = [
        json.dumps({"caption": f"{NAMES[one]} and {NAMES[two]}", "image": f"{one % 4}.png"})
        for one, two in kinds
    ]
    (made / "captions.jsonl").write_text("\n".join(lines))
    return made


@pytest.fixture(scope="module")
def done(folder: Path) -> Iterator[Run]:
    """A run on them, trained, evaluated and indexed by commands."""
    root = folder.parent / "runs"
    train = f"--arch gated relu --sparsity 0.2 --width {N_KINDS} --tokens {N} --batch-size 1000"
    words = ["train", "--activations", str(folder), *train.split(), "--lr", "3e-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSAE_RUNS", str(root))
        assert main([*words, "--device", "cpu", "--out", str(root / "done")]) == 0
        assert main(["index", str(root / "done")]) == 0
        yield Run.open(root / "done")


def test_its_features_are_told_by_captions_and_pictures(done: Run) -> None:
    index = done.features("gated-0.2")
    assert index.n_tokens == N
    (row,) = [row for row in done.evals() if row["name"] == "gated-0.2"]
    assert row["fvu"] < 0.2
    # The most specific feature of a word fires on captions with it.
    best = index.by_text("cat 3")
    number = int(best["feature"].iloc[0])
    shown = index.feature(number).top(5)
    assert all("cat 3" in example.tokens[0] for example in shown)
    said = text(opened("pages/5_Features.py", run="done", feature=str(number)))
    assert "cat 3 and " in said or " and cat 3" in said
    assert "data:image/jpeg;base64," in said
    assert f"of {N:,} vectors" in said
    assert "No language model: this run was trained on vectors from a folder." in said
    assert "of tokens" not in said
    assert "Steer this feature" not in said


def test_hostile_captions_stay_text(done: Run) -> None:
    said = text(opened("pages/5_Features.py", run="done", q="<b>fat"))
    assert "&lt;b&gt;fat&lt;/b&gt; &amp; $loud$" in said
    assert "<b>fat</b>" not in said


@pytest.mark.parametrize("view", ["Quantiles", "Random", "Near threshold", "Just missed"])
def test_every_list_of_examples_is_drawn(done: Run, view: str) -> None:
    said = text(opened("pages/5_Features.py", run="done", feature="3", view=view))
    assert said.count('role="listitem"') > 0
    assert "nan" not in said


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("pages/2_Live.py", f"2 SAEs · {count(N)} vectors of "),
        ("pages/3_Pareto.py", "loss recovered is not measured"),
        ("pages/4_Shrinkage.py", "features fired on"),
        ("pages/6_Prompt.py", "This run has no language model"),
        ("pages/7_Steer.py", "This run has no language model"),
        ("pages/8_Hub.py", "done"),
    ],
)
def test_no_page_claims_a_model(done: Run, page: str, sentence: str) -> None:
    said = text(opened(page, run="done"))
    assert sentence in said
    for wrong in ("bundled", "stdlib", "resid_post", ">nan", *(["token"] * (page[6] < "6"))):
        assert wrong not in said


def test_home_lists_the_run_without_a_model(done: Run) -> None:
    (table,) = opened("app.py").dataframe
    row = table.value.set_index("run").loc["done"]
    assert (row["model"], row["where"]) == ("no model", "embeddings")


def test_the_train_page_takes_a_folder(done: Run, folder: Path) -> None:
    at = opened("pages/1_Train.py", activations=str(folder))
    said = text(at)
    assert f"{N:,} vectors, {D_IN} wide, of no known model" in said
    assert "loss recovered is not" in said
    assert not at.button(key="train.start").disabled
    assert "at the speed of done" in said  # not at that of runs on text
    labels = [widget.label for kind in (at.text_input, at.selectbox) for widget in kind]
    assert "Vectors" in labels
    assert not {"Tokens", "Precision", "BOS", "Reconstructions replace"} & {*labels}
    assert f"--activations {folder}" in "".join(code.value for code in at.code)
