"""`foveal serve`: what it refuses before it serves. How it serves is tested in tests/server."""

import builtins
import socket
import sys
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--port", "65536"), "--port"),
        (("--port", "x"), "--port"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--max-num-seqs", "0"), "--max-num-seqs"),
        (("--max-num-batched-tokens", "0"), "--max-num-batched-tokens"),
        (("--max-queued-requests", "-1"), "--max-queued-requests"),
        (("--max-model-len", "1"), "--max-model-len"),
        (("--max-model-len", "513", "--port", "0"), "max_model_len"),
        (("--kv-cache-memory", "much"), "much"),
        (("--kv-cache-memory", "0"), "--kv-cache-memory"),
        (("--kv-cache-memory", "1kib", "--port", "0"), "kv_cache_memory"),
        (("--kv-cache-memory", "9000GiB", "--port", "0"), "9000.00 GiB"),
        (("--api-key", " "), "--api-key"),
        (("--served-model-name", ""), "--served-model-name"),
        (("--dtype", "float7", "--port", "0"), "float7"),
        (("--unknown",), "--unknown"),
    ],
)
def test_bad_values_are_one_line(run: Any, tiny_model: str, options: tuple[str, ...], named: str) -> None:
    """Guards against a traceback, or a server that starts in spite of them."""
    ended = run("serve", tiny_model, *options)
    assert ended.code == 2 and ended.out == ""
    assert ended.err.count("\n") == 1 and named in ended.err


def test_a_key_that_is_set_but_empty(run: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a server that is open to all because the secret did not arrive in its environment."""
    monkeypatch.setenv("FOVEAL_API_KEY", "")
    ended = run("serve", "no-such-model", "--port", "0")
    assert ended.code == 2 and "FOVEAL_API_KEY" in ended.err


def test_a_taken_port_is_said_before_the_model_is_loaded(run: Any) -> None:
    """Guards against minutes of loading for nothing: here there is not even a model."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run("serve", "no-such-model", "--port", str(port))
    assert ended == (2, "", f"foveal: cannot listen on 127.0.0.1, port {port}: Address already in use\n")


def test_no_model_is_one_line(run: Any) -> None:
    """Guards the same for a name that stands for nothing."""
    ended = run("serve", "no-such-model", "--port", "0")
    assert ended.code == 2 and ended.err.startswith("foveal: no model 'no-such-model'") and ended.err.count("\n") == 1


def test_missing_packages_are_named(run: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback where the extra is not installed."""
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "uvicorn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    for name in [one for one in sys.modules if one.startswith("foveal.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    ended = run("serve", tiny_model)
    assert ended == (2, "", "foveal: foveal serve needs uvicorn: pip install 'foveal[serve]'\n")
