"""``normwise data fetch``: from the official place, with the official checksum."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import zipfile
from importlib import import_module
from pathlib import Path

from normwise.lab.data.catalogue import CATALOGUE, Archive, Source
from normwise.lab.data.files import DataError, checksum
from normwise.lab.errors import Unavailable, UsageError, nearest

__all__ = ["fetch", "is_there", "missing"]

_TIMEOUT_SECONDS = 30


def is_there(root: Path, source: Source) -> bool:
    """Whether all files of a data set are in its folder; ``.gz`` files may be unpacked."""
    return not missing(root, source)


def missing(root: Path, source: Source) -> list[str]:
    """The files of a data set that are not in its folder."""
    folder = root / source.folder
    return [
        name
        for name in source.files
        if not (folder / name).exists() and not (folder / name.removesuffix(".gz")).exists()
    ]


def fetch(root: Path, name: str) -> str:
    """Get a data set, unless it is there already.

    An archive that lies in ``root`` or in the set's folder is used instead of a download. What
    comes is checked before anything is unpacked, and appears in its folder whole.

    Args:
        root: where the data sets are.
        name: one in ``CATALOGUE``.

    Returns:
        What was done, in one sentence.

    Raises:
        UsageError: for an unknown name.
        DataError: if no official address is known, or a checksum differs.
        Unavailable: if the address cannot be reached, with the file to get and where to put it.
    """
    if name not in CATALOGUE:
        raise UsageError(f"unknown data set {name!r}: {nearest(name, CATALOGUE)}")
    source = CATALOGUE[name]
    folder = root / source.folder
    if is_there(root, source):
        return f"{source.title} is in {folder}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root) as staging:
        for archive in source.archives:
            file = _at_hand(root, folder, archive) or _download(
                archive, Path(staging) / archive.name, folder
            )
            _check(file, archive)
            if archive.unpack:
                _unpack(file, folder)
            elif file.parent != folder:
                shutil.copyfile(file, Path(staging) / "copy")
                (Path(staging) / "copy").replace(folder / archive.name)
    if not is_there(root, source):
        missing = [f for f in source.files if not (folder / f).exists()]
        raise DataError(f"{folder} still lacks {', '.join(missing)}: unexpected archive")
    return f"{source.title} is now in {folder}"


def _at_hand(root: Path, folder: Path, archive: Archive) -> Path | None:
    return next((p for p in (folder / archive.name, root / archive.name) if p.is_file()), None)


def _download(archive: Archive, target: Path, folder: Path) -> Path:
    if archive.url is None:
        raise DataError(
            f"no official address with a checksum is known for {archive.name}: get it from its "
            f"makers and put it in {folder}"
        )
    by_hand = f"download {archive.url} elsewhere and put {archive.name} in {folder}"
    try:
        pooch = import_module("pooch")
    except ImportError:
        raise UsageError('downloads need pooch: pip install "normwise[lab]"') from None
    pooch.get_logger().setLevel("WARNING")
    try:
        # The checksum is compared below, for files that were put there by hand too.
        pooch.retrieve(
            archive.url,
            known_hash=None,
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(timeout=_TIMEOUT_SECONDS, progressbar=False),
        )
    except OSError as error:  # of requests too; of the disk it names a file
        if error.filename is not None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unavailable(f"cannot reach {archive.url} ({reason}); {by_hand}") from None
    return target


def _check(file: Path, archive: Archive) -> None:
    if archive.digest is None:
        return
    algorithm, _, expected = archive.digest.partition(":")
    found = checksum(file, algorithm)
    if found != expected:
        raise DataError(
            f"{file.name} has {algorithm} {found} and should have {expected}: it is damaged or "
            "another file; nothing was unpacked"
        )


def _unpack(file: Path, folder: Path) -> None:
    """Unpack plain files below the archive's one top folder into ``folder``; nothing else."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as packed:
                for entry in packed.infolist():
                    # Omniglot's zips have the part's name as their top folder, which stays.
                    if not entry.is_dir():
                        _write(folder, Path(entry.filename), packed.read(entry))
        else:
            with tarfile.open(file) as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None:
                        _write(folder, Path(*Path(member.name).parts[1:]), content.read())
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{file} is a truncated or corrupt archive: {error}") from None


def _write(folder: Path, name: Path, content: bytes) -> None:
    target = folder / name
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise DataError(f"the archive has an entry {str(name)!r}, which lies outside its folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(content)
    partial.replace(target)
