"""`foveal eval`: what it measures arrives in the table, in JSON and in the plots; bad input is one line."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from adapters import make_adapter
from oracle import make_oracle

_TEXT = "The quick brown fox jumps over the lazy dog. It was a dark and stormy night; the rain fell. " * 20


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(_TEXT)
    return str(file)


@pytest.fixture(scope="module")
def sparse_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random deepseek_v32 with a top-k of 12 and the byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("sparse")
    make_oracle("deepseek_v32", folder, vocab_size=256, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_model) / name, folder)
    return str(folder)


def measured(run: Any, *arguments: str) -> dict[str, Any]:
    ended = run("eval", *arguments, "--json")
    assert (ended.code, ended.err) == (0, "")
    return json.loads(ended.out)


def test_the_default_measures_what_there_is_everything_for(run: Any, tiny_model: str, text: str) -> None:
    """A dense model: perplexity where there is a text, passkeys in any case."""
    found = measured(run, tiny_model, "--limit", "1")
    assert (found["tasks"], found["lengths"]) == (["passkey"], [512])
    (result,) = found["results"]
    assert [one["depth"] for one in result["scores"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(result["answers"]) == 5
    with_text = measured(run, tiny_model, "--limit", "1", "--text", text, "--lengths", "400")
    assert with_text["tasks"] == ["ppl", "passkey"]
    # 399 tokens are predicted, each a byte.
    ppl = with_text["results"][0]["ppl"]
    assert ppl["all"]["tokens"] == 399
    assert ppl["bits_per_byte"] == pytest.approx(ppl["all"]["bits"])
    assert [(one["from"], one["to"]) for one in ppl["positions"]] == [(1, 64), (64, 128), (128, 256), (256, 400)]


def test_a_table_for_people(run: Any, sparse_model: str, text: str) -> None:
    """Every kind of measurement in one run, under selections that are compared with the first."""
    tasks = ("--tasks", "ppl,recall,passkey", "--limit", "1", "--lengths", "400", "--text", text, "--forced")
    ended = run("eval", sparse_model, *tasks, "--select", "dense,indexer,recency", "--topk", "12,20")
    assert (ended.code, ended.err) == (0, "")
    for heading in ("Perplexity after so many tokens", "Share of answers", "by indexer (dense)", "What it cost"):
        assert heading in ended.out
    assert "by indexer (indexer 20)" in ended.out and "by indexer (recency" not in ended.out
    heads = next(line for line in ended.out.splitlines() if line.startswith("tokens before"))
    columns = [heads.index(name) for name in ("dense", "indexer 12", "recency 12", "indexer 20", "recency 20")]
    assert columns == sorted(columns)
    assert heads.count("less dense") == 4
    # Nothing to choose for the first positions with a top-k of 20, so nothing differs.
    assert len([line for line in ended.out.splitlines() if line.startswith("passkey")]) == 5


def test_selections_change_what_is_measured(run: Any, sparse_model: str, text: str) -> None:
    """Guards against an option that is accepted and ignored."""
    options = ("--tasks", "ppl", "--limit", "1", "--lengths", "400", "--text", text)
    plain = measured(run, sparse_model, *options)["results"][0]["ppl"]["all"]["nats"]
    found = measured(run, sparse_model, *options, "--select", "indexer,dense,recency,random,oracle")
    nats = [one["ppl"]["all"]["nats"] for one in found["results"]]
    assert nats[0] == pytest.approx(plain)
    assert len(set(nats)) == 5
    assert [one["name"] for one in found["differences"]] == ["dense", "recency", "random", "oracle"]
    for one, value in zip(found["differences"], nats[1:], strict=True):
        assert one["less"] == "indexer"
        assert one["ppl"]["all"]["nats"] == pytest.approx(value - nats[0], abs=1e-5)
    more = measured(run, sparse_model, *options, "--topk", "200")
    assert (more["results"][0]["name"], more["results"][0]["topk"]) == ("indexer 200", 200)
    assert more["results"][0]["ppl"]["all"]["nats"] != plain


def test_precision_is_compared_with_the_model_as_it_is(run: Any, sparse_model: str, text: str) -> None:
    """Guards against precision options that reach both models, or neither."""
    options = ("--tasks", "ppl", "--limit", "1", "--lengths", "400", "--text", text, "--against", sparse_model)
    same = measured(run, sparse_model, *options)["differences"][0]
    assert same["ppl"]["all"]["nats"] == 0.0
    assert same["less"] == f"{Path(sparse_model).name} as it is"
    settings = [
        ("--index-dtype", "fp8"),
        ("--kv-cache-dtype", "fp8"),
        ("--quantization", "int8"),
        ("--dtype", "bfloat16"),
    ]
    for setting in settings:
        nats = measured(run, sparse_model, *options, *setting)["differences"][0]["ppl"]["all"]["nats"]
        assert 0 < abs(nats) < 0.5, setting


def test_another_model(run: Any, tiny_model: str, sparse_model: str, text: str) -> None:
    """The other model's result stands first, and recall is left out for one without indexers."""
    options = ("--tasks", "ppl,passkey,recall", "--limit", "2", "--lengths", "400", "--text", text, "--forced")
    found = measured(run, sparse_model, *options, "--against", tiny_model)
    base, result = found["results"]
    assert base["name"] == Path(tiny_model).name and "recall" not in base
    assert result["name"] == Path(sparse_model).name and len(result["recall"]) == 3
    assert found["differences"][0]["ppl"]["all"]["tokens"] == base["ppl"]["all"]["tokens"] == 2 * 399


@pytest.fixture(scope="module")
def adapter(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random indexers with a top-k of 24 for the tiny llama."""
    return make_adapter(Path(tiny_model), tmp_path_factory.mktemp("adapter") / "indexers", topk=24)


def test_an_adapter_against_its_base(run: Any, tiny_model: str, adapter: str, text: str) -> None:
    """What makes a dense model sparse is measured beside it; without a selection it is the base again."""
    options = ("--tasks", "ppl,recall", "--limit", "1", "--lengths", "400", "--text", text, "--against", tiny_model)
    found = measured(run, tiny_model, *options, "--adapter", adapter)
    assert [len(one.get("recall", [])) for one in found["results"]] == [0, 1]
    assert found["results"][1]["recall"][0]["recall"]["count"] == 400 - 24
    assert found["differences"][0]["ppl"]["all"]["nats"] != 0
    dense = measured(run, tiny_model, *options, "--adapter", adapter, "--select", "dense")
    assert dense["differences"][0]["ppl"]["all"]["nats"] == 0
    assert len(dense["results"][1]["recall"]) == 1


def test_ruler_with_any_text(run: Any, sparse_model: str, text: str) -> None:
    """Lengths in the model's own tokens; a task of RULER by itself; answers that are written fit in the length."""
    options = ("--tasks", "niah_single_1", "--lengths", "600", "--limit", "1", "--text", text)
    (result,) = measured(run, sparse_model, *options)["results"]
    (answer,), (score,), (cost,) = result["answers"], result["scores"], result["costs"]
    assert (score["task"], score["length"], score["depth"]) == ("niah_single_1", 600, None)
    assert 0.85 * 600 < cost["tokens"] <= 600
    assert answer["written"]  # nonsense, but written
    assert answer["score"] == float(answer["expected"].strip(" .") in answer["written"])


def test_seeds(run: Any, sparse_model: str) -> None:
    """The same samples again with the same seed, others with another one."""
    options = ("--tasks", "passkey", "--lengths", "400,500", "--limit", "1", "--forced")
    first, again, other = (
        [one["expected"] for one in measured(run, sparse_model, *options, "--seed", seed)["results"][0]["answers"]]
        for seed in "112"
    )
    assert first == again
    assert set(first).isdisjoint(other) and len(set(first)) == 10


def test_costs(run: Any, tiny_model: str, text: str) -> None:
    found = measured(run, tiny_model, "--tasks", "ppl", "--lengths", "400", "--limit", "2", "--text", text)
    (cost,) = found["results"][0]["costs"]
    assert (cost["task"], cost["tokens"]) == ("ppl", 800)
    assert cost["seconds"] > 0 and cost["peak_bytes"] > 2**20
    assert cost["tokens_per_second"] == pytest.approx(800 / cost["seconds"])


def test_plots(run: Any, sparse_model: str, text: str, tmp_path: Path) -> None:
    """An SVG that is well-formed and has a line for each selection, and a PNG where matplotlib is."""
    options = ("--tasks", "ppl,recall", "--limit", "1", "--lengths", "400", "--text", text, "--select", "dense,indexer")
    assert run("eval", sparse_model, *options, "--plot", str(tmp_path / "plot.svg")).code == 0
    root = ElementTree.fromstring((tmp_path / "plot.svg").read_text(encoding="utf-8"))
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2 + 4 + 4
    shown = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"Perplexity by position", "Attention kept by a selection (indexer)", "the best"} <= set(shown)
    height = float(root.attrib["viewBox"].split()[3])
    assert all(0 <= float(point.split(",")[1]) <= height for line in lines for point in line.attrib["points"].split())
    pytest.importorskip("matplotlib")
    assert run("eval", sparse_model, *options, "--plot", str(tmp_path / "plot.png")).code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "speed"), "a task is one of ruler, ppl, recall"),
        (("--tasks", ""), "a task is one of"),
        (("--tasks", "ppl"), "measured on a text, and none is given"),
        (("--tasks", "recall"), "recall is of indexers, and llama without an adapter has none"),
        (("--lengths", "513"), "513 tokens are more than the model's 512 positions"),
        (("--lengths", "many"), "lengths must be whole numbers"),
        (("--lengths", "1"), "lengths must be at least 2"),
        (("--limit", "0"), "limit must be at least 1"),
        (("--tasks", "vt"), "vt needs at least"),
        (("--positions", "5,5"), "rising"),
        (("--select", "nearest"), "a selection is one of"),
        (("--select", "indexer"), "no indexer to select with"),
        (("--topk", "5"), "no indexer to select with"),
        (("--select", "recency"), "needs --topk"),
        (("--select", "dense", "--topk", "5"), "dense attention has no top-k"),
        (("--select", "random", "--topk", "0"), "at least 1 token"),
        (("--text", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--plot", "plot.pdf"), r"an .svg or .png file, not plot.pdf"),
        (("--against", "nobody"), "no model 'nobody'"),
        (("--adapter", "nowhere"), "nowhere"),
        (("--index-dtype", "fp8"), "index_dtype 'fp8' is for index keys"),
        (("--kv-cache-dtype", "fp8"), "kv_cache_dtype 'fp8' is for latents"),
    ],
)
def test_mistakes_are_one_line(run: Any, tiny_model: str, arguments: tuple[str, ...], message: str) -> None:
    ended = run("eval", tiny_model, *arguments)
    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith("foveal: ") and message in ended.err and ended.err.count("\n") == 1


def test_other_tokens_are_not_compared(run: Any, tiny_model: str, text: str, tmp_path: Path) -> None:
    """Guards against perplexities of different tokens side by side."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: place for place, token in enumerate(reversed(list(vocabulary)))}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = run("eval", tiny_model, "--tasks", "ppl", "--text", text, "--against", str(other))
    assert ended.code == 2 and "other tokens than" in ended.err
