"""Files from anywhere: damaged or malicious, each is an SAE or one sentence, and never runs."""

import io
import json
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as files
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gsae_core.checkpoints.formats.containers import BELOW_SUSPICION
from gsae_core.checkpoints.formats.detect import detect, find_saes
from gsae_core.checkpoints.formats.libraries import Provenance
from gsae_core.checkpoints.formats.read import read_sae
from gsae_core.errors import InputError
from gsae_core.sae.base import SAE

N_EACH = 250


def safetensors_seed(folder: Path) -> Path:
    w = files.weights("b_gate", "b_mag", "r_mag")
    return files.sae_lens(folder, w, "gated") / "sae_weights.safetensors"


def json_seed(folder: Path) -> Path:
    return files.sae_lens(folder, files.weights("b_enc", "threshold"), "jumprelu") / "cfg.json"


def npz_seed(folder: Path) -> Path:
    return files.npz(folder / "params.npz", files.weights("b_enc", "threshold"))


def pickle_seed(folder: Path) -> Path:
    w = files.weights("gate_bias", "mag_bias", "r_mag")
    state = files.transposed(w) | {"decoder_bias": w["b_dec"]}
    state |= {name: w[name] for name in ("gate_bias", "mag_bias", "r_mag")}
    return files.dictionary_learning(folder, state, "GatedAutoEncoder") / "ae.pt"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to four things wrong: a bit, a run, a cut, a repeat, a huge number."""
    spoilt = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(len(spoilt), 1))
        match rng.randrange(6):
            case 0 if spoilt:
                spoilt[at % len(spoilt)] ^= 1 << rng.randrange(8)
            case 1:
                spoilt[at : at + rng.randint(1, 16)] = rng.randbytes(rng.randint(0, 16))
            case 2:
                del spoilt[rng.choice((at, len(spoilt) // 2, 9)) :]
            case 3:
                spoilt[at:at] = spoilt[at : at + rng.randint(1, 64)]
            case 4:
                spoilt[at : at + 8] = struct.pack("<Q", rng.choice((0, 2**31, 2**40, 2**63)))
            case _:
                for digit in range(at, min(at + 200, len(spoilt))):
                    if spoilt[digit] in b"123456789":
                        spoilt[digit : digit + 1] = rng.choice((b"99999999999", b"-1", b"0", b"e9"))
                        break
    return bytes(spoilt)


def refusal(act: Callable[[], object]) -> str:
    """Return the one sentence in which `act` refuses; empty if it does not."""
    try:
        act()
    except InputError as error:
        sentence = str(error)
    else:
        return ""
    assert "expected" in sentence
    assert "\n" not in sentence
    return sentence


def check_sound(sae: SAE, source: Provenance) -> None:
    """Check what a mutation left whole: numbers, and where they came from."""
    for name, parameter in sae.named_parameters():
        # A threshold of zero is a logarithm of minus infinity.
        assert bool(
            parameter.exp().isfinite().all() if "log" in name else parameter.isfinite().all()
        )
    assert source.files


SEEDS = [safetensors_seed, json_seed, npz_seed, pickle_seed]


@pytest.mark.parametrize("seed", SEEDS, ids=["safetensors", "json", "npz", "pickle"])
def test_a_damaged_file_is_one_sentence_or_a_sound_sae(
    tmp_path: Path, seed: Callable[[Path], Path]
) -> None:
    target = seed(tmp_path / "sae")
    sound, rng = target.read_bytes(), random.Random(7)
    before = {path for path in tmp_path.rglob("*")}
    n_refused = 0
    for _ in range(N_EACH):
        target.write_bytes(mutated(sound, rng))
        sentence = refusal(lambda: check_sound(*read_sae(tmp_path / "sae")))
        n_refused += bool(sentence)
    assert n_refused > N_EACH / 2
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("seed", SEEDS, ids=["safetensors", "json", "npz", "pickle"])
def test_looking_at_a_damaged_file_is_as_safe_as_reading_it(
    tmp_path: Path, seed: Callable[[Path], Path]
) -> None:
    target = seed(tmp_path)
    sound, rng = target.read_bytes(), random.Random(11)
    for _ in range(50):
        target.write_bytes(mutated(sound, rng))
        refusal(lambda: detect(tmp_path))
        refusal(lambda: find_saes(tmp_path))


class Harm:
    """Pickled, it calls something when it is loaded."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def touch(path: str) -> None:
    Path(path).write_text("ran")


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    w = files.weights("b_enc")
    state: dict[str, Any] = files.transposed(w) | {"encoder.bias": w["b_enc"], "bias": w["b_dec"]}
    state["extra"] = Harm(touch, str(tmp_path / "ran"))
    torch.save(state, tmp_path / "ae.pt", pickle_protocol=protocol)
    with pytest.raises(InputError, match="it was not run: do not trust this file") as refused:
        read_sae(tmp_path)
    if protocol == 2:
        assert "touch" in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_not_opened_at_all(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Harm(touch, str(tmp_path / "ran"))))
    for path in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(InputError, match=r"torch 1\.6 or newer .* bare pickle"):
            read_sae(path)
    assert not (tmp_path / "ran").exists()


def test_an_array_of_objects_in_an_npz_is_refused(tmp_path: Path) -> None:
    objects = np.array([Harm(touch, str(tmp_path / "ran"))], dtype=object)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(tmp_path / "params.npz", **dict.fromkeys(names, objects))
    with pytest.raises(InputError, match="found type object, which can hold code"):
        read_sae(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_array_of_a_version_that_is_not_read_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", npy((2,), b"\0" * 8).replace(b"\x01\x00", b"\x03\x00", 1))
    with pytest.raises(InputError, match=r"in 'W_enc\.npy' of .*, found version 3\.0; save it"):
        read_sae(tmp_path)


@pytest.mark.parametrize("name", ["../../out.npy", "/out.npy", "a\\..\\..\\out.npy", "C:\\out.npy"])
def test_a_name_that_leads_out_of_an_archive_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr(name, npy((2,), b"\0" * 8))
    with pytest.raises(InputError, match="which leads out of the archive; do not trust this file"):
        read_sae(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["params.npz"]


def npy(shape: tuple[int, ...], data: bytes) -> bytes:
    """Return a .npy file that claims a shape of float32, whatever data follow."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path: Path) -> None:
    n_bytes = 2 * BELOW_SUSPICION
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", npy((n_bytes // 4,), b"\0" * n_bytes))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"claim to hold 33\.6 MB .* do not trust this file"):
        read_sae(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n_bytes / 10


def test_an_archive_in_which_files_overlap_is_refused(tmp_path: Path) -> None:
    path = files.npz(tmp_path / "params.npz", files.weights("b_enc", "threshold"))
    data = bytearray(path.read_bytes())
    # The directory's first entry claims all but four gigabytes.
    at = data.index(b"PK\x01\x02")
    data[at + 20 : at + 24] = data[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(data)
    with pytest.raises(InputError, match="expected an archive whose content has about its size"):
        read_sae(path)


def test_an_absurd_shape_in_an_npz_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            archive.writestr(f"{name}.npy", npy((10**6, 10**6), b"\0" * 8))
    with pytest.raises(InputError, match=r"expected 8 bytes .* of 4000000000000"):
        read_sae(tmp_path)


def header(shape: list[int], n_bytes: int) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, n_bytes]}
    written = json.dumps({"W_enc": entry}).encode()
    return struct.pack("<Q", len(written)) + written


@pytest.mark.parametrize(
    "data",
    [
        header([10**9, 10**9], 8) + b"\0" * 8,
        header([2**40, 2**40], 8) + b"\0" * 8,
        header([3], 8) + b"\0" * 8,
        header([2], 8) + b"\0" * 7,
        header([2], 8) + b"\0" * 9,
        struct.pack("<Q", 2**40) + b"{}" + b"\0" * 20,
    ],
    ids=["absurd", "beyond 64 bits", "another size", "cut short", "more behind", "long header"],
)
def test_a_safetensors_file_that_its_header_does_not_describe_is_refused(
    tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    sentence = rf"expected whole safetensors in .*, found {len(data)} bytes that are not \(.*again"
    with pytest.raises(InputError, match=sentence):
        read_sae(path)


def test_a_tensor_larger_than_what_is_stored_of_it_is_refused(tmp_path: Path) -> None:
    w = files.weights("b_enc")
    state = files.transposed(w) | {"encoder.bias": w["b_enc"], "bias": w["b_dec"]}
    # A terabyte of ones, in four bytes.
    state["encoder.weight"] = torch.ones(1, 1).expand(10**6, 10**6)
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(InputError, match=r"expected as many numbers as its shape .* found fewer"):
        read_sae(tmp_path)


@pytest.mark.parametrize("kind", ["json", "safetensors", "npz"])
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("W_enc.npy", npy((2,), b"\0" * 8))
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("W_enc.npy", npy((2,), b"\0" * 8))
    if kind == "safetensors":
        entry = '"W_enc": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
        header = f"{{{entry}, {entry}}}".encode()
        data = struct.pack("<Q", len(header)) + header + b"\0" * 4
        (tmp_path / "x.safetensors").write_bytes(data)
    if kind == "json":
        target = json_seed(tmp_path)
        target.write_text(target.read_text().replace("{", '{"d_in": 4, ', 1))
    with pytest.raises(InputError, match=r"(each name once|'d_in' twice|'W_enc.*' twice)"):
        read_sae(tmp_path)


def test_brackets_without_end_are_a_sentence(tmp_path: Path) -> None:
    json_seed(tmp_path).write_text("[" * 100_000)
    with pytest.raises(InputError, match="nested too deeply"):
        read_sae(tmp_path)


def test_a_config_the_size_of_weights_is_not_read(tmp_path: Path) -> None:
    with json_seed(tmp_path).open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(InputError, match=r"config of at most 16\.8 MB .* found 17\.8 MB"):
        read_sae(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    w = files.weights("b_enc")
    w["W_dec"][1, 1] = value
    with pytest.raises(InputError, match="expected finite numbers in 'W_dec'"):
        read_sae(files.sae_lens(tmp_path, w, "standard"))


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    files.sae_lens(tmp_path / "elsewhere" / "sae", files.weights("b_enc"), "standard")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="expected safetensors, npz or torch files"):
        find_saes(tmp_path / "here")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    w = files.weights("b_enc")
    save_file({k: t.to(torch.int32) for k, t in w.items()}, tmp_path / "x.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 3, "d_sae": 5}))
    with pytest.raises(InputError, match="expected floating-point numbers in 'W_"):
        read_sae(tmp_path)
