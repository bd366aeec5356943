"""Which files of a downloaded folder are its training split, its test split, ...

By the rules of the `datasets` library, which reads the same repository on the Hub. In this order:

1. what the `configs` at the head of README.md say;
2. `data/NAME-00000-of-00012.*`: split NAME;
3. a folder called `train`, `val`, `test` or the like, or beginning or ending with such a word;
4. a file name with such a word in it, set off by `-`, `.`, `_`, a space or a digit.

Of rules 3 and 4 the library takes one for all files; here a file goes by the first that fits, so
that `train/00.jsonl.zst` beside `test.jsonl.zst` gives two splits.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from posixpath import normpath

from gsae_core.errors import InputError
from gsae_core.lm.pieces import unpacked
from gsae_core.lm.tables import no_split

SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def files_of_split(split: str, folder: Path, names: Sequence[str], *, is_text: bool) -> list[str]:
    """Return the files of one split; all of them if `split` is `all`, or `train` and none is told.

    Args:
        names: of the folder's files, below it.
        is_text: the files are documents, which may be called anything. Only names in `.txt` count;
            and unless most of them tell a split, `train` and another, `train` is all of them.

    Raises:
        InputError: if there is no such split; the sentence names those there are.
    """
    if split == "all":
        return list(names)
    splits = _by_card(folder, names) or _by_shards(names)
    if not splits:
        splits = _by_words(names, is_text=is_text)
        is_set = len(splits) > 1 and 2 * sum(map(len, splits.values())) > len(names)
        if split == "train" and (not splits or (is_text and not (is_set and split in splits))):
            return list(names)
    if split not in splits:
        raise InputError(no_split(split, folder, list(splits)))
    return splits[split]


def _by_card(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    head = re.match(r"---\r?\n(.*?)\n---", readme.read_text("utf-8-sig", "replace"), re.DOTALL)
    if head is None or not re.search(r"^configs:", head[1], re.MULTILINE):
        return {}
    import yaml
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**yaml.safe_load(head[1])))
        default = configs.get_default_config_name()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"expected `configs` as the Hub reads them at the head of {readme}, got something "
            f"else: {' '.join(str(error).split())}; mend or remove them"
        ) from None
    if default is None:
        raise InputError(
            f"expected one config in {readme}, found {', '.join(configs)}: mark one of them with "
            "`default: true`"
        )
    if "data_files" not in configs[default]:
        return {}
    found = {
        split: [name for name in names if any(_fits(pattern, name) for pattern in patterns)]
        for split, patterns in sanitize_patterns(configs[default]["data_files"]).items()
    }
    return {split: files for split, files in found.items() if files}


def _fits(pattern: str, name: str) -> bool:
    from fsspec.utils import glob_translate

    return re.match(glob_translate(normpath(pattern)), name) is not None


def _by_shards(names: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in names:
        if shard := SHARD.fullmatch(name):
            splits.setdefault(shard[1], []).append(name)
    return splits


def _by_words(names: Sequence[str], *, is_text: bool) -> dict[str, list[str]]:
    parts = [name for name in names if not is_text or unpacked(Path(name)).suffix.lower() == ".txt"]
    if not parts:
        return {}
    from datasets.data_files import (
        DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    )
    from fsspec.utils import glob_translate

    rules = [
        (str(split), re.compile("|".join(map(glob_translate, patterns))))
        for by in (DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, DEFAULT_PATTERNS_SPLIT_IN_FILENAME)
        for split, patterns in by.items()
    ]
    splits: dict[str, list[str]] = {}
    for name in parts:
        for split, pattern in rules:
            if pattern.match(name):
                splits.setdefault(split, []).append(name)
                break
    return splits
