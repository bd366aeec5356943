"""Make gsae_core/assets/catalogue.yaml from SAELens' public list; say how it differs from ours.

    python scripts/make_catalogue.py [LIST]            write it
    python scripts/make_catalogue.py [LIST] --check    name the differences; exit 1 if there are any

LIST is `pretrained_saes.yaml`; without it, that of the installed sae-lens. Places, L0, paths and
counts are the list's. It is silent of other things, and those stay as they stand in the catalogue:
titles, notes, widths, architectures, and releases that it has not.
"""

import argparse
import difflib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from gsae_core.checkpoints.formats.libraries import hub_name, layer_and_site

CATALOGUE = Path(__file__).parents[1] / "gsae_core" / "assets" / "catalogue.yaml"
KEYS = "title repo where layout model site layers architecture widths l0 paths count sae_lens note"

# SAELens' loader -> our format; those of what is no SAE of one activation are left out.
LAYOUTS = {
    None: "sae_lens",
    "sae_lens": "sae_lens",
    "dictionary_learning_1": "dictionary_learning",
    "gemma_2": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "connor_rob_hook_z": "hook_z",
    "llama_scope_r1_distill": "llama_scope_r1",
} | {same: same for same in ("llama_scope", "qwen_scope", "goodfire", "deepseek_r1")}
# Titles and architectures of a release's SAEs, for those that are new here.
NEW = {
    "gemma_scope": ("Gemma Scope", "jumprelu"),
    "gemma_scope_2": ("Gemma Scope 2", "jumprelu"),
    "llama_scope": ("Llama Scope", "jumprelu"),
    "llama_scope_r1": ("Llama Scope R1", "jumprelu"),
    "qwen_scope": ("Qwen Scope", "topk"),
    "goodfire": ("Goodfire", "relu"),
    "deepseek_r1": ("DeepSeek R1, by qresearch", "relu"),
    "hook_z": ("Attention SAEs, by Connor Kissane and Rob Krzyzanowski", "relu"),
}
# Of an entry that is there, what the list does not say, or says less of.
KEPT = ("title", "architecture", "widths", "note")
GEMMA = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}
LLAMA = {"A": "attn_out", "M": "mlp_out", "R": "resid_post"}

LAYER = (r"(?:blocks\.|layer_?|[-/_]L)(\d+)", r"^(\d+)-")
VARYING = (  # in paths, and what it is called there
    (r"width_(\d+[km])", "width"),
    (r"hook_\w+?_(\d{3,6})(?=$|_anthropic)", "width"),
    (r"l0_(\d+|small|medium|big)(?![\w.])|l0_(small|medium|big)(?=_seed)", "l0"),
    (r"(?:trainer|step)_(\d+)", "n"),
    (r"_ds(\d+)_", "width"),
    (r"_(?:l1|dc)(\d[\d.e+-]*\d)_", "n"),
    (r"_v(\d+)\.pt$", "n"),
)


def is_read(release: dict[str, Any]) -> bool:
    """Return whether a release has SAEs of one activation: no transcoders, no temporal SAEs."""
    where = f"{release['repo_id']}/{release['saes'][0]['path']}"
    return release.get("conversion_func") in LAYOUTS and "transcoder" not in where


def place(layout: str, repo: str, sae: dict[str, Any]) -> tuple[int | None, str | None]:
    """Return layer and site of an SAE."""
    name, path = str(sae["id"]), str(sae["path"])
    found = (re.search(pattern, text) for text in (path, name) for pattern in LAYER)
    layer = next((int(match[1]) for match in found if match), None)
    if layout == "gemma_scope":
        return layer, GEMMA[repo.rpartition("-")[2]]
    if layout == "gemma_scope_2":
        kind = path.partition("/")[0].removesuffix("_all")
        return layer, "attn_z" if kind == "attn_out" else kind
    if layout in ("qwen_scope", "goodfire", "deepseek_r1"):
        return layer, "resid_post"
    if llama := re.search(r"[-/]L\d+([AMR])\b", path):
        return layer, LLAMA[llama[1]]
    if hook := re.search(r"hook_(resid_\w+?|mlp_out|attn_out|z)(?=_\d|__|$)", name):
        return layer, "attn_z" if hook[1] == "z" else hook[1]
    return layer, layer_and_site(path.partition("/")[0])[1]


def template(path: str) -> str:
    """Return a path with braces for what varies."""
    spans = [(match.span(1), "layer") for p in LAYER if (match := re.search(p, path))][:1]
    spans += [(m.span(m.lastindex or 1), word) for p, word in VARYING for m in re.finditer(p, path)]
    for (start, end), word in sorted(spans, reverse=True):
        path = f"{path[:start]}{{{word}}}{path[end:]}"
    return path


def numbers(found: set[int]) -> Any:
    """Return layers as the catalogue has them: `0-11`, or a list."""
    ordered = sorted(found)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ordered


def widths(repo: str, paths: set[str]) -> list[int]:
    """Return how many latents paths and repositories state."""
    units = {"k": 2**10, "m": 2**20, "": 1}
    pattern = r"(?:width_|-W|_ds)(\d+)([kKmM]?)"
    found = {m for text in (repo, *paths) for m in re.findall(pattern, text)}
    return sorted({int(n) * units[unit.lower()] for n, unit in found})


def from_list(releases: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an entry for each repository and site, of suites for each folder as well."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, release in releases.items():
        if not is_read(release):
            continue
        layout, repo = LAYOUTS[release.get("conversion_func")], release["repo_id"]
        for sae in release["saes"]:
            if sae["path"].startswith("embedding/"):
                continue  # in front of all blocks
            layer, site = place(layout, repo, sae)
            folder = sae["path"].partition("/")[0] if layout == "dictionary_learning" else ""
            suite = "" if layer_and_site(folder)[1] else folder
            group = groups.setdefault(
                (repo, str(site), suite),
                {"repo": repo, "layout": layout, "model": hub_name(release["model"]), "site": site}
                | {"layers": set(), "l0": set(), "found": set(), "paths": {}, "sae_lens": {}},
            )
            # Some releases of a repository leave the `-it` of its model out.
            group["model"] = max(group["model"], hub_name(release["model"]), key=len)
            if layer is not None:
                group["layers"].add(layer)
            group["l0"] |= {sae["l0"]} if sae.get("l0") else set()
            group["found"].add(sae["path"])
            group["paths"][template(sae["path"])] = None
            group["sae_lens"][name] = None
    return [_entry(group) for group in groups.values()]


def _entry(group: dict[str, Any]) -> dict[str, Any]:
    layout, repo, found = group["layout"], group["repo"], group["found"]
    title, architecture = NEW.get(layout, (repo.rpartition("/")[2], None))
    stated = [int(n) if n == int(n) else n for n in sorted(group["l0"])]
    return group | {
        "title": title,
        "architecture": architecture,
        "layers": numbers(group["layers"]),
        "widths": widths(repo, found),
        "l0": [stated[0], stated[-1]] if stated else None,
        "paths": list(group["paths"]),
        "count": len(found),
        "sae_lens": list(group["sae_lens"]),
    }


def catalogue(releases: dict[str, Any], ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our entries with what the list says, in our order; then what we had not."""
    said = from_list(releases)
    made = []
    for entry in ours:
        same = (
            e for e in said if e["repo"] == entry.get("repo") and e["sae_lens"][0] in names(entry)
        )
        found = next((e for e in same if entry.get("site") in (None, e["site"])), None)
        if found is not None:
            said.remove(found)
            kept = {key: entry[key] for key in KEPT if key in entry}
            # The list may call a model by a name that TransformerLens made up.
            kept |= {} if "/" in found["model"] else {"model": entry["model"]}
            made.append(found | kept)
        elif not names(entry):
            made.append(entry)
    return made + said


def names(entry: dict[str, Any]) -> list[str]:
    """Return SAELens' names of an entry's SAEs; none where they are not in its list."""
    return entry.get("sae_lens", [])


def written(entries: list[dict[str, Any]]) -> str:
    """Return the entries as the file has them, a line a key."""
    lines = []
    for entry in entries:
        kept = [key for key in KEYS.split() if entry.get(key) not in (None, [])]
        for key in kept:
            flow = None if isinstance(entry[key], list) else False  # a list on the line of its key
            line = yaml.safe_dump({key: entry[key]}, width=10**6, default_flow_style=flow)
            lines.append(f"{'- ' if key == kept[0] else '  '}{line}")
    return "".join(lines)


def main() -> int:
    """Write the file, or say how it differs from what would be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("list", nargs="?", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    package = importlib.util.find_spec("sae_lens")
    if args.list is None and (package is None or package.origin is None):
        parser.error("expected sae-lens to be installed, or the path of its list")
    path = args.list or Path(str(package and package.origin)).with_name("pretrained_saes.yaml")
    releases = yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader)
    old = CATALOGUE.read_text("utf-8")
    head, entries = old.partition("- title")[0], catalogue(releases, yaml.safe_load(old))
    new = head + written(entries)
    left_out = [name for name, release in releases.items() if not is_read(release)]
    print(
        f"{len(releases)} releases there, {len(entries)} entries here; no SAEs of one activation:"
    )
    print(*left_out, sep=", ")
    if args.check:
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True)))
        return int(old != new)
    CATALOGUE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
