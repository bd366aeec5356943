"""README's console commands are run, each as it is printed, in one folder, in their order.

What is changed is in `SMALLER`: budgets, the other libraries' environments and a model that can
score, which a test has not. Names that README leaves to the reader (OWNER/NAME,
FOLDER_OR_FILE, MODEL ...) are really called so here. What lies on the Hub lies on one on loopback.
"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import Chat
from corpora import words
from documents import commands
from hub_server import TOKEN, Hub
from test_corpus_hub import pile
from test_readme import README

from gsae_core.cli.main import INTERRUPTED
from gsae_core.runs.run import Run, example_run

# A dozen commands, each a process, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALLER = {
    "--preset quick": "--preset quick --tokens 60_000 --batch-size 64 --width 64 "
    "--eval-tokens 2_000",
    "--width 24576 --tokens 100_000_000": "--width 64 --tokens 2_000 --batch-size 64 "
    "--eval-tokens 500",
    "--tokens 500_000": "--tokens 5_000",
    "gsae index runs/first": "gsae index runs/first --tokens 5_000",
    # A model that can score is too large for a test: an address answers in its place.
    "--most 50 --with MODEL": "--most 1 --with MODEL --remote",
    "bench step": "bench step --batch 64 --d-in 32 --d-sae 64 --l0 4 --rounds 1 --no-peers --brief",
}


def smaller(command: str) -> str:
    for printed, run in SMALLER.items():
        command = command.replace(printed, run)
    return command


@pytest.fixture
def ground(
    tmp_path: Path, hub: Hub, chat: Chat, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with what README's commands expect to find there and on the Hub."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def files(folder: Path, at: str = "") -> dict[str, bytes]:
        return {at + path.name: path.read_bytes() for path in folder.iterdir()}

    gpt2 = tmp_path / "gpt2"
    shape: dict[str, Any] = {"n_embd": 12, "n_layer": 9, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **shape)
    GPT2LMHeadModel(config).save_pretrained(gpt2)
    tiny_tokenizer.save_pretrained(gpt2)
    hub.add("gpt2", files(gpt2))
    texts = [words(0, 38) for _ in range(200)]
    hub.add("monology/pile-uncopyrighted", pile(texts), kind="datasets")

    shipped = example_run()
    assert shipped is not None
    sae = shipped.sae_folder("gated-0.35")
    published = hub.add("OWNER/NAME", {"README.md": b"An SAE."})
    published.commit(dict(files(sae, "PATH/")), branch="REVISION")

    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(sae, folder / "FOLDER_OR_FILE")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def interrupt(process: subprocess.Popen[str], run: Path) -> None:
    """Press Ctrl-C once training has begun."""
    while process.poll() is None:
        # The config is written last: with it, the folder is a run.
        if (run / "config.json").exists() and Run.open(run).status.step > 0:
            process.send_signal(signal.SIGINT)
            return
        time.sleep(0.1)


def test_every_command_does_what_it_says(ground: Path, hub: Hub) -> None:
    program = Path(sys.executable).parent / "gsae"
    # A path of its own, as in an activated environment; without one installed, the module.
    start = [str(program)] if program.exists() else [sys.executable, "-m", "gsae_core"]
    said, first = {}, ground / "runs" / "first"
    for command in commands(README):
        assert command.startswith("gsae ")
        _, *words = smaller(command).split()
        with subprocess.Popen(
            [*start, *words], cwd=ground, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            if "--preset" in words:  # so that there is something to resume
                interrupt(process, first)
            out, err = process.communicate()
        expected = INTERRUPTED if "--preset" in words else 0
        assert process.returncode == expected, f"{command}\n{out}\n{err}"
        said[words[0]] = out
    assert {path.name for path in first.iterdir()} >= {"evals.json", "saes", "features"}
    assert {path.name for path in (first / "saes").iterdir()} == {
        f"{architecture}-{sparsity}"
        for architecture in ("gated", "relu")
        for sparsity in (0.1, 0.15, 0.2, 0.3)
    }
    assert Run.open(ground / "runs" / "theirs").config.imported is not None
    assert (ground / "FOLDER" / "sae_weights.safetensors").is_file()
    assert hub.repos["models", "OWNER/NAME"].head.keys() > {"README.md"}
    assert "first" in said["list"]
    assert "theirs" in said["list"]
