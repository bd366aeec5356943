"""What a direction does to the next token, through the model's own final norm and unembedding.

A direction d at a site reaches the last residual stream along its direct path alone:

    resid_pre, resid_post, mlp_out, attn_out    r -> r + e d
    attn_z, mlp_hidden                          r -> r + e W_out d       through W_O or W_out, and
                                                through the norm that follows it where there is one
    logits = cap tanh(W_U norm(r) / cap)        (without a cap: W_U norm(r))

The effect is the derivative of the logits to e at e = 0, averaged over tokens, for the final norm
is no linear map. It is automatic, through the model's own norm module: LayerNorm, RMSNorm and
Gemma's (1 + w) need no formula here. With a cap, its slope is averaged apart from the norm's.

At the last layer's resid_post, mlp_out and mlp_hidden (in a parallel block attn_out and attn_z too)
the direct path is the only one. Elsewhere what later blocks, and this block's MLP, do is left out.
"""

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gsae_core.analysis.features import loops as index_loops
from gsae_core.config import Site
from gsae_core.lm.blocks import logit_cap
from gsae_core.lm.harvest import default_rows
from gsae_core.lm.model import LanguageModel
from gsae_core.threads import spread

AT_ONCE = 256  # tokens, or directions


class LogitMap(NamedTuple):
    """The linear map from a site's directions to changes of the logits, averaged over tokens."""

    to_stream: Float[Tensor, "d_model d_in"]
    """Derivative of the normed last residual stream to the site."""
    W_U: Float[Tensor, "d_vocab d_model"]
    cap_slope: Float[Tensor, " d_vocab"] | None
    """Derivative of the cap on the logits; None where the model has none."""
    n_tokens: int

    def effect(self, directions: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_vocab"]:
        """Return the change of each logit per unit of each direction."""
        logits = directions.to(self.W_U) @ self.to_stream.T @ self.W_U.T
        return logits if self.cap_slope is None else logits * self.cap_slope


def has_logit_map(model: LanguageModel) -> bool:
    """Return whether the way from the last residual stream to the logits is known."""
    return model._decoder is not None and model._decoder.logit_scale is not None


@torch.no_grad()
def logit_map(
    model: LanguageModel, ids: Int64[Tensor, "rows pos"], *, layer: int, site: Site
) -> LogitMap:
    """Return the map of a site, its derivative averaged over all positions of `ids`."""
    model.check(layer, site)
    decoder = model._decoder
    assert decoder is not None
    assert decoder.logit_scale is not None
    norm = nn.Sequential(*map(_plain, decoder.after))
    last = _activations(model, ids, layer=model.n_layers - 1, site="resid_post")
    added = _path(model, ids, layer=layer, site=site)
    W_U = model.hf.get_output_embeddings().weight.detach().float()
    if decoder.logit_scale != 1:
        W_U = W_U * decoder.logit_scale
    d_in, n = model.width(site), len(last)

    def jacobian(k: int) -> Float[Tensor, "d_model d_in"]:
        rows = slice(k * AT_ONCE, (k + 1) * AT_ONCE)
        with torch.enable_grad():
            nudge = last.new_zeros(d_in, requires_grad=True)
            stream = norm(last[rows] + added(nudge, rows)).sum(0)
            # Row by row: a norm's own backward is ten times as fast as a batched one.
            found = [torch.autograd.grad(one, nudge, retain_graph=True)[0] for one in stream]
        return torch.stack(found)

    parts = spread(jacobian, -(-n // AT_ONCE), on=last.device)
    to_stream = sum(parts, last.new_zeros(W_U.shape[1], d_in))
    slope, cap = None, logit_cap(model.hf)
    if cap is not None:
        slope = W_U.new_zeros(len(W_U))
        for rows in last.split(AT_ONCE):
            slope += (1 - torch.tanh(norm(rows) @ W_U.T / cap) ** 2).sum(0)
        slope /= n
    return LogitMap(to_stream / n, W_U, slope, n)


@torch.no_grad()
def extremes(effects: LogitMap, directions: Float[Tensor, "n d_in"], *, k: int) -> list[Tensor]:
    """Return (n, k): tokens each direction raises most, by how much; those it lowers most, too."""
    k = min(k, len(effects.W_U))
    blocks = directions.split(AT_ONCE)

    def of(i: int) -> tuple[Tensor, ...]:
        logits = effects.effect(blocks[i])
        return *largest_in_rows(logits, k), *largest_in_rows(logits, k, smallest=True)

    found = spread(of, len(blocks), on=directions.device)
    return [torch.cat(column) for column in zip(*found, strict=True)]


def largest_in_rows(
    h: Float[Tensor, "rows columns"], k: int, *, own: int = -1, smallest: bool = False
) -> tuple[Int64[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Return the columns and values of each row's k largest, or k smallest, the best first.

    Row t leaves out the column `own` + t; negative: none does.
    """
    if not (h.is_cpu and h.dtype in (torch.float32, torch.float64)):
        if own >= 0:
            rows = torch.arange(len(h), device=h.device)
            h = h.index_put((rows, rows + own), h.new_tensor(torch.inf if smallest else -torch.inf))
        found = h.topk(k, largest=not smallest)
        return found.indices, found.values
    # torch.topk sorts whole rows: ten times the time.
    who, best = torch.zeros(len(h), k, dtype=torch.int64), h.new_full((len(h), k), -torch.inf)
    sign = h.numpy().dtype.type(-1 if smallest else 1)
    index_loops.largest_in_rows(h.numpy(), sign, own, who.numpy(), best.numpy())
    return who, best.neg_() if smallest else best


def _plain(module: nn.Module) -> nn.Module:
    """Return a copy in float32 without gradients."""
    return copy.deepcopy(module).float().requires_grad_(False)


def _activations(
    model: LanguageModel, ids: Int64[Tensor, "rows pos"], *, layer: int, site: Site
) -> Float[Tensor, "n d"]:
    """Return the activations at every position."""
    passes = ids.split(default_rows(ids.shape[1], ids.device))

    def of(i: int) -> Tensor:
        return model.harvest(passes[i], layer=layer, site=site).flatten(0, 1)

    return torch.cat(spread(of, len(passes), on=ids.device)).float()


def _path(model: LanguageModel, ids: Tensor, *, layer: int, site: Site) -> Any:
    """Return (nudge, rows) -> what a nudge at the site adds to the residual stream of tokens."""
    if site not in ("attn_z", "mlp_hidden"):
        return lambda nudge, rows: nudge
    taps = model._blocks[layer].taps
    project = taps[site].module
    added = taps["attn_out" if site == "attn_z" else "mlp_out"]
    if project in set(added.module.modules()):
        # A bias moves nothing: only the difference is added.
        project = _plain(project)
        return lambda nudge, rows: added.scale * (project(nudge) - project(torch.zeros_like(nudge)))
    project, norm = _plain(project), _plain(added.module)
    z = _activations(model, ids, layer=layer, site=site)
    return lambda nudge, rows: (
        added.scale * (norm(project(z[rows] + nudge)) - norm(project(z[rows])))
    )
