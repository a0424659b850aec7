"""README.md and docs/: snippets and notebooks run, figures agree, quoted errors exist in the code, and the
site builds without a network."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import doc_pages
import pytest
from doc_pages import (
    DOCS,
    HOMES,
    MEASURED,
    NOTEBOOKS,
    PACKAGE,
    PAGES,
    README,
    ROOT,
    name_of,
    prose,
    snippets,
)
from tool_modules import tool_module

COMMANDS = "peft-kernels "
RUNNABLE = {
    page: [block for block in snippets(page) if block.language == "python" or COMMANDS in block.code]
    for page in PAGES
}
LONGEST_README = 120
LARGEST_PICTURE = 200_000  # bytes


def needs_modules(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install peft_kernels[docs])")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_modules("transformers", "peft")
    folder = tmp_path_factory.mktemp("model") / "my-model"
    doc_pages.make_model(folder)
    doc_pages.make_mixture(folder.with_name("my-mixture"))
    doc_pages.make_packed(folder.with_name("my-gpt-oss"), folder.with_name("my-nvfp4"))
    doc_pages.make_adapter(folder, folder.with_name("my-adapter"))
    return folder


@pytest.fixture
def work_folder(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which snippets run, with the models and `my-adapter`."""
    for name in ("my-model", "my-mixture", "my-gpt-oss", "my-nvfp4"):
        (tmp_path / name).symlink_to(model_folder.with_name(name))
    shutil.copytree(model_folder.with_name("my-adapter"), tmp_path / "my-adapter")  # snippets write to it
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page, blocks in RUNNABLE.items() if blocks], ids=name_of)
def test_every_snippet_runs(page: Path, work_folder: Path, one_thread: None) -> None:
    """The snippets of a page run in order, as a reader would paste them."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    skipped: list[str] = []
    in_processes = ""
    for block in RUNNABLE[page]:
        if reason := doc_pages.missing(block.needs):
            skipped.append(reason)
        elif block.needs == "torchrun":
            in_processes += block.code + "\n"
        elif block.language == "python":
            # Tracebacks then have the page's line numbers.
            code = "\n" * block.line + block.code
            exec(compile(code, block.page, "exec"), namespace)
        else:
            for line in block.code.splitlines():
                if line.startswith(COMMANDS):
                    done = doc_pages.command(line.removeprefix(COMMANDS), work_folder)
                    assert done.returncode == 0, f"{line}\n{done.said}"
    if in_processes:
        done = doc_pages.torchrun(in_processes, work_folder)
        assert done.returncode == 0, done.said
    if skipped:
        ran = len(RUNNABLE[page]) - len(skipped)
        pytest.skip(f"{name_of(page)}: {ran} of {len(RUNNABLE[page])} ran; {', '.join(sorted(set(skipped)))}")


# Notebooks.


def printed(cell: Any) -> str:
    """Output of a cell without numbers, which differ between machines."""
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell["outputs"]
        if output.get("name") != "stderr"
    ]
    return re.sub(r"-?\d[\d,.]*(e-?\d+)?", "#", "".join("".join(text) for text in texts)).strip()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_output_is_reproduced(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_modules("nbclient", "nbformat", "ipykernel", "transformers", "peft", "trl")
    import nbclient
    import nbformat

    # The kernels' threads of two workers would compete for cores.
    for name, value in {
        "PYTHONPATH": str(PACKAGE.parent),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    saved = [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, before in zip(cells, saved, strict=True):
        if "output-varies" not in cell.metadata.get("tags", ()):
            assert printed(cell) == before, f"run it again and save it:\n{cell.source}"
    assert any(saved), "the notebook was saved without its outputs"


# Figures.


@pytest.fixture(scope="module")
def figures_tool() -> Any:
    return tool_module("figures")


def test_pages_have_the_figures_of_the_file(figures_tool: Any) -> None:
    figures = figures_tool.load()
    assert len(figures.passages) > 10 and len(figures.values) > 100
    assert not figures_tool.lacking(), (
        "change figures with tools/figures.py, or their passages in docs/figures.json"
    )


def test_every_figure_is_on_a_page(figures_tool: Any, picture_tool: Any) -> None:
    figures = figures_tool.load()
    named = figures_tool.PLACE.findall("".join(text for page in figures.passages.values() for text in page))
    assert set(figures.values) == {*named} and {*picture_tool.names()} <= {*named}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HOMES], ids=name_of)
def test_no_figure_is_quoted_without_its_source(page: Path, figures_tool: Any) -> None:
    """What looks measured is part of a passage of docs/figures.json."""
    others, _ = figures_tool.load().without_passages(name_of(page), prose(page))
    assert MEASURED.findall(re.sub(r"`[^`\n]*`", "", others)) == [], name_of(page)


def test_changed_figures_reach_the_pages(figures_tool: Any, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    passages = {"a.md": ["is {x} times as fast, {y} MB"], "docs/b.md": ["| step | {x} |"]}
    file = tmp_path / "docs" / "figures.json"
    file.write_text(json.dumps({"values": {"x": "1.5", "y": "20"}, "passages": passages}))
    (tmp_path / "a.md").write_text("It is 1.5 times\nas fast, 20 MB. 1.5 elsewhere.")
    (tmp_path / "docs" / "b.md").write_text("| step  | 1.5 |")
    assert figures_tool.update({"x": "2.25"}, tmp_path) == ["a.md", "docs/b.md"]
    assert (tmp_path / "a.md").read_text() == "It is 2.25 times\nas fast, 20 MB. 1.5 elsewhere."
    assert (tmp_path / "docs" / "b.md").read_text() == "| step  | 2.25 |"
    assert json.loads(file.read_text())["values"] == {"x": "2.25", "y": "20"}
    with pytest.raises(SystemExit, match=r"not in figures.json: z$"):
        figures_tool.update({"z": "1"}, tmp_path)


def test_losing_cells_are_bold() -> None:
    """Tables of ratios only; tables of times, where less is better, have "time" in their title."""
    ratios = 0
    for line in (DOCS / "benchmarks.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.sub(r"<!--.*?-->", "", line).strip("|").split("|")]
        if not line.startswith("|") or "(time" in cells[0] or "loss" in line:
            continue
        for cell in cells[1:]:
            if re.fullmatch(r"\*{0,2}\d+\.\d+\*{0,2}", cell):
                ratios += 1
                assert (float(cell.strip("*")) < 1) == cell.startswith("**"), line
    assert ratios > 130


# The picture.


@pytest.fixture(scope="module")
def picture_tool() -> Any:
    return tool_module("bench_picture")


def shown(svg: str, picture_tool: Any) -> list[str]:
    ticks = {f"{tokens:,}" for tokens in picture_tool.TOKENS}
    found = re.findall(r"<text [^>]*>(\d{2}|\d+,\d{3})</text>", svg)
    return [text for text in found if text not in ticks]


def test_the_picture_shows_the_figures_of_the_table(figures_tool: Any, picture_tool: Any) -> None:
    values = figures_tool.load().values
    svg = picture_tool.PICTURE.read_text(encoding="utf-8")
    assert shown(svg, picture_tool) == [values[name] for name in picture_tool.names()], (
        "python tools/bench_picture.py"
    )
    assert len(svg) < LARGEST_PICTURE
    assert "images/bench.svg" in README.read_text(encoding="utf-8")


def test_the_picture_can_be_drawn(picture_tool: Any, tmp_path: Path) -> None:
    needs_modules("matplotlib")
    assert picture_tool.main([str(tmp_path / "bench.svg")]) == 0
    drawn = (tmp_path / "bench.svg").read_text(encoding="utf-8")
    assert shown(drawn, picture_tool) == shown(picture_tool.PICTURE.read_text(encoding="utf-8"), picture_tool)


# Claims of the pages about the project.


def test_the_readme_is_short_and_its_links_lead_to_files() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_README
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 8
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_targets_on_a_page_exist(page: Path) -> None:
    words = re.findall(r"`([^`\n]+)`", prose(page))
    paths = [
        word
        for word in words
        if re.fullmatch(r"(tests|bench|tools|examples|docs|csrc|peft_kernels)/\S+", word)
    ]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = "\n".join([*words, *(block.code for block in snippets(page))])
    targets = set(re.findall(r"^(?:\$ )?make ([a-z-]+)", commands, re.MULTILINE))
    assert {name for name in targets if not re.search(rf"^{name}\b.*:", makefile, re.MULTILINE)} == set()


def strings_of_the_code() -> str:
    """Every string of the package, with a gap where an f-string puts a value."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_faq_quotes_messages_of_the_code() -> None:
    """Headings are error messages, with `...` for variable parts."""
    headings = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) > 25
    code = strings_of_the_code()
    for heading in headings:
        parts = [part.strip(" :") for part in heading.split("...")]
        assert max(map(len, parts)) >= 8, f"too little of the message: {heading}"
        assert [part for part in parts if part and part not in code] == [], heading


# The site.


def test_the_site_builds_without_a_network(tmp_path: Path) -> None:
    needs_modules("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "http_proxy": nowhere, "https_proxy": nowhere, "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(
        build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]+)"', html)
        assert loaded == [], f"{page.name} loads what a machine without a network lacks"
        assert 'search_from_disk.js"></script>' in html and 'class="md-search__input"' in html
    told = (tmp_path / "site" / "search_from_disk.js").read_text(encoding="utf-8")
    assert 'querySelector(".md-search__input").placeholder =' in told and 'protocol === "file:"' in told
    assert "python3 -m http.server -d build/docs" in told, "how to get the search, as in the README"
    functions = (tmp_path / "site" / "api" / "functions.html").read_text(encoding="utf-8")
    assert "Differentiable in x and bias" in functions, "no docstrings in the reference"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_file_of_version_four(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and content["cells"][0]["cell_type"] == "markdown"
