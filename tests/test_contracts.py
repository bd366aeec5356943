"""What a reorganisation must not change; `contracts.py` says how it is measured and written anew.

Resumed training ends with the bits of uninterrupted training: `test_resume.py` holds runs to it,
`test_trainer.py` every architecture.
"""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from contracts import (
    ARCHITECTURES,
    COMMANDS,
    RUN,
    SAES,
    answers,
    command,
    differences,
    held,
    help_file,
    help_of,
    in_numbers,
    index_arrays,
    keys_of_files,
    layout,
    loop_in_numbers,
    make_run,
    public_names,
    run_command,
    stepped,
    ways,
    world,
    written_files,
)

from gsae_core import open_run

STEPS = held("steps")


def close(found: Any, expected: Any, *, rel: float, at: str = "") -> None:
    """Compare JSON values: numbers that are no whole ones within `rel` of 1 or of themselves."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for key, value in expected.items():
            close(found[key], value, rel=rel, at=f"{at}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for i, value in enumerate(expected):
            close(found[i], value, rel=rel, at=f"{at}[{i}]")
    elif isinstance(expected, float):
        equal = math.isclose(found, expected, rel_tol=rel, abs_tol=rel)
        assert equal or (math.isnan(found) and math.isnan(expected)), (at, found, expected)
    else:
        assert found == expected, at


@pytest.mark.parametrize("words", COMMANDS)
def test_help_is_what_it_was(words: str) -> None:
    assert help_of(words) == help_file(words).read_text(encoding="utf-8")


def test_there_is_no_other_command() -> None:
    for above in ("", "bench"):
        listed = re.search(r"usage: [\w -]+? \[-h\] \{(.*?)\}", help_of(above))
        assert listed is not None
        for word in listed[1].split(","):
            assert f"{above} {word}".strip() in COMMANDS


@pytest.mark.parametrize("words", ["no-such-command", *COMMANDS])
def test_an_unknown_flag_is_one_sentence_and_exit_code_2(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*words.split(), "--no-such-flag"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


def test_the_program_is_the_same_commands() -> None:
    program = [sys.executable, "-m", "gsae_core"]
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m gsae_core [-h] {train,")


def test_public_names_take_what_they_took() -> None:
    assert public_names() == held("names")


def test_files_of_saes_have_the_same_bytes(tmp_path: Path) -> None:
    assert written_files(tmp_path) == held("files")


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in SAES for way in ways(name)])
def test_thirty_steps_come_to_the_same_in_every_way(name: str, way: str) -> None:
    done = stepped(name, way, dtype=torch.float64)
    close(in_numbers(done), STEPS[name], rel=1e-6)
    reference = stepped(name, "autograd", dtype=torch.float64).sae.state_dict()
    for key, value in done.sae.state_dict().items():
        torch.testing.assert_close(value, reference[key], rtol=1e-9, atol=1e-9)


def test_the_training_loop_comes_to_the_same() -> None:
    found = loop_in_numbers()
    close(found, {name: STEPS[name] for name in found}, rel=1e-6)
    assert found.keys() | SAES.keys() == STEPS.keys()


class Made(NamedTuple):
    run: Path
    """Trained, evaluated and indexed by this version with the config of the run that is kept."""
    indexed: Path
    """The run that is kept, with an index of this version's."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("contracts")
    with world(folder):
        make_run(RUN / "config.json", "runs/new")
        shutil.copytree(RUN, "runs/run", ignore=shutil.ignore_patterns("features"))
        run_command("index", "runs/run", "--sae", "gated", "--tokens", "80")
    return Made(folder / "runs" / "new", folder / "runs" / "run")


def test_a_run_has_the_same_files(made: Made) -> None:
    assert layout(made.run) == held("layout")


def test_files_of_a_run_have_the_same_keys(made: Made) -> None:
    found, expected = keys_of_files(made.run), held("keys")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name


def test_a_run_measures_the_same(made: Made) -> None:
    # Loosely: in float32 another machine's sums may open a gate that was shut, and steps follow it.
    before, after = open_run(RUN).evals(), open_run(made.run).evals()
    for row in (*before, *after):
        for key in ("n_outliers", "outlier_share", "fvu_ordinary"):  # not measured before
            del row[key]
    close(after, before, rel=0.05)


def test_an_index_of_the_same_weights_is_the_same(made: Made) -> None:
    found, expected = index_arrays(made.indexed), index_arrays(RUN)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_run_and_an_index_of_the_version_before_open_and_answer() -> None:
    found = answers(RUN)
    assert {name for name in found if name in ARCHITECTURES} == set(ARCHITECTURES)
    close(found, held("answers"), rel=1e-5)


def test_another_bit_is_a_difference() -> None:
    one = np.ones(2, np.float32)
    other = np.nextafter(one, np.float32(2))
    assert differences({"a": one}, {"a": one.copy()}) == []
    (line,) = differences({"a": one}, {"a": other})
    assert line == "a: other bits, largest difference 1.19e-07"
    assert differences({"a": one}, {"b": one}) == ["a: only before", "b: only after"]
