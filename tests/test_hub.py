"""Looking at repositories and fetching from them, by the real client over real HTTP."""

import hashlib
import json
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub

from gsae_core.checkpoints import hub as hub_module
from gsae_core.checkpoints.hub import (
    Address,
    HubFile,
    choose,
    describe,
    fetching,
    find_on_hub,
    look,
    one_sae,
    parse_address,
)
from gsae_core.errors import InputError

WEIGHTS = bytes(range(256)) * 1024  # 256 KiB
CONFIG = json.dumps({"architecture": "gated", "d_in": 12, "d_sae": 24}).encode()
SAE = {"a/cfg.json": CONFIG, "a/sae_weights.safetensors": WEIGHTS}


def fetched(hub: Hub, folder: Path, name: str = "ada/saes") -> list[int]:
    repository = look(parse_address(name))
    return list(fetching(repository.repo, repository.commit, one_sae(repository).files, folder))


def refusal(text: str) -> str:
    with pytest.raises(InputError) as error:
        look(parse_address(text))
    return str(error.value)


def ranges(hub: Hub) -> list[str | None]:
    return [one.range for one in hub.requests("GET", "/storage/")]


# Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ada/saes", Address("ada/saes")),
        (" ada/saes:layer_0/w@v1 ", Address("ada/saes", "layer_0/w", "v1")),
        ("ada/saes@0123abc", Address("ada/saes", "", "0123abc")),
        ("https://huggingface.co/ada/saes", Address("ada/saes")),
        ("https://huggingface.co/ada/saes/", Address("ada/saes")),
        ("https://huggingface.co/ada/saes/tree/main/a/b", Address("ada/saes", "a/b", "main")),
    ],
)
def test_an_address_is_a_repository_a_path_and_a_revision(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "x/y/z",
        "ada/saes@",
        "ada/saes@\ud800",
        "<img src=x>",
        "../etc/passwd",
        "https://huggingface.co/ada",
        "https://huggingface.co/ada/saes/discussions/1",
        "https://huggingface.co/ada/a--b",
    ],
)
def test_what_is_no_address_is_told_the_form(text: str) -> None:
    with pytest.raises(InputError, match="expected a repository on the Hub as OWNER/NAME"):
        parse_address(text)


def test_a_path_that_leads_out_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(InputError, match="which could lead out of the download's folder"):
        parse_address("ada/saes:a/../../b")


# Layouts


def files(*paths: str) -> list[HubFile]:
    return [HubFile(path, 10, None, "0" * 40) for path in paths]


@pytest.mark.parametrize(
    ("paths", "format_", "folder"),
    [
        (("x/cfg.json", "x/sae_weights.safetensors"), "sae_lens", "x"),
        (("layers.1/cfg.json", "layers.1/sae.safetensors"), "sparsify", "layers.1"),
        (("t/trainer_0/ae.pt", "t/trainer_0/config.json"), "dictionary_learning", "t/trainer_0"),
        (("layer_3/width_16k/average_l0_59/params.npz",), "gemma_scope", None),
        (("resid_post/layer_1/params.safetensors",), "gemma_scope_2", "resid_post/layer_1"),
        (("sae.pt", "config.json"), "batch_topk", ""),
        (("L0R/hyperparams.json", "L0R/checkpoints/final.safetensors"), "llama_scope", "L0R"),
        (("a/L0R/config.json", "a/L0R/sae_weights.safetensors"), "llama_scope_r1", "a/L0R"),
        (("layer3.sae.pt",), "qwen_scope", "layer3.sae.pt"),
        (("Llama-3.1-8B-Instruct-SAE-l19.pth",), "goodfire", None),
        (("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",), "deepseek_r1", None),
        (("gpt2_L0.pt", "gpt2_L0_cfg.json"), "hook_z", "gpt2_L0.pt"),
    ],
)
def test_a_layout_is_told_by_names(
    paths: tuple[str, ...], format_: str, folder: str | None
) -> None:
    (sae,) = find_on_hub(files(*paths, "README.md"))
    assert sae.format == format_
    assert {file.path for file in sae.files} == set(paths)
    assert folder is None or sae.path == folder


def test_weights_without_their_config_are_no_sae_of_a_layout() -> None:
    assert find_on_hub(files("x/sae_weights.safetensors", "ae.pt", "y/cfg.json")) == []


def test_files_of_one_folder_are_saes_with_the_config_of_their_name() -> None:
    names = [f"gpt2_L{layer}{end}" for layer in (0, 10) for end in (".pt", "_cfg.json")]
    found = find_on_hub(files(*names, "config.json", "other.pt"))
    assert [[file.path for file in sae.files] for sae in found] == [names[:2], names[2:]]
    qwen = find_on_hub(files("layer0.sae.pt", "layer1.sae.pt", "config.json"))
    assert [sae.path for sae in qwen] == ["layer0.sae.pt", "layer1.sae.pt"]
    assert [len(sae.files) for sae in qwen] == [1, 1]


def test_only_the_files_of_one_sae_are_chosen() -> None:
    both = files(
        "a/cfg.json", "a/sae_weights.safetensors", "b/cfg.json", "b/sae_weights.safetensors"
    )
    assert [sae.path for sae in choose(both, "")] == ["a", "b"]
    (chosen,) = choose(both, "b/")
    assert [file.path for file in chosen.files] == ["b/sae_weights.safetensors", "b/cfg.json"]
    assert choose(both, "c") == []


def test_a_file_of_an_unknown_name_can_be_asked_for() -> None:
    (sae,) = choose(files("v5/autoencoder.pt", "v5/about.json", "v5/other.pt"), "v5/autoencoder.pt")
    assert sae.format is None
    assert [file.path for file in sae.files] == ["v5/autoencoder.pt", "v5/about.json"]


# Looking


def test_a_look_names_commit_sizes_and_saes_and_fetches_no_weights(hub: Hub) -> None:
    repo = hub.add("ada/saes", SAE | {"README.md": b"# hi"}, card={"license": "mit"})
    found = look(parse_address("ada/saes"))
    assert (found.commit, found.license, found.renamed) == (repo.refs["main"], "mit", None)
    sae = one_sae(found)
    assert (sae.path, sae.n_bytes) == ("a", len(WEIGHTS) + len(CONFIG))
    assert describe(found, sae).architecture == "gated"
    assert hub.requests("GET", "/storage/") == []


def test_a_transcoder_is_refused_by_its_path_before_it_is_fetched(hub: Hub) -> None:
    hub.add("google/gemma-scope-2b-pt-transcoders", {"layer_3/width_16k/params.npz": b"w" * 99})
    found = look(parse_address("google/gemma-scope-2b-pt-transcoders"))
    with pytest.raises(InputError, match="found a transcoder, which writes other activations"):
        one_sae(found)
    assert hub.requests("GET", "/storage/") == []


def test_a_tree_of_several_pages_is_read_to_its_end(hub: Hub) -> None:
    many = {f"layer_{i}/{name}": CONFIG for i in range(60) for name in ("cfg.json", "x.json")}
    many |= {f"layer_{i}/sae_weights.safetensors": b"w" * (i + 1) for i in range(60)}
    hub.add("ada/many", many)
    assert len(look(parse_address("ada/many")).saes) == 60
    with pytest.raises(InputError, match=r"expected one SAE, found 60 in ada/many; name one"):
        one_sae(look(parse_address("ada/many")))
    assert one_sae(look(parse_address("ada/many:layer_59"))).files[0].n_bytes == 60


def test_widths_come_from_the_first_bytes_where_no_config_says_them(hub: Hub) -> None:
    header = json.dumps(
        {"w_dec": {"dtype": "F32", "shape": [6, 3], "data_offsets": [0, 72]}}
    ).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0" * 72
    hub.add("ada/scope", {"l/params.safetensors": content})
    found = look(parse_address("ada/scope"))
    facts = describe(found, one_sae(found))
    assert (facts.d_in, facts.d_sae) == (3, 6)


def test_an_older_revision_is_looked_at_by_tag(hub: Hub) -> None:
    repo = hub.add("ada/saes", SAE)
    repo.refs["v1"] = repo.refs["main"]
    repo.commit({"a/sae_weights.safetensors": b"newer"})
    assert one_sae(look(parse_address("ada/saes@v1"))).files[0].n_bytes == len(WEIGHTS)
    assert one_sae(look(parse_address("ada/saes"))).files[0].n_bytes == 5


def test_a_renamed_repository_is_followed_and_said(hub: Hub) -> None:
    hub.add("ada/new", SAE)
    hub.moved["ada/old"] = "ada/new"
    found = look(parse_address("ada/old"))
    assert found.repo == "ada/new"
    assert found.renamed == "ada/old is called ada/new by now; that one is used"


# Refusals


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "ada/none",
            "expected the name of a repository on the Hub, found no 'ada/none' there; check its "
            "spelling, or log in with `hf auth login` if it is private",
        ),
        (
            "ada/gated",
            "expected access to 'ada/gated', but its owner asks for an agreement first; accept it "
            "on the repository's page and run `hf auth login`",
        ),
        (
            "ada/saes@v9",
            "expected a branch, tag or commit of 'ada/saes', got 'v9'; look at the repository's "
            "page for the revisions there are",
        ),
    ],
)
def test_what_is_missing_or_behind_a_gate_is_a_sentence(hub: Hub, address: str, said: str) -> None:
    hub.add("ada/saes", SAE)
    hub.add("ada/gated", SAE, gated=True)
    assert refusal(address) == said


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (429, "the Hub got too many; wait some minutes"),
        (503, "the Hub itself is in trouble (503)"),
    ],
)
def test_a_hub_that_refuses_everything_is_a_sentence(hub: Hub, status: int, words: str) -> None:
    hub.down = status
    assert words in refusal("ada/saes")


def test_a_token_that_the_hub_does_not_know_is_a_sentence_without_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ada/saes", SAE)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    said = refusal("ada/saes")
    assert "the Hub refused ours (401); run `hf auth login` again, or correct HF_TOKEN" in said
    assert "secret" not in said


def test_offline_by_choice_is_a_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal("ada/saes") == (
        "No connection to the Hugging Face Hub. Local runs, imports and exports still work. "
        "(HF_HUB_OFFLINE is set; unset it to reach 'ada/saes')"
    )
    assert hub.seen == []


def test_a_hub_out_of_reach_is_a_sentence(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    # Nobody listens on port 1.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert refusal("ada/saes") == (
        "No connection to the Hugging Face Hub. Local runs, imports and exports still work. "
        "('ada/saes' was not reached; go online and try again)"
    )


# Fetching


def test_files_arrive_whole_with_their_bytes_counted(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE | {"b/other.safetensors": b"x"})
    counted = fetched(hub, tmp_path)
    assert counted == sorted(counted)
    assert counted[-1] == len(WEIGHTS) + len(CONFIG)
    assert {
        p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*.*")
    } == SAE


def test_what_is_here_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE)
    fetched(hub, tmp_path)
    hub.seen.clear()
    fetched(hub, tmp_path)
    assert hub.requests("GET", "/resolve/") == hub.requests("GET", "/storage/") == []


def test_a_connection_that_breaks_is_taken_up_at_the_same_byte(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE)
    hub.cut["a/sae_weights.safetensors"] = (2**16, 1)
    fetched(hub, tmp_path)
    assert ranges(hub) == [None, f"bytes={2**16}-"]
    assert (tmp_path / "a/sae_weights.safetensors").read_bytes() == WEIGHTS


def test_a_download_that_was_left_goes_on_by_range(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE)
    repository = look(parse_address("ada/saes"))
    work = fetching(repository.repo, repository.commit, one_sae(repository).files, tmp_path)
    first = next(work)
    work.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert 0 < first < len(WEIGHTS)
    hub.seen.clear()
    fetched(hub, tmp_path)
    assert ranges(hub) == [f"bytes={first}-"]
    assert (tmp_path / "a/sae_weights.safetensors").read_bytes() == WEIGHTS


def test_a_server_without_ranges_sends_everything_again(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE)
    hub.cut["a/sae_weights.safetensors"] = (2**16, 1)
    hub.no_ranges = True
    fetched(hub, tmp_path)
    assert (tmp_path / "a/sae_weights.safetensors").read_bytes() == WEIGHTS


def test_a_connection_that_keeps_breaking_is_a_sentence_and_keeps_what_came(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add("ada/saes", SAE)
    hub.cut["a/sae_weights.safetensors"] = (0, 99)
    part = tmp_path / "a" / ".sae_weights.safetensors.part"
    part.parent.mkdir()
    part.write_bytes(WEIGHTS[:1000])
    with pytest.raises(InputError) as error:
        fetched(hub, tmp_path)
    assert str(error.value) == (
        "expected 262.1 kB of a/sae_weights.safetensors in 'ada/saes', the connection broke after "
        "1.0 kB; start it again to go on from there"
    )
    assert part.read_bytes() == WEIGHTS[:1000]


def test_a_damaged_file_is_a_sentence_and_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE)
    hub.damaged.add("a/sae_weights.safetensors")
    with pytest.raises(InputError) as error:
        fetched(hub, tmp_path)
    wanted = hashlib.sha256(WEIGHTS).hexdigest()[:12]
    assert f"expected a/sae_weights.safetensors of 'ada/saes' with SHA-256 {wanted}..." in str(
        error.value
    )
    assert "is thrown away: fetch it again" in str(error.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    hub.damaged.clear()
    fetched(hub, tmp_path)


def test_a_damaged_small_file_is_found_by_its_git_hash(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE)
    hub.damaged.add("a/cfg.json")
    with pytest.raises(InputError, match=r"cfg\.json of 'ada/saes' with git's SHA-1"):
        fetched(hub, tmp_path)


def test_a_file_longer_than_listed_is_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE)
    hub.padded.add("a/sae_weights.safetensors")
    with pytest.raises(InputError, match="as its listing says, got more"):
        fetched(hub, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0


def test_too_small_a_disk_is_told_before_a_byte_comes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ada/saes", SAE)
    monkeypatch.setattr(hub_module, "free_bytes", lambda path: 1000)
    with pytest.raises(
        InputError, match=r"expected 262\.2 kB free for the download in .*, found 1\.0 kB"
    ):
        fetched(hub, tmp_path)
    # What came of the config, and more than it is long, is no room for the weights.
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.cfg.json.part").write_bytes(bytes(10**5))
    with pytest.raises(InputError, match=r"expected 262\.1 kB free"):
        fetched(hub, tmp_path)
    assert hub.requests("GET", "/storage/") == []


def test_a_disk_that_fills_up_meanwhile_is_a_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.add("ada/saes", SAE)
    part = tmp_path / "a" / ".sae_weights.safetensors.part"
    part.parent.mkdir()
    part.symlink_to("/dev/full")  # every write to it finds no space
    with pytest.raises(InputError, match="make room on the disk"):
        fetched(hub, tmp_path)


def test_a_path_of_the_server_that_leads_out_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    evil = HubFile("../../evil.safetensors", 4, "0" * 64, "0" * 40)
    with pytest.raises(InputError, match="could lead out of the download's folder"):
        list(fetching("ada/saes", "main", [evil], tmp_path))
    assert hub.seen == []


def test_the_token_reaches_the_hub_and_not_its_storage(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ada/saes", SAE, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetched(hub, tmp_path)
    assert {one.authorization for one in hub.requests("GET", "/storage/")} == {None}
    assert {one.authorization for one in hub.requests("HEAD", "/resolve/")} == {f"Bearer {TOKEN}"}
