"""What the site is built with: pages of research/ in the site, and links that work on GitHub and on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(!?\[[^\]\n]*\])\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures of research/, which are outside of docs/."""
    for path in sorted((_ROOT / "research").rglob("*")):
        if path.suffix in (".md", ".svg", ".png"):
            files.append(File.generated(config, path.relative_to(_ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links between files of the repository, as GitHub follows them, to links between pages of the site. A
    link to a file that is not in the site becomes its text."""
    place = page.file.src_uri if page.file.src_uri.startswith("research/") else f"docs/{page.file.src_uri}"

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        if not path.startswith(("docs/", "research/")):
            return text[1:-1]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{text}({posixpath.relpath(path.removeprefix('docs/'), here)}{anchor})"

    return _LINK.sub(rewritten, markdown)
