"""Text that every machine has: the functions and the documentation of the installed Python.

The files are read, and nothing of them is run. The text is that of one version of Python, which runs record."""

import ast
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from adapruner.text.sources import Installed

_CHARACTERS_OF_A_FUNCTION = range(200, 3000)
# Of a paragraph of prose: the fewest characters, the share of letters and spaces, and what stands only in examples.
_SHORTEST, _LETTERS = 150, 0.9
_EXAMPLE = re.compile(r">>>|::$|[{}=|]|\b(def|import|return)\b")
_MARKUP = re.compile(r":\w+:`~?([^`<]*?)(?:\s*<[^>]*>)?`|`+([^`]*)`+_?|\*+([^*]*)\*+")


@cache
def python_functions() -> list[str]:
    """The functions of the standard library of Python that have a docstring and are neither short nor long, in the
    order of their files."""
    functions = []
    for source, module in _modules():
        lines = source.splitlines()
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                if len(text) in _CHARACTERS_OF_A_FUNCTION:
                    functions.append(text)
    return functions


@cache
def python_docs() -> list[str]:
    """The prose of the reference of Python, by topic, and of the docstrings of its standard library, by module, without
    examples and markup."""
    pages = [*topics.values()]
    for _, module in _modules():
        nodes = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)]
        pages.append("\n\n".join(filter(None, map(ast.get_docstring, nodes))))
    return [*filter(None, ("\n\n".join(dict.fromkeys(_prose(page))) for page in pages))]


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """The modules of the standard library that are not in packages, parsed, each after its source."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            source = path.read_text(encoding="utf-8")
            yield source, ast.parse(source)
        except (OSError, ValueError, SyntaxError):
            continue


def _prose(page: str) -> Iterator[str]:
    """The paragraphs of sentences, in a line each."""
    for paragraph in re.split(r"\n\s*\n", page):
        text = _MARKUP.sub(lambda match: next(filter(None, match.groups()), ""), " ".join(paragraph.split()))
        letters = sum(sign.isalpha() or sign.isspace() for sign in text)
        if len(text) >= _SHORTEST and letters > _LETTERS * len(text) and not _EXAMPLE.search(text):
            yield text


INSTALLED: dict[Installed, Callable[[], list[str]]] = {"functions": python_functions, "docs": python_docs}
