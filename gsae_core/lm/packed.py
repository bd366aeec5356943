"""Files of text: packed or not, in an archive or not, in UTF-8 or, by their mark, in UTF-16."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from gsae_core.errors import InputError, expecting

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


class Part(NamedTuple):
    """Part of a document."""

    content: str | np.ndarray
    """Text, or token ids as a 1-D integer array."""
    ends: bool
    """Whether the document ends here."""


# About so many characters (or ids) a part: bounds what is read and tokenised in one go.
PART = 2**20
# A longer line is cut, and so is a longer row of a table: a tokenizer takes some 250 bytes of
# memory a character, 3 GB for a line of 12 MB.
LONG_LINE, LONG_ROW = 2 * PART, 8 * PART


class Member(NamedTuple):
    """A file in an archive; while the next one is not asked for, it can be opened."""

    archive: Path
    name: str
    stream: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.archive}, {self.name}"


File = Path | Member

# `--long=31` needs the whole window.
_open_zstd = partial(zstd.open, options={zstd.DecompressionParameter.window_log_max: 31})

PACKED: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
}
"""How a compressed file is opened, by its suffix: those that `datasets` streams, too."""

# What a damaged one raises, beside OSError.
UNPACKING = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)

# Short names of packed archives.
_PACKED_TARS = {".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}


def path_in(file: File) -> PurePath:
    """Return a file's path, in its archive if it is in one."""
    return PurePosixPath(file.name) if isinstance(file, Member) else file


def unpacked(file: File) -> PurePath:
    """Return a file's path without the suffix of a compression."""
    path = path_in(file)
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def is_archive(path: Path) -> bool:
    """Whether a name is that of a zip or tar file, packed or not."""
    suffix = unpacked(path).suffix.lower()
    return suffix in (".zip", ".tar") or suffix in _PACKED_TARS


def opened(file: File) -> Any:
    """Open a file for reading bytes, unpacked."""
    suffix = path_in(file).suffix.lower()
    bare = file.stream() if isinstance(file, Member) else file
    if opener := PACKED.get(_PACKED_TARS.get(suffix, suffix)):
        return opener(bare)
    return bare.open("rb") if isinstance(bare, Path) else bare


def members(archive: Path) -> Iterator[Member]:
    """Yield the files of a zip or tar archive as they are stored, but hidden ones."""
    is_zip = unpacked(archive).suffix.lower() == ".zip"
    damaged = (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, *UNPACKING)
    with expecting("an archive", archive, *damaged):
        for member in (_of_zip if is_zip else _of_tar)(archive):
            parts = PurePosixPath(member.name).parts
            if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
                yield member


def _of_zip(archive: Path) -> Iterator[Member]:
    with opened(archive) as file, zipfile.ZipFile(file) as zipped:
        for info in zipped.infolist():
            if info.flag_bits & 1:
                raise InputError(
                    f"expected an archive without a password in {archive}, got {info.filename} "
                    "encrypted: unpack it"
                )
            if not info.is_dir():
                yield Member(archive, info.filename, partial(zipped.open, info))


def _of_tar(archive: Path) -> Iterator[Member]:
    # What is packed can only be read on; in what is not, headers are found without what is between.
    is_packed = archive.suffix.lower() != ".tar"
    with (
        opened(archive) as file,
        tarfile.open(fileobj=file, mode="r|" if is_packed else "r:") as tar,
    ):
        for info in tar:
            if info.isfile():
                extract = partial(tar.extractfile, info)
                yield Member(archive, info.name, _in_memory(extract) if is_packed else extract)


def _in_memory(extract: Callable[[], Any]) -> Callable[[], io.BufferedReader]:
    """Return what opens a file of which the archive can be read but once."""
    read = cache(lambda: extract().read())
    return lambda: io.BufferedReader(io.BytesIO(read()))


# --- Text


@contextmanager
def open_text(file: File) -> Iterator[io.TextIOWrapper]:
    """Open a file of text, unpacked, without its byte-order mark.

    Damaged or other content is an InputError.
    """
    try:
        with opened(file) as binary:
            # Every kind of opened file can look ahead.
            encoding = _encoding(binary.peek(4)[:4])
            with io.TextIOWrapper(binary, encoding=encoding, newline="") as text:
                yield text
    except (UnicodeError, *UNPACKING, OSError) as error:
        # An error of the disk has a number; gzip's and bz2's own, of the content, have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise not_text(file, error) from None


def _encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


def text_parts(
    file: File,
    size: int = PART,
    separators: tuple[str, ...] = (),
    found: Callable[[], object] = lambda: None,
) -> Iterator[Part]:
    """Yield a file in parts of about `size` characters that end at a line's end.

    A line of more than LONG_LINE is cut, before a space if it has one. A document ends at the end
    of the file, and at each line that is one of `separators` and blanks, which is left out;
    `found` is called at each.
    """
    is_separator = re.compile(
        rf"^(?:{'|'.join(map(re.escape, separators))})[ \t]*(?:\r?\n|\r|\Z)", re.MULTILINE
    )
    texts = _texts(file, size)
    text, holds, was_separated = next(texts, ""), False, False
    while text:
        following = next(texts, "")
        *before, last = is_separator.split(text) if separators else [text]
        for document in before:
            was_separated = True
            found()
            if holds or document.strip():
                yield from parts_of(document)
            holds = False
        # What follows the last separator is no document if it is blank.
        if not was_separated or holds or last.strip():
            yield from parts_of(last, ends=not following)
            holds = True
        text = following


def _texts(file: File, size: int) -> Iterator[str]:
    with open_text(file) as opened_file:
        rest, is_first = "", True
        while (read := opened_file.read(size) + opened_file.readline(PART)) or rest:
            text, rest = rest + read, ""
            # What is packed is not looked at before.
            if is_first and "\0" in text:
                raise not_text(file, "with a NUL")
            is_first = False
            if len(read) == size + PART and not text.endswith(("\n", "\r")):
                end = _end_of_piece(text, len(text))
                text, rest = text[:end], text[end:]
            yield text


def parts_of(text: str, *, ends: bool = True) -> Iterator[Part]:
    """Yield a document, or a part of one, in parts for which a tokenizer takes little memory.

    Up to LONG_ROW characters in lines of up to LONG_LINE are one part. `ends`: whether the document
    ends with them.
    """
    is_long = len(text) > LONG_ROW or any(len(line) > LONG_LINE for line in text.split("\n"))
    start = 0
    while is_long and len(text) - start > PART:
        end = start + _end_of_piece(text[start : start + PART], PART)
        yield Part(text[start:end], ends=False)
        start = end
    yield Part(text[start:], ends=ends)


def _end_of_piece(text: str, size: int) -> int:
    """Return where to cut a text: after its last line end, else before its last space, or not."""
    for found in (text.rfind("\n") + 1, text.rfind(" "), text.rfind("\t")):
        if found > 0:
            return found
    return size


def not_text(file: File, error: Exception | str = "not UTF-8, or with a NUL") -> InputError:
    """Return the sentence for a file whose bytes are no text."""
    return InputError(
        f"expected UTF-8 text in {file}, got something else ({error}): save it as UTF-8, unpack it "
        "or download it again"
    )


def looks_like_text(file: File, *, marked: bool = True) -> bool:
    """Whether a file starts (64 KiB) with valid text without a NUL.

    `marked`: UTF-16 is text too, by its byte-order mark.
    """
    with opened(file) as binary:
        head = binary.read(2**16)
    encoding = _encoding(head) if marked else "utf-8"
    try:
        # A character that the 64 KiB cut in two is no mistake of the file's.
        text = codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) < 2**16)
    except UnicodeError:
        return False
    return "\0" not in text
