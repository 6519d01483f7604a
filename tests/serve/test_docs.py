"""The examples of docs/api.md and docs/serving.md, run as they stand against a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Running

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(language, code, id=f"{name}-{i}")
    for name in ("api", "serving")
    for i, (language, code) in enumerate(BLOCK.findall((ROOT / "docs" / f"{name}.md").read_text()))
]


def test_there_are_examples():
    assert len(EXAMPLES) >= 12


@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_an_example_runs_as_it_stands(running: Running, language: str, code: str, monkeypatch, capsys):
    if language == "bash" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    code = code.replace("localhost:8000", f"127.0.0.1:{running.port}")
    assert str(running.port) in code
    if language == "python":
        monkeypatch.chdir(ROOT)
        exec(compile(code, "example", "exec"), {"__name__": "example"})
        shown = capsys.readouterr().out
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the tools of the test extra are
        run = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, timeout=120,
                             cwd=ROOT, env=os.environ | {"PATH": path})  # fmt: skip
        assert run.returncode == 0, run.stderr
        shown = run.stdout
    assert shown.strip()
    assert ('"error"' in shown) is ("gpt-9" in code), shown
    running.idle()


def test_every_path_and_option_is_in_the_docs(running: Running):
    text = (ROOT / "docs" / "api.md").read_text() + (ROOT / "docs" / "serving.md").read_text()
    for path in running.app.openapi()["paths"]:
        assert path.replace("{name}", "").replace("{file_id}", "{id}").rstrip("/") in text, path
    shown = subprocess.run([sys.executable, "-m", "openm3.cli", "serve", "--help"], capture_output=True, text=True,
                           timeout=60, env={"COLUMNS": "200", "PATH": ""}).stdout  # fmt: skip
    options = set(re.findall(r"--[a-z-]+", shown)) - {"--help"}
    assert {"--allow-fetch", "--drain"} <= options
    assert not {option for option in options if option not in text}
