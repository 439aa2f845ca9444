"""`foveal plan` from its arguments to its three kinds of output."""

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from oracle import make_oracle

from foveal.cli.plan_curves import brief, bytes_tick, cache_curves, decode_curves, share_bars, short
from foveal.cli.plan_rows import amount, byte_size, seconds, whole
from foveal.config.released import released
from foveal.costs import Plan, Request, find_device, make_plan

LLAMA = {key: value for key, value in released("llama-3-70b").items() if not key.startswith("_")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a config.json of Llama 3 70B and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_table_says_what_counts(run: Any) -> None:
    """Figures that are computed and not shown."""
    ended = run("plan", "deepseek-v3.2", "--price-per-hour", "2")
    assert ended.code == 0 and ended.err == ""
    text = ended.out.replace("\N{NARROW NO-BREAK SPACE}", "")
    for figure in ("24284495872", "8495104", "54874079232", "499712", "1.0421", "1.0345", "0.0588", "627.79 GiB"):
        assert figure in text, figure
    assert "does not pay" in text and "price of a million tokens" in text


def rows_of(run: Any, *arguments: str) -> dict[str, str]:
    """The table's cells by their label."""
    lines = run("plan", *arguments).out.replace("\N{NARROW NO-BREAK SPACE}", "").splitlines()
    cells = (re.split("  +", line.strip(), maxsplit=1) for line in lines)
    return {found[0]: found[1] for found in cells if len(found) == 2}


def test_rows_without_a_meaning_are_left_out(run: Any) -> None:
    """A head of 0 parameters, a share of attention where there is none, what is still read where all of it is."""
    recurrent = rows_of(run, "mamba-2.8b")
    assert recurrent["· LM head"] == "129 M" and recurrent["fixed in all"] == "2777681920"
    assert "the embedding" in run("plan", "mamba-2.8b").out
    assert not {"· share of attention and indexer", "· of which still read", "dense"} & recurrent.keys()
    windowed = rows_of(run, "mistral-7b", "--page-size", "16")
    assert windowed["· of which still read"] == "512.00 MiB"
    assert windowed["expected waste in the last page"] == "7.5 tokens (0.18 %)"
    sparse = rows_of(run, "deepseek-v3.2")
    assert sparse["dense, fixed"] == "36624596992" and sparse["sparse, fixed"] == "54874079232"
    assert sparse["· merged"] == "470 M" and "· of which still read" not in sparse


def test_a_device_says_what_it_does(run: Any) -> None:
    """Times without what they were computed from; the rate of a dtype that the device widens."""
    h100, a100 = (rows_of(run, "deepseek-v3.2", "--device", name) for name in ("h100", "a100"))
    assert (h100["· memory of each"], h100["· bandwidth"]) == ("80 GB", "3.35 TB/s")
    assert (h100["· operations a second"], a100["· operations a second"]) == ("1.98 P (fp8)", "312 T (bfloat16)")
    record = json.loads(run("plan", "llama-3-70b", "--weights", "int4", "--json").out)
    assert record["speed"]["compute_dtype"] == "bfloat16"


def test_help_names_it(run: Any) -> None:
    """A command that is written and not registered."""
    assert "plan" in run("--help").out


def test_the_same_from_a_name_a_file_and_a_folder(run: Any, folder: Path) -> None:
    """A config that is read differently by where it comes from."""
    records = []
    for source in ("llama-3-70b", str(folder), str(folder / "config.json")):
        ended = run("plan", source, "--json", "--context", "1000")
        assert ended.code == 0
        records.append(json.loads(ended.out))
    assert [record.pop("model") for record in records] == ["llama-3-70b", str(folder), str(folder / "config.json")]
    assert records[0] == records[1] == records[2]
    assert records[0]["context_tokens"] == 1000


def test_options_reach_the_plan(run: Any) -> None:
    """An option that is accepted and ignored."""
    base = json.loads(run("plan", "deepseek-v3.2", "--json").out)
    for arguments, *path in (
        (["--context", "9000"], "context_tokens"),
        (["--weights", "int4"], "weights", "bytes"),
        (["--kv-cache-dtype", "fp8"], "cache", "bytes_per_token"),
        (["--index-dtype", "bf16"], "cache", "bytes_per_token"),
        (["--page-size", "256"], "cache", "page_tokens"),
        (["--device", "h200"], "speed", "device"),
        (["--devices", "32"], "speed", "devices"),
        (["--batch", "5"], "speed", "batch"),
        (["--price-per-hour", "3"], "speed", "decode_price_per_million_tokens"),
        (["--variant", "dsa:1024"], "sparse", "topk"),
    ):
        changed = json.loads(run("plan", "deepseek-v3.2", "--json", *arguments).out)
        was, now = base, changed
        for key in path:
            was, now = was[key], now[key]
        assert was != now, arguments


def test_side_by_side(run: Any) -> None:
    """A model or a variant that is left out of a comparison, or compared with itself."""
    ended = run("plan", "--compare", "llama-3-70b", "mistral-7b", "--variant", "mqa", "--variant", "gqa:32", "--json")
    plans = json.loads(ended.out)["plans"]
    assert [plan["model"] for plan in plans] == [
        "llama-3-70b",
        "llama-3-70b mqa",
        "llama-3-70b gqa:32",
        "mistral-7b",
        "mistral-7b mqa",
        "mistral-7b gqa:32",
    ]
    assert [plan["cache"]["bytes_per_token"] for plan in plans[:3]] == [327680, 40960, 1310720]
    table = run("plan", "--compare", "llama-3-70b", "mamba-2.8b")
    assert "llama-3-70b" in table.out and "mamba-2.8b" in table.out
    alone = json.loads(run("plan", "llama-3-70b", "--variant", "mla", "--json").out)
    assert alone["model"] == "llama-3-70b mla" and alone["cache"]["bytes_per_token"] == 80 * 1152


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_table_wider_than_the_terminal_goes_on_below(run: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Labels and numbers broken in the middle: rich takes the space inside 32 768 for a place to break at."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    models = ["deepseek-v3.2", "glm-5", "jamba-1.5-large", "kimi-linear-48b", "llama-3-70b"]
    printed = re.sub(r"\x1b\[[0-9;]*m", "", run("plan", "--compare", *models).out).splitlines()
    lines = [line.rstrip() for line in printed if ": " not in line]  # not the notes
    assert max(map(len, lines)) <= columns
    labels = {re.split("  +", line)[0].replace("\N{NARROW NO-BREAK SPACE}", "") for line in lines}
    assert labels >= {"· feed-forward, experts", "cache of 32768 tokens", "decoding a token that sees 32768", "devices"}
    assert [name for line in lines if line.startswith(" ") for name in line.split()] == 3 * models


def test_ranks(run: Any, tmp_path: Path) -> None:
    """The spectrum of weights, in the table and in JSON."""
    make_oracle("mistral", tmp_path)
    ended = run("plan", str(tmp_path), "--ranks", "--json")
    record = json.loads(ended.out)
    assert [layer["layer"] for layer in record["latent_ranks"]] == [0, 1, 2]
    assert 0 < record["latent_ranks"][0]["ranks"]["0.9"]["rank"] < 64
    page = tmp_path / "plan.html"
    assert "rank for 99.9 %" in run("plan", str(tmp_path), "--ranks", "--html", str(page)).out
    assert "rank for 99.9 %" in page.read_text(encoding="utf-8")
    assert "latent_ranks" not in json.loads(run("plan", str(tmp_path), "--json").out)


class Tags(HTMLParser):
    """What a page is made of, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.seen.append(tag)
        if tag not in ("meta", "line", "polyline", "rect") or (tag == "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One that closes itself."""
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """It must be the last one that was opened."""
        if tag != "meta":
            assert self.open.pop() == tag


@pytest.mark.parametrize("arguments", [["deepseek-v3.2"], ["--compare", "llama-3-70b", "mamba-2.8b", "glm-5"]])
def test_page(run: Any, tmp_path: Path, arguments: list[str]) -> None:
    """A page that loads something, that has no plots, or that is not whole."""
    file = tmp_path / "plan.html"
    assert run("plan", *arguments, "--html", str(file)).code == 0
    text = file.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen.count("svg") == 3 and tags.seen.count("table") >= 3 and tags.seen.count("polyline") >= 2
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?(https?:)?//", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "LIGHT" not in text and "DARK" not in text
    assert not re.search(r"[\"( ,]-?(nan|inf)", text)


def test_many_long_names(run: Any, tmp_path: Path) -> None:
    """Names of bars cut at the picture's edge, where variants differ at their ends; a title of ten names."""
    file, variants = tmp_path / "plan.html", ["mha", "mqa", "mla:256", "dsa:2048", "mla+dsa:2048"]
    options = [word for variant in variants for word in ("--variant", variant)]
    assert run("plan", "--compare", "llama-3-70b", *options, "--html", str(file)).code == 0
    text = file.read_text(encoding="utf-8")
    bars = text[text.index('aria-label="share by part"') :]
    bars = bars[: bars.index("</svg>")]
    assert re.findall('<text x="0" y="[0-9]+">([^<]*)</text>', bars) == [
        "llama-3-70b",
        *(f"llama-3-70b {variant}" for variant in variants),
    ]
    assert "llama-3-70b, llama-3-70b mha, llama-3-70b mqa and 3 others: what" in text
    assert 'text-anchor="end">64K tokens</text>' in _page(run, tmp_path, "glm-5")


def _page(run: Any, folder: Path, *arguments: str) -> str:
    assert run("plan", *arguments, "--html", str(folder / "plan.html")).code == 0
    return (folder / "plan.html").read_text(encoding="utf-8")


def test_the_context_is_marked(run: Any, tmp_path: Path) -> None:
    """Plots that do not show where the tables stand; a mark outside of them."""
    page = _page(run, tmp_path, "glm-5", "--context", "32768")
    marks = re.findall('<line class="mark" x1="([0-9.]+)" x2="([0-9.]+)"', page)
    assert marks == [("266.0", "266.0")] * 2  # in the middle of 1K to 1M
    assert 'class="mark"' not in _page(run, tmp_path, "glm-5", "--context", "100")


def test_brief_names_and_ticks() -> None:
    """Two names that are cut to the same one; a power of ten in units of two."""
    assert brief("short", 5) == "short" and brief("somewhere/llama-3-70b", 12) == "some…a-3-70b"
    assert len(brief("a" * 100, 26)) == 26
    ticks = [bytes_tick(10.0**n) for n in (2, 4, 8, 10, 13, 16)]
    assert ticks == ["100 B", "10 kB", "100 MB", "10 GB", "10 TB", "10 PB"]


def test_page_escapes_names(run: Any, tmp_path: Path) -> None:
    """A folder's name that is markup."""
    folder = tmp_path / "a<b>&c"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert run("plan", str(folder), "--html", str(tmp_path / "plan.html")).code == 0
    text = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "a&lt;b&gt;&amp;c" in text and "a<b>" not in text


def test_picture(run: Any, tmp_path: Path) -> None:
    """A picture that is empty, or of another kind."""
    file = tmp_path / "plan.png"
    assert run("plan", "deepseek-v3.2", "--png", str(file)).code == 0
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


def test_picture_without_matplotlib(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback where an extra is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = run("plan", "glm-5", "--png", str(tmp_path / "plan.png"))
    assert ended == (2, "", "foveal: --png needs matplotlib: pip install 'foveal[plot]'\n")


def plan_of(name: str, context: int = 32768) -> Plan:
    from foveal.config import read_config

    return make_plan(name, read_config(released(name)), Request(context, find_device("h100")))


def test_curves_are_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot of something else than the table says; an axis that ends before the context that was asked for."""
    plan = plan_of("deepseek-v3.2")
    sparse, dense = decode_curves([plan])
    place = sparse.contexts.index(32768)
    assert sparse.values[place] == sum(plan.arithmetic.decode_running.values())
    assert dense.values[place] == sum(plan.arithmetic.decode["absorbed"].values())
    (cache,) = cache_curves([plan])
    assert cache.values[place] == plan.memory.cache.sequence_bytes(32768)
    assert sparse.contexts[0] == 1024 and sparse.contexts[-1] == 1 << 20
    assert decode_curves([plan_of("glm-5", 3_000_000)])[0].contexts[-1] >= 3_000_000
    assert len(decode_curves([plan, plan_of("llama-3-70b")])) == 2
    for bar in [*share_bars([plan]), *share_bars([plan, plan_of("jamba-1.5-large")])]:
        assert sum(bar.shares.values()) == pytest.approx(1)


def test_how_numbers_are_written() -> None:
    """A prefix that is a thousand times off, or digits that round into the next one."""
    assert [amount(n) for n in (0, 12, 999, 1000, 999_600, 54_874_079_232, 2.5e18, 1.6e23)] == [
        *("0", "12", "999", "1 k", "1000 k", "54.9 G", "2.5 E", "160 Z")
    ]
    assert [byte_size(n) for n in (0, 1023, 1024, 32000 * 65536)] == ["0 B", "1023 B", "1.00 KiB", "1.95 GiB"]
    assert [seconds(t) for t in (0.0, 3.91e-8, 2e-6, 0.0123, 99999.0)] == [
        *("0 s", "39.1 ns", "2 µs", "12.3 ms", "99999 s")
    ]
    assert whole(1234567) == "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567" and whole(None) == "–"
    assert [short(n) for n in (1024, 1 << 20, 1000)] == ["1K", "1M", "1\N{NARROW NO-BREAK SPACE}000"]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["no-such-model"], "no-such-model"),
        (["model.gguf"], "model.gguf"),
        (["~nobody-of-that-name/model"], "no config '~nobody-of-that-name/model'"),
        (["{folder}/nothing.json"], "nothing.json"),
        (["{folder}/broken"], "broken/config.json"),
        (["{folder}", "--context", "0"], "context must be at least 1, not 0"),
        (["{folder}", "--context", "-5"], "context must be at least 1, not -5"),
        (["{folder}", "--context", "many"], "--context"),
        (["{folder}", "--context", "1" + 30 * "0"], "context must be at most 1000000000; what was given has 31 digits"),
        (["mixtral-8x7b", "--devices", "1" + 400 * "0"], "devices must be at most 1000000000"),
        (["{folder}", "--batch", "1" + 400 * "0"], "batch must be at most 1000000000"),
        (["{folder}", "--page-size", "1" + 400 * "0"], "page size must be at most 1000000000"),
        (["{folder}", "--price-per-hour", "nan"], "price per hour"),
        (["{folder}", "--variant", "dsa:1" + 30 * "0"], "'dsa:1000"),
        (["{folder}/deep.json"], "nested too deeply"),
        (["{folder}/empty"], "config.json"),
        (["{folder}", "--variant", "moe"], "'moe'"),
        (["{folder}", "--variant", "gqa:7"], "'gqa:7'"),
        (["{folder}", "glm-5"], "--compare"),
        (["{folder}", "--variant", "mqa", "--variant", "mha"], "--compare"),
        (["{folder}", "--compare"], "--compare"),
        (["--compare", "glm-5", "mamba-2.8b", "glm-5"], "--compare was given 'glm-5' twice"),
        (["--compare", "glm-5", "--variant", "mqa", "--variant", "mqa"], "--compare was given 'mqa' twice"),
        (["{folder}", "--kv-cache-dtype", "fp8"], "kv_cache_dtype 'fp8'"),
        (["{folder}", "--index-dtype", "fp8"], "index_dtype 'fp8'"),
        (["glm-5", "--kv-cache-dtype", "int3"], "int3"),
        (["glm-5", "--index-dtype", "int3"], "int3"),
        (["{folder}", "--weights", "int3"], "'int3'"),
        (["{folder}", "--page-size", "0"], "page size must be at least 1, not 0"),
        (["{folder}", "--device", "tpu"], "'tpu'"),
        (["{folder}", "--devices", "0"], "devices must be at least 1, not 0"),
        (["{folder}", "--batch", "-1"], "batch must be at least 1, not -1"),
        (["{folder}", "--price-per-hour", "-1"], "price per hour must not be below 0"),
        (["mixtral-8x7b", "--devices", "3"], "8 experts cannot be spread evenly over 3 devices"),
        (["{folder}", "--ranks"], ".safetensors"),
        (["glm-5", "--ranks"], "--ranks"),
        (["{folder}", "--html", "{folder}/no/such/plan.html"], "plan.html"),
        (["{folder}", "--bogus"], "--bogus"),
        ([], "MODEL"),
    ],
)
def test_mistakes_end_in_one_line(run: Any, folder: Path, arguments: list[str], culprit: str) -> None:
    """A traceback, a mistake that is not named, or one that is planned all the same."""
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "empty").mkdir()
    ended = run("plan", *(argument.format(folder=folder) for argument in arguments))
    assert ended.code == 2 and ended.out == ""
    assert ended.err.count("\n") == 1 and ended.err.startswith("foveal: ")
    assert culprit in ended.err


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": -1}, "'hidden_size'"),
        ({"unheard_of": 3}, "'unheard_of' = 3"),
        ({"model_type": "gpt9"}, "'gpt9'"),
        ({"model_type": None}, "'None'"),
        ({"num_hidden_layers": 10**30}, "'num_hidden_layers'"),
        ({"torch_dtype": "float7"}, "dtype 'float7' is not known"),
    ],
)
def test_bad_configs_are_named(run: Any, folder: Path, changes: dict[str, Any], culprit: str) -> None:
    """A field that is missing or unknown, in one line that names it."""
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    ended = run("plan", str(folder))
    assert ended.code == 2 and culprit in ended.err and ended.err.count("\n") == 1


def test_a_plan_does_without_torch() -> None:
    """A command that takes seconds to start: no torch, and well under a second of processor time."""
    program = (
        "import sys, time\nfrom foveal.cli.main import main\nsys.argv = ['foveal', 'plan', 'deepseek-v3.2', '--json']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'matplotlib') if name in sys.modules])\n"
        "print(time.process_time())"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 30  # the processor time below is the claim; a machine may be busy
    *_, loaded, used = done.stdout.strip().splitlines()
    assert loaded == "[]"
    assert float(used) < 1.0
