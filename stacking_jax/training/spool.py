"""Files that grow, for a place that cannot append."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from stacking_jax.console import warn


class Spool:
    """A local folder whose files are copied whole to a remote one, now and then.

    Attributes:
      folder: the local one; what is written here arrives there.
    """

    def __init__(self, remote: Path, every: float = 30.0):
        """
        Args:
          remote: where files are to arrive.
          every: seconds between two copies of `upload_if_due`.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="stacking_jax-"))
        self._remote, self._every = remote, every
        self._last = time.monotonic()
        self._sizes: dict[str, int] = {}

    def fetch(self, name: str) -> None:
        """Begins with a file that is there already."""
        if (self._remote / name).exists():
            (self.folder / name).write_bytes((self._remote / name).read_bytes())

    def upload(self) -> None:
        """Copies every file that has changed in size since the last time."""
        self._last = time.monotonic()
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            if self._sizes.get(path.name) != len(data):
                (self._remote / path.name).write_bytes(data)
                self._sizes[path.name] = len(data)

    def upload_if_due(self) -> None:
        """The same once in a while. What goes wrong is tried again later."""
        if time.monotonic() - self._last < self._every:
            return
        try:
            self.upload()
        except Exception as error:  # noqa: BLE001  each store has its own kinds
            warn(f"{self._remote} could not be written, it will be tried again: {error}")

    def close(self) -> None:
        """Copies what is left, and removes the local folder."""
        try:
            self.upload()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
