"""Triton's interpreter runs these kernels on the CPU; where there is no Triton, there is nothing to test."""

import os
from importlib.util import find_spec

# Read when a kernel is defined, which is when its module is first imported: by a test, so after this.
os.environ["TRITON_INTERPRET"] = "1"

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
