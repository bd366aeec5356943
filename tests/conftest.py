"""A language model of two small random layers, saved as a Hugging Face folder; runs on it."""

import gc
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from chat_server import Chat
from hub_server import Hub, serving_hub
from tiny_runs import small_run, tiny_config, write_text

from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.runs.run import Run
from gsae_core.runs.work.train import train_run
from gsae_core.text import Progress

WORDS = 38
"""Words of the tiny tokenizer, `w0` to `w37`; with <|endoftext|> (id 0) and <unk>, 40 tokens."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine remembers from real runs (speeds, tokens) decides nothing in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def whole_collections() -> Iterator[None]:
    """What a page left out of collections is in them again for the next test.

    Hypothesis asks the collector who holds its random numbers, and warns when nobody seems to.
    """
    yield
    gc.unfreeze()


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Switch the type checker off: users meet our sentences, not the checker's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, here and in processes started here.

    A shell starts what a script puts into the background with SIGINT ignored, which children
    inherit: tests that send the signal ask for this.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a word, split at spaces; BOS and EOS are token 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocab = {"<|endoftext|>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=end, eos_token=end, unk_token="<unk>"
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A GPT-2 with d_model 12, d_mlp 20, two layers, context 16 and a vocabulary of 40."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 20,
        "n_positions": 16,
    }
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **shape))
    with torch.no_grad():
        for parameter in hf.parameters():
            # Far from the start, where blocks do next to nothing and biases are zero.
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    hf.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_folder: Path) -> LanguageModel:
    """The model of `tiny_lm_folder`; share it, and leave its weights alone."""
    return load_model(str(tiny_lm_folder))


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2000 words that the tiny tokenizer knows."""
    words = random.Random(0)
    lines = [" ".join(f"w{words.randrange(38)}" for _ in range(20)) for _ in range(100)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def small(tiny_lm_folder: Path, small_text: Path, tmp_path: Path) -> list[str]:
    """`train` words that finish in about a second; the run goes to tmp_path / "run"."""
    return small_run(tiny_lm_folder, small_text, tmp_path / "run")


@pytest.fixture(scope="session")
def trained(
    tiny_lm_folder: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from gsae_core.cli import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        assert main.main(small_run(tiny_lm_folder, small_text, folder)) == 0
    return folder


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Run:
    """A finished run in tmp_path / "run", to be spoilt at will."""
    return Run.open(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of tiny runs."""
    return write_text(tmp_path_factory.mktemp("words") / "words.txt")


@pytest.fixture
def new_run(
    tmp_path: Path, tiny_lm_folder: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Makes tiny runs in tmp_path, by name and fields of `tiny_config`; caches are there too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name: str = "run", **fields: Any) -> Run:
        return Run.create(tmp_path / name, tiny_config(tiny_lm_folder, words, **fields))

    return make


@pytest.fixture
def run(new_run: Callable[..., Run]) -> Run:
    """A tiny run in tmp_path / "run", not begun."""
    return new_run()


@pytest.fixture(scope="session")
def tiny_trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path, words: Path
) -> tuple[Run, list[Progress]]:
    """A tiny run that was trained, and its progress; leave its files alone."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run = Run.create(folder, tiny_config(tiny_lm_folder, words, seed=1))
    return run, list(train_run(run))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order; and a forked child has none of its parent's worker threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs that the app is pointed at."""
    monkeypatch.setenv("GSAE_RUNS", str(tmp_path))
    return tmp_path


@pytest.fixture
def worker() -> Iterator[int]:
    """Id of a process that plays the one that trains."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the runs that would have been started; no process is."""
    from gsae_core.runs import run as launch

    ids: list[str] = []

    def record(run: Run) -> int:
        ids.append(run.id)
        return 1

    monkeypatch.setattr(launch, "start", record)
    return ids


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    """An address on loopback that `label --remote` asks."""
    server = Chat()
    monkeypatch.setenv("OPENAI_BASE_URL", server.address)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """An empty Hub on loopback that huggingface_hub's client, and processes started here, ask."""
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("hf-home")
    with serving_hub() as hub:
        # The library reads its environment when it is imported, which it was.
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        monkeypatch.setattr("gsae_core.checkpoints.hub.PAUSE_SECONDS", 0.0)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub
