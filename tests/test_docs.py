"""The documentation builds, its links lead somewhere, its snippets are Python, and what its API pages name exists."""

import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{target} of {page.name} leads nowhere"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{target} of {page.name} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_snippets_are_python(page: Path) -> None:
    for i, snippet in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)):
        compile(snippet, f"{page.name}, snippet {i}", "exec")


def test_what_api_pages_name_exists() -> None:
    names = [n for page in PAGES for n in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)]
    assert len(names) > 20
    for name in names:
        module, _, rest = name.partition(".")
        found = importlib.import_module(module)
        for part in rest.split("."):
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = functools.reduce(getattr, [part], found)
        assert found.__doc__


def test_every_public_op_has_its_place_in_the_api() -> None:
    from internvit import ops

    text = (ROOT / "docs" / "api" / "ops.md").read_text()
    assert {f"::: internvit.ops.{name}" for name in ops.__all__ if name != "backend"} <= set(text.splitlines())


def test_the_site_builds_without_a_warning(tmp_path) -> None:
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "ops" / "index.html").read_text()
    assert "layer_scale_residual_norm" in page
    assert "residual_out" in page  # from its docstring
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    assert not fetched, fetched
