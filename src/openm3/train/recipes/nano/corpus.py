"""Real text: the documentation strings of Python's own standard library, some modules kept for the examination.

Read from the source files by `ast`; nothing is imported. The text differs a little between Python versions; the split
is by module name and holds for all of them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sysconfig
from collections import Counter
from pathlib import Path

HELD_OUT = frozenset((
    "argparse", "base64", "calendar", "codecs", "configparser", "csv", "datetime", "difflib", "enum", "fractions",
    "heapq", "ipaddress", "pathlib", "pickletools", "queue", "random", "selectors", "shutil", "statistics", "tarfile",
    "textwrap", "threading", "uuid", "wave", "zipfile",
))  # fmt: skip
SKIPPED = frozenset((
    "test", "tests", "idlelib", "lib2to3", "ensurepip", "encodings", "turtledemo", "distutils", "pydoc_data",
    "site-packages", "dist-packages", "__phello__",
))  # fmt: skip
LEAST, MOST = 60, 4000  # characters of a docstring worth reading


def module_docs(path: Path) -> list[str]:
    """The documentation strings of one source file: module, classes, functions, in order of the tree's walk."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    docs = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
    return [inspect.cleandoc(doc) for doc in docs if doc]


@functools.cache
def docstrings(split: str) -> tuple[tuple[str, str], ...]:
    """(module, docstring) pairs of the modules of `split`: "train", or "test" for the held-out ones."""
    root = Path(sysconfig.get_path("stdlib"))
    out = []
    seen = {doc for _, doc in docstrings("train")} if split == "test" else set()  # a few texts stand in several modules
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        if SKIPPED.intersection(parts) or module.startswith("config-") or (module in HELD_OUT) != (split == "test"):
            continue
        for doc in module_docs(path):
            doc = "\n".join(line.rstrip() for line in doc.expandtabs(4).splitlines()).strip()
            if LEAST <= len(doc) <= MOST and doc.isascii() and doc not in seen:
                seen.add(doc)
                out.append((module, doc))
    return tuple(out)


@functools.cache
def frequent_words(n: int = 1500) -> tuple[str, ...]:
    """The most frequent words of four letters or more in the training modules, small letters, in order."""
    counts = Counter(word for _, text in docstrings("train") for word in re.findall(r"(?<!\w)[a-z]{4,}(?!\w)", text))
    return tuple(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n])
