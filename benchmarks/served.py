"""`foveal serve` in a process of its own, for benchmarks."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def served(model: str, options: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server of `model` on a free port, until the block ends."""
    program = [sys.executable, "-c", "from foveal.cli.main import main; main()"]
    command = [*program, "serve", model, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        for line in server.stderr:
            if line.startswith("{") and (found := json.loads(line)).get("event") == "listening":
                break
            print(line, end="", file=sys.stderr)
        else:
            sys.exit("the server did not start; its error is above")
        # Somebody must read the log, or the server waits for that.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{found['port']}"
        finally:
            server.kill()
