"""Throughput, time to first token and time per token of servers of one model, at several numbers of clients.

The load comes from guidellm, in a Python of its own; every server gets the same prompts of random words, no two alike,
at /v1/completions, and writes up to as many tokens, after one request that is not counted. Beside `foveal serve`, in
bfloat16: `transformers serve`, in bfloat16 too, and llama.cpp's server (that of llama-cpp-python, which answers one
request after another) with the GGUF file's own format, each if its program is named.

    python -m venv load && load/bin/pip install guidellm
    python -m venv peer && peer/bin/pip install torch && peer/bin/pip install 'transformers[serving]' accelerate
    python -m venv llama && llama/bin/pip install 'llama-cpp-python[server]'
    python benchmarks/serving.py --guidellm load/bin/guidellm --transformers peer/bin/transformers \\
        --llama-python llama/bin/python
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import circumstances, print_table
from served import served

from foveal.models.resolve import resolve_model
from foveal.models.tokenizer import load_tokenizer

_START_SECONDS = 300
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine is not behind its own proxy


@dataclass(frozen=True)
class Load:
    """What each client asks, again and again."""

    prompt_tokens: int
    output_tokens: int
    requests_per_client: int


@dataclass(frozen=True)
class Measured:
    """Medians over the requests that ended well."""

    tokens_per_second: float
    first_token_milliseconds: float
    per_token_milliseconds: float
    failed: int


@dataclass(frozen=True)
class Side:
    """One of the servers."""

    server: AbstractContextManager[str]
    """Gives its address."""
    model: str

    def greet(self, url: str) -> None:
        """One short request: some load their model with the first."""
        data = json.dumps({"model": self.model, "prompt": "Hi", "max_tokens": 2}).encode()
        headers = {"Content-Type": "application/json"}
        with _DIRECT.open(urllib.request.Request(f"{url}/v1/completions", data, headers), timeout=_START_SECONDS):
            pass


def measure(guidellm: str, url: str, side: Side, tokenizer: Path, load: Load, clients: int) -> Measured:
    """One level of load."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        count = clients * load.requests_per_client
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text(
            "".join(json.dumps({"prompt": text}) + "\n" for text in random_prompts(tokenizer, load, count))
        )
        command = [guidellm, "run", "--disable-console"]
        # What every one of the servers understands: not all know ignore_eos, or a route for their health.
        backend = f"kind=openai_http,target={url},model={side.model},request_format=/v1/completions"
        command += ["--backend", f"{backend},validate_backend=false,extras.body.max_tokens={load.output_tokens}"]
        command += ["--profile", f"kind=concurrent,streams={clients}"]
        command += ["--constraint", f"kind=max_requests,count={count}"]
        command += ["--tokenizer", f"kind=hf_auto,model={tokenizer}"]
        command += ["--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={report}"]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics: dict[str, Any] = benchmark["metrics"]

    def successful(name: str, figure: str) -> float:
        return float(metrics[name]["successful"][figure])

    return Measured(
        tokens_per_second=successful("output_tokens_per_second", "mean"),
        first_token_milliseconds=successful("time_to_first_token_ms", "median"),
        per_token_milliseconds=successful("inter_token_latency_ms", "median"),
        failed=len(benchmark["requests"]["errored"]),
    )


def random_prompts(tokenizer: Path, load: Load, count: int) -> list[str]:
    """Words that follow each other by chance, about so many tokens each; the same for every server."""
    known = load_tokenizer(tokenizer)
    words = sorted(word for word in known.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    draw = random.Random(f"{count} prompts")
    made = (draw.choices(words, k=load.prompt_tokens) for _ in range(count))
    return [known.decode(known.encode(" ".join(some))[: load.prompt_tokens]) for some in made]


@contextmanager
def peer(command: Sequence[str], port: int) -> Iterator[str]:
    """Another server, once it answers."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + _START_SECONDS
            while not _answers(url):
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{command[0]} does not start")
                time.sleep(1)
            yield url
        finally:
            server.kill()


def _answers(url: str) -> bool:
    try:
        with _DIRECT.open(f"{url}/v1/models", timeout=5):
            return True
    except urllib.error.HTTPError:  # as transformers says where there is no cache of the Hub
        return True
    except OSError:
        return False


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def as_transformers(model: Path, folder: Path) -> str:
    """The same weights as a directory, for transformers."""
    import torch
    from oracle import load_transformers

    load_transformers(model, torch.bfloat16).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--guidellm", required=True, metavar="PATH", help="the load generator's program")
    parser.add_argument("--model", default="smollm2", help="whatever foveal loads (default: smollm2)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="of each client (default: 4)")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--transformers", metavar="PATH", help="the program transformers, for its `serve`")
    parser.add_argument("--llama-python", metavar="PATH", help="a Python with llama-cpp-python[server]")
    arguments = parser.parse_args()
    load = Load(arguments.prompt_tokens, arguments.output_tokens, arguments.requests)
    path = resolve_model(arguments.model)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer"
        load_tokenizer(path).save_pretrained(tokenizer)
        port = free_port()
        flags = ["--served-model-name", "model", "--dtype", "bfloat16"]
        sides = {"foveal": Side(served(str(path), flags), "model")}
        if arguments.transformers:
            folder = as_transformers(path, Path(temporary) / "model")
            command = [arguments.transformers, "serve", folder, "--port", str(port)]
            if "index_topk" not in json.loads(Path(folder, "config.json").read_text()):  # it has no batches of these
                command.append("--continuous-batching")
            sides["transformers"] = Side(peer(command, port), folder)
        if arguments.llama_python:
            command = [arguments.llama_python, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port)]
            command += ["--model_alias", "model", "--n_ctx", "2048"]
            sides["llama.cpp"] = Side(peer(command, port), "model")
        for name, side in sides.items():
            with side.server as url:
                side.greet(url)
                for clients in arguments.clients:
                    rows.append((name, clients, measure(arguments.guidellm, url, side, tokenizer, load, clients)))
                    print(*rows[-1], file=sys.stderr)
    print(", ".join(f"{key} {value}" for key, value in circumstances().items()), f"cores {os.cpu_count()}")
    print(f"prompts of {load.prompt_tokens} tokens, answers of {load.output_tokens}")
    print_table(
        ["server", "clients", "tokens/s", "first token, ms", "a token, ms", "failed"],
        [
            [
                name,
                str(clients),
                f"{one.tokens_per_second:.1f}",
                f"{one.first_token_milliseconds:.0f}",
                f"{one.per_token_milliseconds:.1f}",
                str(one.failed),
            ]
            for name, clients, one in rows
        ],
    )


if __name__ == "__main__":
    main()
