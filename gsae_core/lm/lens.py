"""TransformerLens' own small models by name: GELU-1L of the paper, SoLU and attention-only ones.

Their repositories hold no Hugging Face model, but a config.json and the state dict of a
`HookedTransformer`. TransformerLens' native model computes them, in a `TransformerBridge`.
"""

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gsae_core.errors import InputError, extra, hub_answers
from gsae_core.files import read_json
from gsae_core.lm.load import open_tokenizer, reason


def open_lens(repo: str, *, revision: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """Return the TransformerBridge and the tokenizer of a repository in TransformerLens' layout.

    Raises:
        InputError: if TransformerLens is not installed or too old, the Hub does not answer, or the
            files are none of such a model.
    """
    import torch

    with extra("lens"):
        import transformer_lens  # noqa: F401
    if find_spec("transformer_lens.model_bridge.sources.tl_legacy") is None:
        raise InputError(
            f"expected transformer-lens 4.3 or later for {repo!r}, found an earlier one; "
            'pip install "transformer-lens>=4.3"'
        )
    folder = _files(repo, revision)
    missing = f"expected a config.json in {repo!r}, found none; choose another model"
    config = read_json(folder / "config.json", missing=missing)
    try:
        bridge = _bridge(repo, config, folder, torch.device(device), getattr(torch, dtype))
    # Settings that are missing or make no model, weights that are damaged or another model's.
    except (
        OSError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        raise InputError(
            f"expected the config.json and the weights (*final.pth) of a TransformerLens model in "
            f"{repo!r}, got some that make none ({reason(error)}); choose another model"
        ) from error
    if (name := config.get("tokenizer_name")) is None:
        raise InputError(
            f"expected the name of a tokenizer in the config.json of {repo!r}, found none; pass "
            "load_model(TransformerBridge.boot_tl_legacy(...), tokenizer=...)"
        )
    return bridge, open_tokenizer(name)


def _files(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*final.pth"]
    with hub_answers(repo, what="model", revision=revision):
        # Of the steps in training there are dozens, and the optimiser's state is as large again.
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*optim*", "*sched*"]
        )
    return Path(folder)


def _bridge(repo: str, config: dict[str, Any], folder: Path, device: Any, dtype: Any) -> Any:
    """Return what `TransformerBridge.boot_tl_legacy` does, of files of one revision.

    It reads the newest ones, and asks the Hub for their names each time.
    """
    import torch

    with extra("lens"):
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge.sources import native, tl_legacy
        from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    if config.get("shortformer_pos"):
        raise ValueError("shortformer positions, which TransformerLens 4 does not compute")
    sizes = ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab")
    cfg = TransformerBridgeConfig(
        **{key: config[key] for key in (*sizes, "act_fn", "attn_only")},
        final_rms=config.get("final_rms", False),
        normalization_type=config.get("normalization", config.get("normalization_type")),
        positional_embedding_type="standard",
        architecture="TransformerLensNative",
        init_weights=False,
    )
    weights = sorted(folder.glob("*final.pth"))
    state = torch.load(weights[0], map_location="cpu", weights_only=True)
    if (
        config.get("architecture", "neel-solu-old" if repo.endswith("_old") else "")
        == "neel-solu-old"
    ):
        state = tl_legacy._convert_neel_solu_old_weights(state, cfg)
    state = convert_tl_checkpoint({key: value.to(dtype) for key, value in state.items()}, cfg)
    # Some were saved without the unembedding's bias, which is 0.
    state.setdefault("unembed.bias", torch.zeros(cfg.d_vocab, dtype=dtype))
    bridge = native.boot(cfg, device=device, dtype=dtype, model_name=repo)
    bridge.load_state_dict(state, strict=True)
    return bridge
