"""Signals outside the work of a command."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_without_a_traceback(number, tmp_path):
    (tmp_path / "cyclopts.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n")
    source = Path(__file__).parent.parent / "src"
    program = f"import sys; sys.path[:0] = {[str(tmp_path), str(source)]}; import runpy; runpy.run_module('adapruner')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-number, "")
