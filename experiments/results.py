"""Where results go: a new folder for every run."""

import time
from pathlib import Path


def new_folder(out: Path, name: str) -> Path:
    """Makes ``out/name-DATE-TIME``, before anything is computed.

    Raises:
        OSError: If it cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        folder = out / f"{name}-{stamp}{f'-{attempt}' if attempt else ''}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
        else:
            return folder
    raise FileExistsError(f"100 folders named {folder}")
