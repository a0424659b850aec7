"""Reads JSON files, which are treated as untrusted."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from .header import CheckpointError


def read_json(path: Path, largest: int) -> Any:
    """The value of a JSON file of at most `largest` bytes.

    Raises CheckpointError if the file is missing, larger, not JSON or not a regular file (reading a pipe or
    device may never end)."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path.name}: expected a regular file, got something else")
        with path.open("rb") as file:
            text = file.read(largest + 1)
        if len(text) > largest:
            raise CheckpointError(f"{path.name}: expected at most {largest} bytes of JSON, got more")
        return json.loads(text.decode())
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path.parent}: expected {path.name}, got none") from error
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: expected a JSON object, got something else") from error
