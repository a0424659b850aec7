"""mkdocs hook that renders notebooks with their saved outputs as pages, and keeps them for download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def page(notebook: dict[str, Any], name: str) -> str:
    """A notebook's cells as markdown. The link to the file goes below the title."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [f"```text\n{text.rstrip()}\n```" for text in _outputs(cell) if text.strip()]
        else:
            parts.append(source.replace(".ipynb)", ".md)"))  # links to other notebooks
    parts.insert(1, f"[Download this notebook]({name})")
    return "\n\n".join(parts) + "\n"


def _outputs(cell: dict[str, Any]) -> Iterator[str]:
    for output in cell["outputs"]:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        if output.get("name") != "stderr":
            yield "".join(text)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = Path(file.abs_src_path)
        text = page(json.loads(path.read_text(encoding="utf-8")), path.name)
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=text))
    return files
