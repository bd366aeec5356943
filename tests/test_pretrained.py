"""One line to load an SAE, from this machine or the Hub, and one to publish it."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files
import foreign_files as files
import pytest
import torch
import yaml
from hub_server import TOKEN, Hub
from refusals import mistake, refusal
from safetensors.torch import save_file

import gsae_core
from gsae_core import SAE, GatedSAE, JumpReluSAE, ReluSAE, TopKSAE, load_sae, push_sae, read_sae
from gsae_core.checkpoints.checkpoint import read_cfg, save_sae
from gsae_core.checkpoints.hub import WEIGHTS
from gsae_core.cli import main
from gsae_core.lm.model import load_model

# The library's own call, which its HTTP client would spell otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def some(kind: Callable[..., SAE] = GatedSAE, *, seed: int = 0, **options: Any) -> SAE:
    """Return an SAE none of whose numbers is where it starts."""
    sae = kind(3, 5, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += torch.rand(parameter.shape, generator=generator)
    return sae


def files_of(sae: SAE, folder: Path, path: str = "gated") -> dict[str, bytes]:
    """Return an SAE's files by their paths in a repository."""
    save_sae(sae, folder, metadata={"name": path})
    return {f"{path}/{file.name}": file.read_bytes() for file in folder.iterdir()}


def same(sae: SAE, other: SAE) -> bool:
    """Return whether two SAEs are one to the bit."""
    ours, theirs = sae.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture
def released(hub: Hub, tmp_path: Path) -> SAE:
    """The SAE in `ada/saes`, as somebody else would have put it there."""
    sae = some()
    hub.add("ada/saes", files_of(sae, tmp_path / "theirs"))
    return sae


@pytest.fixture
def writer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, and a token that may write to it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Ends the connection, as HF_HUB_OFFLINE does."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# Loading


@pytest.mark.parametrize(
    "address",
    [
        "ada/saes",
        "ada/saes:gated",
        "ada/saes:gated/sae_weights.safetensors",
        "ada/saes:gated@main",
        "ada/saes@main",
        "{url}/ada/saes/tree/main/gated",
    ],
)
def test_every_form_of_address_is_loaded(hub: Hub, released: SAE, address: str) -> None:
    assert same(load_sae(address.format(url=hub.url)), released)


def test_a_branch_and_a_commit_are_those_that_were_asked_for(
    hub: Hub, released: SAE, tmp_path: Path
) -> None:
    repo = hub.repos["models", "ada/saes"]
    first = repo.refs["main"]
    repo.refs["next"] = first
    later = some(seed=1)
    repo.commit({**files_of(later, tmp_path / "later")}, branch="next")
    assert same(load_sae("ada/saes:gated@next"), later)
    assert same(load_sae("ada/saes:gated"), released)
    assert same(load_sae(f"ada/saes:gated@{first}"), released)
    repo.refs["main"] = repo.refs["next"]
    assert same(load_sae("ada/saes:gated"), later)
    assert same(load_sae(f"ada/saes:gated@{first}"), released)
    assert "expected a branch, tag or commit of 'ada/saes', got 'v9'" in refusal(
        load_sae, "ada/saes:gated@v9"
    )


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub, released: SAE) -> None:
    load_sae("ada/saes")
    hub.seen.clear()
    commit = hub.repos["models", "ada/saes"].refs["main"]
    assert same(load_sae("ada/saes"), released)
    assert hub.requests("GET", "/resolve/") == hub.requests("GET", "/storage/") == []
    hub.seen.clear()
    load_sae(f"ada/saes:gated@{commit}")
    assert hub.seen == []


def test_the_cache_is_the_one_that_hugging_face_s_libraries_share(released: SAE) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    load_sae("ada/saes")
    path = try_to_load_from_cache("ada/saes", "gated/sae_weights.safetensors", revision="main")
    assert isinstance(path, str)
    assert Path(path).is_relative_to(constants.HF_HUB_CACHE)


def test_a_local_path_wins_over_the_hub(
    hub: Hub, released: SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = some(ReluSAE)
    save_sae(ours, tmp_path / "ada" / "saes", metadata={})
    assert same(load_sae("ada/saes"), ours)
    assert hub.seen == []


def test_a_path_is_never_asked_of_the_hub(hub: Hub, released: SAE) -> None:
    assert "found nothing at ada/saes" in refusal(load_sae, Path("ada/saes"))
    assert hub.seen == []


def test_a_renamed_repository_is_followed(
    hub: Hub, released: SAE, offline: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    hub.moved["ada/old"] = "ada/saes"
    assert same(load_sae("ada/old:gated"), released)
    assert "ada/old is called ada/saes by now" in caplog.text
    offline()
    assert same(load_sae("ada/old:gated"), released)


def test_several_saes_are_named(hub: Hub, tmp_path: Path) -> None:
    two = {path: files_of(some(), tmp_path / path, path) for path in ("one", "two")}
    hub.add("ada/saes", two["one"] | two["two"])
    said = refusal(load_sae, "ada/saes")
    assert "expected one SAE, found 2 in ada/saes; name one after a colon (one, two, ...)" in said
    assert load_sae("ada/saes:two").d_sae == 5


@pytest.mark.usefixtures("hub")
def test_what_is_neither_here_nor_there_is_one_sentence() -> None:
    said = refusal(load_sae, "runs/first")
    assert said.startswith("expected a folder or file with an SAE, found nothing at 'runs/first'; ")
    assert (
        "as an address on the Hub: expected the name of a repository on the Hub, found no" in said
    )
    said = refusal(load_sae, "/no/such/folder")
    assert "found nothing at '/no/such/folder'; as an address on the Hub: expected a repo" in said


def test_a_repository_without_an_sae_says_so(hub: Hub) -> None:
    hub.add("ada/empty", {"README.md": b"nothing"})
    said = refusal(load_sae, "ada/empty")
    assert said.startswith("expected an SAE in ada/empty, found none among 1 file; list")


def test_what_was_loaded_before_opens_without_a_connection(
    hub: Hub, released: SAE, offline: Callable[[], None]
) -> None:
    load_sae("ada/saes:gated")
    offline()
    hub.seen.clear()
    for address in ("ada/saes", "ada/saes:gated", "ada/saes:gated@main"):
        assert same(load_sae(address), released)
    assert hub.seen == []
    said = refusal(load_sae, "ada/others")
    assert "found nothing at 'ada/others', nor in the cache of the Hub: No connection" in said
    assert "HF_HUB_OFFLINE is set; unset it to reach 'ada/others'" in said


def test_a_hub_in_trouble_is_read_from_the_cache(hub: Hub, released: SAE) -> None:
    load_sae("ada/saes")
    hub.down = 503
    assert same(load_sae("ada/saes"), released)
    assert (
        "nor in the cache of the Hub: expected an answer about 'ada/others', but the Hub itself"
        in refusal(load_sae, "ada/others")
    )


@pytest.mark.parametrize("path", ["gated/cfg.json", "gated/sae_weights.safetensors"])
def test_a_damaged_download_is_thrown_away(hub: Hub, released: SAE, path: str) -> None:
    hub.damaged.add(path)
    assert f"expected {path} of 'ada/saes' with" in refusal(load_sae, "ada/saes")
    hub.damaged.clear()
    assert same(load_sae("ada/saes"), released)


def test_a_download_of_another_length_is_a_sentence(
    hub: Hub, released: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's pauses between tries
    hub.padded.add("gated/sae_weights.safetensors")
    said = refusal(load_sae, "ada/saes")
    assert "of gated/sae_weights.safetensors in 'ada/saes'" in said
    hub.padded.clear()
    assert same(load_sae("ada/saes"), released)


def test_a_connection_that_breaks_is_a_sentence(
    hub: Hub, released: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut["gated/sae_weights.safetensors"] = (100, 99)
    assert "No connection to the Hugging Face Hub" in refusal(load_sae, "ada/saes")
    hub.cut.clear()
    assert same(load_sae("ada/saes"), released)


def test_a_full_disk_is_a_sentence(
    hub: Hub, released: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        assert "make room on the disk" in refusal(load_sae, "ada/saes")
    assert same(load_sae("ada/saes"), released)


def test_a_private_repository_takes_the_token_of_the_environment(
    hub: Hub, released: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["models", "ada/saes"].private = True
    assert "or log in with `hf auth login` if it is private" in refusal(load_sae, "ada/saes")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(load_sae("ada/saes"), released)
    # The storage, another host, is not told.
    assert {one.authorization for one in hub.requests("GET", "/storage/")} == {None}


@pytest.mark.usefixtures("released")
def test_a_gated_repository_says_what_its_owner_asks_for(hub: Hub) -> None:
    hub.repos["models", "ada/saes"].gated = True
    assert "its owner asks for an agreement first" in refusal(load_sae, "ada/saes")


def test_weights_of_a_pickle_that_runs_code_are_refused(hub: Hub) -> None:
    hub.add("ada/bad", {"ae.pt": b"\x80\x04cos\nsystem\n(S'true'\ntR.", "config.json": b"{}"})
    assert "bare pickle" in refusal(load_sae, "ada/bad")


# Other libraries


def dictionary_learning(folder: Path) -> type[SAE]:
    w = files.weights("b_enc")
    state = files.transposed(w) | {"encoder.bias": w["b_enc"], "bias": w["b_dec"]}
    files.dictionary_learning(folder / "trainer_0", state, "AutoEncoder")
    return ReluSAE


def sparsify(folder: Path) -> type[SAE]:
    w = files.weights("b_enc")
    state = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    place = folder / "layers.3.mlp"
    place.mkdir(parents=True)
    save_file(state | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, place / "sae.safetensors")
    (place / "cfg.json").write_text(json.dumps({"d_in": files.D_IN, "k": 2, "num_latents": 5}))
    return TopKSAE


def gemma_scope(folder: Path) -> type[SAE]:
    w = files.weights("b_enc", "threshold")
    files.npz(folder / "layer_1" / "width_5" / "average_l0_2" / "params.npz", w)
    return JumpReluSAE


def sae_lens_5(folder: Path) -> type[SAE]:
    files.sae_lens(folder / "x", files.weights("b_enc"), "standard", legacy=True)
    return ReluSAE


@pytest.mark.parametrize("at", ["folder", "file", "hub"])
@pytest.mark.parametrize("written", [dictionary_learning, sparsify, gemma_scope, sae_lens_5])
def test_other_libraries_saes_are_loaded_from_everywhere(
    hub: Hub, tmp_path: Path, written: Callable[[Path], type[SAE]], at: str
) -> None:
    kind = written(tmp_path)
    (weights,) = (path for path in tmp_path.rglob("*.*") if path.suffix in WEIGHTS)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    hub.add("ada/x", {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in paths})
    where = {"folder": str(weights.parent), "file": weights, "hub": "ada/x"}[at]
    sae = load_sae(where)
    assert type(sae) is kind
    assert (sae.d_in, sae.d_sae) == (files.D_IN, files.D_SAE)
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
    again, source = read_sae(where)
    assert same(again, sae)
    assert source.files[0][0] == weights.name
    assert source.assumed


def test_a_folder_of_several_saes_names_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_sae(some(), tmp_path / name, metadata={})
    assert f"expected one SAE in {tmp_path}, found 2 (one, two); give the folder" in refusal(
        load_sae, tmp_path
    )


# Classes


def test_a_class_loads_its_own_architecture(released: SAE) -> None:
    sae: GatedSAE = GatedSAE.from_pretrained("ada/saes")
    assert same(sae, released)
    assert same(SAE.from_pretrained("ada/saes"), released)


def test_another_architecture_is_named(hub: Hub, released: SAE, tmp_path: Path) -> None:
    assert refusal(TopKSAE.from_pretrained, "ada/saes") == (
        "expected a TopKSAE in ada/saes, found a GatedSAE; load it with GatedSAE.from_pretrained, "
        "or with gsae_core.load_sae, which takes any"
    )
    save_sae(some(ReluSAE), tmp_path / "relu", metadata={})
    assert "expected a GatedSAE in" in refusal(GatedSAE.from_pretrained, tmp_path / "relu")


@pytest.mark.parametrize("name", ["ada/a--b", "ada/a..b", f"ada/{'a' * 97}", "ada/x.git", "ada/-x"])
def test_a_name_that_no_repository_can_have_is_not_asked_for(hub: Hub, name: str) -> None:
    assert "expected a repository on the Hub as OWNER/NAME" in refusal(load_sae, name)
    assert "expected a repository to push to as OWNER/NAME" in refusal(some().push_to_hub, name)
    assert hub.seen == []


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("where", [5, None, b"ada/saes"])
def test_what_is_no_place_is_refused(hub: Hub, where: Any) -> None:
    assert refusal(load_sae, where) == (
        f"expected a Path, or text that is one or an address on the Hub, got {where!r}"
    )
    assert hub.seen == []


def test_a_folder_where_the_cache_has_a_file_is_named(hub: Hub, released: SAE) -> None:
    from huggingface_hub import constants

    load_sae("ada/saes")
    cached = Path(constants.HF_HUB_CACHE, "models--ada--saes")
    (weights,) = cached.glob("snapshots/*/gated/sae_weights.safetensors")
    blob = weights.resolve()
    blob.unlink()
    blob.mkdir()
    assert f"expected a file at {blob}, got: Is a directory" in refusal(load_sae, "ada/saes")


def test_a_token_that_no_header_can_carry_is_a_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    said = (
        "expected a Hub token of ASCII characters, got others; correct HF_TOKEN, or run "
        "`hf auth login` again"
    )
    assert mistake(["pull", "ada/saes"], capsys) == said
    assert refusal(some().push_to_hub, "ada/mine") == said
    assert refusal(load_model, "ada/model") == said
    assert hub.seen == []


# Publishing


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GatedSAE, {}),
        (GatedSAE, {"tie": "untied"}),
        (ReluSAE, {}),
        (JumpReluSAE, {}),
        (TopKSAE, {"k": 2}),
    ],
)
def test_what_is_pushed_comes_back_to_the_bit(
    writer: Hub, kind: Callable[..., SAE], options: dict[str, Any]
) -> None:
    sae = some(kind, **options)
    address = sae.push_to_hub("ada/mine")
    repo = writer.repos["models", "ada/mine"]
    path = f"{sae.architecture}-5"
    assert address == f"ada/mine:{path}@{repo.refs['main']}"
    assert sorted(repo.head) == [
        ".gitattributes",
        "README.md",
        f"{path}/cfg.json",
        f"{path}/sae_weights.safetensors",
    ]
    assert repo.private
    # One commit that made the repository, and one that holds everything.
    assert len(repo.commits) == 2
    back = type(sae).from_pretrained(address)
    assert same(back, sae)
    assert same(load_sae("ada/mine"), sae)


def test_the_card_says_what_is_known_and_nothing_else(writer: Hub, tmp_path: Path) -> None:
    sae = some()
    sae.push_to_hub("ada/plain")
    card = writer.repos["models", "ada/plain"].head["README.md"].decode()
    assert "1 sparse autoencoder (Gated). Gated SAEs are those of" in card
    assert "- `gated-5`: 5 latents on activations of width 3" in card
    assert 'sae = load_sae("ada/plain:gated-5")' in card
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "gated-sae"],
    }
    for word in (
        "None",
        "unknown",
        "were trained",
        "seed",
        " raw ",
        "Measured",
        " on `",
        " of None",
    ):
        assert word not in card
    model = "openai-community/gpt2"
    sae.push_to_hub("ada/placed", path="l8/mine", model=model, layer=8, site="resid_pre")
    files_there = writer.repos["models", "ada/placed"].head
    card = files_there["README.md"].decode()
    assert " on `blocks.8.hook_resid_pre` of openai-community/gpt2." in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == model
    metadata = json.loads(files_there["l8/mine/cfg.json"])["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == (model, "blocks.8.hook_resid_pre")
    place = read_sae("ada/placed").source.place
    assert (place.model, place.layer, place.site) == (model, 8, "resid_pre")
    sae.push_to_hub("ada/local", model=str(tmp_path))
    sent = b"".join(writer.repos["models", "ada/local"].head.values())
    assert str(tmp_path.parent).encode() not in sent
    assert tmp_path.name.encode() in sent


def test_a_push_adds_to_a_branch_and_leaves_what_is_there(writer: Hub) -> None:
    repo = writer.add("ada/mine", {"README.md": b"my own words"})
    first, second = some(seed=1), some(seed=2)
    one = first.push_to_hub("ada/mine", path="one", branch="next", private=False)
    two = push_sae(second, "ada/mine", path="two", branch="next")
    assert set(repo.head) == {"README.md"}
    there = repo.commits[repo.refs["next"]]
    assert there["README.md"] == b"my own words"
    assert {path.partition("/")[0] for path in there} == {"README.md", "one", "two"}
    assert same(load_sae(one), first)
    assert same(load_sae(two), second)
    assert same(load_sae("ada/mine:one@next"), first)


def test_a_public_repository_is_made_only_when_asked_for(writer: Hub) -> None:
    some().push_to_hub("ada/open", private=False)
    assert not writer.repos["models", "ada/open"].private


def test_a_loaded_sae_s_metadata_goes_with_it(writer: Hub, tmp_path: Path) -> None:
    sae = some()
    save_sae(sae, tmp_path / "sae", metadata={"hook_name": "h.3.x", "context_size": 128})
    told = read_cfg(tmp_path / "sae")["metadata"] | {"recipe": "nonsense", "tie": "other"}
    address = sae.push_to_hub("ada/mine", metadata=told)
    head = writer.repos["models", "ada/mine"].head
    sent = json.loads(head["gated-5/cfg.json"])["metadata"]
    assert (sent["hook_name"], sent["context_size"]) == ("h.3.x", 128)
    assert (sent["recipe"], sent["tie"]) == ("P", "r_mag")
    assert same(load_sae(address), sae)


@pytest.mark.parametrize("repo", ["mine", "é/b", "a/b/c", "ada/--x", "ada/mine y", "ada/m:x"])
def test_names_that_are_no_repository_are_refused(writer: Hub, repo: str) -> None:
    assert "expected a repository to push to as OWNER/NAME" in refusal(some().push_to_hub, repo)
    assert writer.seen == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"path": "../x"}, "which could lead out of the download's folder"),
        ({"path": "a:b"}, "which could lead out of the download's folder"),
        ({"path": ".git"}, "expected paths that the Hub takes, got another:"),
        ({"path": "a/.cache/b"}, "expected paths that the Hub takes, got another:"),
        ({"path": "README.md"}, "expected a folder in the repository, such as gated-64"),
        ({"path": "a\ud800"}, "which could lead out of the download's folder"),
        ({"path": "a@b"}, "expected a folder in the repository, such as gated-64, got 'a@b'"),
        ({"branch": "a" * 40}, "expected the name of a branch, got 'aaa"),
        ({"branch": ""}, "expected the name of a branch, got ''"),
        ({"layer": 3}, "expected a layer and a site, or neither, got layer 3 and site None"),
        ({"layer": 3, "site": "resid"}, "got layer 3 and site 'resid'; give another place as"),
        ({"layer": -1, "site": "mlp_out"}, "expected a layer of at least 0"),
        ({"metadata": {"at": Path("x")}}, "expected metadata of JSON's types"),
        ({"metadata": {"fvu": [math.nan]}}, "expected metadata of JSON's types (text, finite"),
        ({"repo": 5}, "repo: expected a valid string, got 5"),
        ({"path": None}, "path: expected a valid string, got None"),
        ({"private": None}, "private: expected a valid boolean, got None"),
        ({"private": 0}, "private: expected a valid boolean, got 0"),
        ({"branch": 1}, "branch: expected a valid string, got 1"),
        ({"model": 5}, "model: expected a valid string, got 5"),
        ({"layer": "1", "site": "resid_pre"}, "layer: expected a valid integer, got '1'"),
        ({"layer": 1.5, "site": "resid_pre"}, "layer: expected a valid integer, got 1.5"),
        ({"layer": True, "site": "resid_pre"}, "layer: expected a valid integer, got True"),
        ({"metadata": [1]}, "metadata: expected a valid dictionary, got [1]"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_sent_is_said_before_anything_is(
    writer: Hub, given: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(some().push_to_hub, **{"repo": "ada/mine"} | given)
    assert writer.seen == []


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_sae_is_not_sent(writer: Hub) -> None:
    anything: Any = torch.nn.Linear(2, 2)
    said = refusal(push_sae, anything, "ada/mine")
    assert said == "expected an SAE of gsae_core to push, got Linear"
    said = refusal(some().to("meta").push_to_hub, "ada/mine")
    assert said.startswith("expected an SAE with numbers, got one on the meta device")
    assert writer.seen == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionError("Network error"), "'ada/mine' was not reached"),
        (TimeoutError("late"), "'ada/mine' was not reached"),
        (PermissionError("Xet says no"), "it failed (Xet says no); start it again"),
        (RuntimeError("Data processing error"), "it failed (Data processing error); start it"),
    ],
)
def test_an_upload_that_fails_is_a_sentence(
    writer: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def upload(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub._commit_api._upload_files", upload)
    assert sentence in refusal(some().push_to_hub, "ada/mine")


def test_an_sae_that_did_not_survive_is_not_sent(writer: Hub) -> None:
    sae = some()
    with torch.no_grad():
        sae.b_dec[0] = torch.nan
    assert "expected finite numbers in 'b_dec'" in refusal(sae.push_to_hub, "ada/mine")
    assert writer.seen == []


def test_a_push_without_a_token_asks_nothing(hub: Hub) -> None:
    assert "expected a Hub token that may write" in refusal(some().push_to_hub, "ada/mine")
    assert hub.seen == []


@pytest.mark.usefixtures("writer")
def test_an_sae_is_pushed_and_loaded_by_the_package_s_names(tmp_path: Path) -> None:
    sae = some()
    assert same(gsae_core.load_sae(gsae_core.push_sae(sae, "ada/mine")), sae)


@pytest.mark.usefixtures("writer")
def test_a_pushed_sae_is_pulled_into_a_run(tmp_path: Path) -> None:
    sae = some()
    address = sae.push_to_hub("ada/mine", model="openai-community/gpt2", layer=8, site="resid_pre")
    assert main.main(["pull", address, "--to", str(tmp_path / "run")]) == 0
    run = gsae_core.open_run(tmp_path / "run")
    assert run.config.model.hook_name == "blocks.8.hook_resid_pre"
    assert same(load_sae(run.sae_folder(run.config.saes[0].name)), sae)


def test_a_layer_of_a_release_is_loaded_and_pulled_by_its_file(hub: Hub, tmp_path: Path) -> None:
    w = foreign_files.weights("b_enc")
    path = foreign_files.qwen_scope(tmp_path, w, layer=7, k=2)
    repo = f"Qwen/{path.parent.name}"
    hub.add(repo, {f"layer{n}.sae.pt": path.read_bytes() for n in (7, 10)})
    sae = load_sae(f"{repo}:layer7.sae.pt")
    x = torch.randn(9, sae.d_in, generator=torch.Generator().manual_seed(0))
    f, x_hat = foreign_files.topk(w, 2, centred=False)(x)
    torch.testing.assert_close(sae.encode(x), f)
    assert main.main(["pull", f"{repo}:layer10.sae.pt", "--to", str(tmp_path / "run")]) == 0
    config = gsae_core.open_run(tmp_path / "run").config
    assert (config.model.name, config.model.hook_name) == (
        "Qwen/Qwen3-8B-Base",
        "blocks.10.hook_resid_post",
    )
    assert (config.saes[0].sparsity, config.imported) == (2, "Qwen Scope")
    torch.testing.assert_close(load_sae(tmp_path / "run" / "saes" / config.saes[0].name)(x), x_hat)
