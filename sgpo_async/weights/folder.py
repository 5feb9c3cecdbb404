"""Weights by way of a folder that two machines reach, in place of a connection: S3, NFS, anything that fsspec opens.

    newest                       the number of the newest whole version
    v000000012/manifest          as `Manifest.to_bytes`
    v000000012/00003             the bytes of bucket 3
    v000000012/00003.since-11    its difference to version 11 (`weights.delta`), if that is smaller

A version is complete before `newest` names it. The two newest versions are kept. Each run has a folder of its own. Who
can write to it decides what weights the actors serve: its permissions are the only protection.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from sgpo_async.errors import Superseded, WeightsError
from sgpo_async.weights.reader import StoreReader

KEPT = 2
NEWEST = "newest"
VERSION = re.compile(r"v\d{9,}")


class WeightFolder:
    """The folder at `url`, for example s3://bucket/run/ID or file:///mnt/run/ID."""

    def __init__(self, url: str) -> None:
        """Raises WeightsError if no filesystem is installed for this kind of URL."""
        import fsspec

        self.url = url
        with self._guarded("open"):
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(url)

    def newest(self) -> int | None:
        """The newest version, None if there is none. Raises WeightsError if the folder cannot be read."""
        with self._guarded("read"):
            self._files.invalidate_cache()
            try:
                return int(self._files.cat_file(self._path(NEWEST)))
            except FileNotFoundError:
                return None

    def manifest(self, version: int) -> bytes:
        """The encoded manifest of a version. Raises Superseded if the version is no longer there, WeightsError."""
        return self._read(version, "manifest")

    def bucket(self, version: int, index: int, base: int | None) -> tuple[bytes, bool]:
        """One bucket, or its difference to version `base`, and whether it is that.

        Raises Superseded if the version is no longer there, WeightsError.
        """
        if base is not None:
            with contextlib.suppress(Superseded):  # no such difference
                return self._read(version, _since(index, base)), True
        return self._read(version, f"{index:05d}"), False

    def upload(self, store: StoreReader, version: int) -> Iterator[int]:
        """Copy a version from a store, and remove old ones; yield the size of each bucket that was copied.

        Raises Superseded if the store gives the version up meanwhile, WeightsError if the folder cannot be written.
        """
        manifest = store.manifest_of(version)
        base = self.newest()
        with self._guarded("write"):
            self._files.makedirs(self._path(_folder(version)), exist_ok=True)
            for index in range(len(manifest.buckets)):
                self._write(version, f"{index:05d}", store.bucket(version, index))
                if base is not None and (found := store.bucket_or_delta(version, index, base)) and found[1]:
                    self._write(version, _since(index, base), found[0])
                yield manifest.buckets[index].nbytes
            self._write(version, "manifest", manifest.to_bytes())
            self._files.pipe_file(self._path(NEWEST), str(version).encode())
            self._remove_old()

    def _remove_old(self) -> None:
        names = [str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
        for name in sorted(filter(VERSION.fullmatch, names), key=lambda name: int(name[1:]))[:-KEPT]:
            self._files.rm(self._path(name), recursive=True)

    def _read(self, version: int, name: str) -> bytes:
        with self._guarded("read"):
            try:
                return bytes(self._files.cat_file(self._path(f"{_folder(version)}/{name}")))
            except FileNotFoundError:
                raise Superseded(f"weights version {version}: no longer in {self.url}; read the newest one") from None

    def _write(self, version: int, name: str, data: bytes | bytearray | memoryview) -> None:
        self._files.pipe_file(self._path(f"{_folder(version)}/{name}"), bytes(data))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn an error of the filesystem, whose types differ, into a WeightsError with a remedy."""
        try:
            yield
        except (Superseded, WeightsError):
            raise
        except Exception as error:  # each filesystem has exceptions of its own
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise WeightsError(
                f"hub.weight_folder: cannot {what} {self.url} ({reason}); check the URL, the credentials of this "
                "machine, and that the fsspec filesystem is installed (s3: pip install s3fs)"
            ) from error


def _folder(version: int) -> str:
    return f"v{version:09d}"


def _since(index: int, base: int) -> str:
    return f"{index:05d}.since-{base}"
