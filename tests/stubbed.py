"""Run code in a process of its own whose kernels launch on the stub driver."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.stub_driver import missing

ROOT = Path(__file__).resolve().parent.parent
HEAD = """
import json, sys
from pathlib import Path
import torch
from benchmarks.gpu.stub_driver import stub_driver

sys.path.append("tests")
with stub_driver(Path(sys.argv[1])) as stub:
"""


def run_over_stub(body: str, folder: Path) -> Any:
    """Run code that sees `torch` and `stub`, and give its `result`; `folder` keeps compiled kernels."""
    if reason := missing():
        pytest.skip(reason)
    code = HEAD + textwrap.indent(textwrap.dedent(body), "    ") + "\n    print(json.dumps(result))\n"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
