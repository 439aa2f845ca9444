"""Whole runs of tiny recipes: resuming, results, and what they can be used for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make_oracle
from safetensors import safe_open
from tiny import stage

from foveal import LLM, SamplingParams
from foveal.models.load import load_model
from foveal.train.checkpoints import Checkpoints, progress_of
from foveal.train.schema import Recipe
from foveal.train.trainer import Trainer

STAGES = stage("pretrain", 4, optimizer="muon") + stage("warmup", 3) + stage("sparse", 3, micro_tokens=64)
Make = Callable[..., Recipe]


def losses(folder: Path) -> list[tuple[int, float | None, float | None]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(x["update"], x.get("loss"), x.get("index_loss")) for x in lines if "tokens_per_second" in x]


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [2, 4, 5, 8])
def test_killed_and_resumed(recipe: Make, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Losses after a kill that differ in any bit from those of a run that nobody killed."""
    whole = recipe(STAGES, output="whole")
    Trainer(whole).train()
    expected = losses(whole.run.output)
    assert len(expected) == 10 and expected[-1][1] is not None and expected[-1][2] is not None

    cut = recipe(STAGES, output="cut", checkpoint_minutes=1e-9)  # a checkpoint after every update
    save, saved = Checkpoints.save, []

    def save_or_die(self: Checkpoints, update: int, *args: Any) -> None:
        save(self, update, *args)
        saved.append(update)
        if update == after:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_or_die)
    with pytest.raises(Killed):
        Trainer(cut).train()
    monkeypatch.setattr(Checkpoints, "save", save)
    Trainer(cut).train()
    assert losses(cut.run.output) == expected
    models = [load_model(r.run.output / "model").state_dict() for r in (whole, cut)]
    assert all(torch.equal(a, models[1][name]) for name, a in models[0].items())


def test_a_full_disk(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be written must leave the old one, and say so in one line."""
    made = recipe(stage("pretrain", 6), checkpoint_minutes=1e-9, keep_checkpoints=1)
    folder = made.run.output / "checkpoints"
    count = 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        (Path(kwargs["checkpoint_id"])).mkdir(parents=True)

    monkeypatch.setattr("foveal.train.checkpoints.save", full)
    with pytest.raises(OSError, match="No space left"):
        Trainer(made).train()
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def test_the_result_is_a_model(recipe: Make, tmp_path: Path) -> None:
    """A directory that foveal itself cannot load, or that answers otherwise than the trainer's model did."""
    made = recipe(STAGES)
    trainer = Trainer(made)
    (written,) = trainer.train()
    assert written == made.run.output / "model"
    loaded = load_model(written)
    ids = torch.arange(50)[None] % 300
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), trainer.decoder(ids), rtol=1e-4, atol=1e-4)
    answer = LLM(written).generate("takin", SamplingParams(temperature=0, max_tokens=5))[0]
    assert len(answer.outputs[0].token_ids) == 5
    again = Trainer(made)
    assert again.train() == [written]
    assert all(torch.equal(a, b) for a, b in zip(again.decoder.parameters(), trainer.decoder.parameters(), strict=True))


INDEXER = "[model.indexer]\nheads = 4\nhead_dim = 16\nrope_dim = 8\ntopk = 8"


@pytest.fixture
def base(tmp_path: Path, recipe: Make) -> Path:
    """A dense llama with the recipe's tokenizer."""
    folder = tmp_path / "base"
    make_oracle("llama", folder, vocab_size=320)
    trainer = Trainer(recipe(stage("pretrain", 1)))
    trainer.tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter(recipe: Make, base: Path, tmp_path: Path) -> None:
    """A base that an indexer-only run changed, an adapter that a model takes and does not use, or takes and should
    not: it was trained on another one."""
    made = recipe(stage("warmup", 6) + stage("sparse", 2, learns="indexer"), f'start = "{base}"\n{INDEXER}')
    (adapter,) = Trainer(made).train()
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    index = [line["index_loss"] for line in map(json.loads, (made.run.output / "log.jsonl").open()) if "mfu" in line]
    assert index[5] < index[0]

    ids = torch.randint(320, (1, 60))
    dense, sparse = load_model(base), load_model(base, adapter=adapter)
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids)[:, :8], dense(ids)[:, :8], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(sparse(ids)[:, 20:], dense(ids)[:, 20:], atol=1e-3)
    outputs = [
        LLM(base, adapter=adapter, max_num_batched_tokens=size).generate(
            {"prompt_token_ids": ids[0].tolist()}, SamplingParams(temperature=0, max_tokens=12, logprobs=0)
        )[0]
        for size in (7, 2048)
    ]
    with torch.no_grad():
        whole = ids[0].tolist() + outputs[0].outputs[0].token_ids
        expected = sparse(torch.tensor([whole]))[0, 59:-1].log_softmax(-1).max(-1)
    for output in outputs:
        answer = output.outputs[0]
        assert answer.token_ids == expected.indices.tolist()
        found = [place[token].logprob for place, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(found), expected.values, rtol=1e-4, atol=1e-4)

    other = tmp_path / "other"
    make_oracle("llama", other, seed=1, vocab_size=320)
    with pytest.raises(ValueError, match=r"was trained on .*base"):
        load_model(other, adapter=adapter)
    with pytest.raises(ValueError, match="attends to windows"):
        make_oracle("mistral", other, vocab_size=320)
        load_model(other, adapter=adapter)


def test_stored_in_bfloat16(recipe: Make) -> None:
    """A result twice as large as asked for, or one that is then computed in bfloat16; norms that were rounded."""
    (written,) = Trainer(recipe(stage("pretrain", 1), stored_dtype="bfloat16")).train()
    with safe_open(written / "model.safetensors", "pt") as file:
        dtypes = {name: (file.get_tensor(name).dim(), file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    exact = {name for name, (dim, dtype) in dtypes.items() if dim > 1 and dtype == torch.float32}
    assert all(name.endswith(("indexer.weights_proj.weight", "mlp.gate.weight")) for name in exact)
    assert {dtype for dim, dtype in dtypes.values() if dim == 1} == {torch.float32}
    assert dtypes["model.embed_tokens.weight"] == (2, torch.bfloat16)
    assert load_model(written).options.dtype == torch.float32


def test_an_adapter_stored_in_bfloat16(recipe: Make, base: Path) -> None:
    """An adapter that is larger than its matrices need."""
    (written,) = Trainer(recipe(stage("warmup", 1), f'start = "{base}"\n{INDEXER}', stored_dtype="bfloat16")).train()
    with safe_open(written / "adapter.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {x.dtype for x in tensors if x.dim() > 1} == {torch.bfloat16}
    assert {x.dtype for x in tensors if x.dim() == 1} == {torch.float32}


def test_what_a_narrow_model_keeps_in_float32_is_stored_so(recipe: Make, tmp_path: Path) -> None:
    """Decays of a recurrent layer that are rounded because they happen to be a matrix."""
    make_oracle("mamba", tmp_path / "mamba", vocab_size=320)
    Trainer(recipe(stage("pretrain", 1))).tokenizer.save_pretrained(tmp_path / "mamba")
    (written,) = Trainer(
        recipe(stage("pretrain", 1), f'start = "{tmp_path / "mamba"}"', stored_dtype="bfloat16")
    ).train()
    with safe_open(written / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    decays = [name for name in dtypes if name.endswith("A_log")]
    assert decays and all(dtypes[name] == torch.float32 for name in decays)
    assert torch.bfloat16 in dtypes.values()


def test_merged_into_deepseek_v32(recipe: Make, tmp_path: Path) -> None:
    """A merged directory that transformers cannot read, or reads and computes something else."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    make_oracle("deepseek_v3", base, vocab_size=320)
    trainer = Trainer(recipe(stage("pretrain", 1)))
    trainer.tokenizer.save_pretrained(base)
    indexer = "[model.indexer]\nheads = 16\nhead_dim = 32\ntopk = 12"
    made = recipe(stage("warmup", 3), f'start = "{base}"\n{indexer}')
    trainer = Trainer(made)
    (written,) = trainer.train(merge=True)
    oracle = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    assert type(oracle).__name__ == "DeepseekV32ForCausalLM"
    ids = torch.randint(320, (2, 70))
    with torch.no_grad():
        mine = load_model(written, index_dtype="float32")(ids)
        torch.testing.assert_close(mine, oracle(ids).logits, rtol=1e-4, atol=1e-4)
        dense = load_model(base)(ids)
    assert not torch.allclose(mine[:, 30:], dense[:, 30:], atol=1e-3)
    # The same indexers as an adapter of the base.
    (adapter,) = Trainer(made).train()
    with torch.no_grad():
        torch.testing.assert_close(load_model(base, adapter=adapter)(ids), mine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stages", "model", "message"),
    [
        (stage("pretrain", 1).replace("context = 64", "context = 512").replace("128", "512"), None, "512.* 256 pos"),
        (stage("pretrain", 1) + stage("warmup", 1), 'start = "{llama}"', "no indexers"),
        (stage("sparse", 1), 'start = "{llama}"', "no indexers"),
        (stage("distil", 1), 'start = "{llama}"', "needs a teacher"),
        (stage("pretrain", 1, learns="indexer"), None, "pretrain stage has no loss for indexers"),
        (stage("distil", 1, teacher="{llama}"), None, "teacher.*128 tokens.* 320"),
        (stage("pretrain", 1), 'start = "{llama}"', "tokenizer has 300 tokens.*128"),
        (stage("pretrain", 1), 'start = "{llama}"\n[data.tokenizer]\nvocab_size = 300', "llama has its own"),
    ],
)
def test_mistakes(recipe: Make, tmp_path: Path, stages: str, model: str | None, message: str) -> None:
    """A run that starts, or fails with a traceback deep inside, where the recipe cannot work."""
    llama = tmp_path / "llama"
    vocab = 320 if "no indexers" in message or "needs a teacher" in message else 128
    make_oracle("llama", llama, vocab_size=vocab)
    Trainer(recipe(stage("pretrain", 1))).tokenizer.save_pretrained(llama)
    arguments = [model.format(llama=llama)] if model else []
    with pytest.raises(ValueError, match=message):
        Trainer(recipe(stages.replace("{llama}", str(llama)), *arguments)).train()


def test_distil(recipe: Make) -> None:
    """A stage whose loss does not fall towards its own dense form, or whose teacher learns."""
    made = recipe(stage("pretrain", 3) + stage("distil", 6))
    Trainer(made).train()
    assert all(loss is not None and loss >= 0 for update, loss, _ in losses(made.run.output) if update > 3)


def test_bfloat16(recipe: Make) -> None:
    """A run that cannot learn in bfloat16, or whose result is not bfloat16."""
    made = recipe(stage("pretrain", 12) + stage("sparse", 2), 'config = "config.json"\ndtype = "bfloat16"')
    trainer = Trainer(made)
    (written,) = trainer.train()
    first, *_, last = [loss for update, loss, _ in losses(made.run.output) if update <= 12]
    assert first is not None and last is not None and last < 0.9 * first
    assert load_model(written).embed_tokens.weight.dtype == torch.bfloat16


def test_evaluations_that_cannot_be_made(recipe: Make) -> None:
    """A run that fails at its first evaluation, hours after its start."""
    with pytest.raises(ValueError, match=r"passkey_lengths: 300.*256 positions"):
        Trainer(recipe(stage("pretrain", 1), passkey_lengths=[64, 300]))
    with pytest.raises(ValueError, match="sample = ''"):
        Trainer(recipe(stage("pretrain", 1), sample=""))


def die_after(monkeypatch: pytest.MonkeyPatch, made: Recipe, after: int) -> None:
    """Run until the checkpoint of an update."""
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, update: int, *args: Any) -> None:
        save(self, update, *args)
        if update == after:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Checkpoints, "save", save_and_die)
        Trainer(made).train()


def test_bfloat16_killed_between_stages(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 copies made of the first random weights, which the next update would put in the place of all learned."""
    model = 'config = "config.json"\ndtype = "bfloat16"'
    stages = stage("pretrain", 2) + stage("finetune", 2)
    whole, cut = (recipe(stages, model, output=name) for name in ("whole", "cut"))
    Trainer(whole).train()
    die_after(monkeypatch, cut, 2)
    Trainer(cut).train()
    assert losses(cut.run.output) == losses(whole.run.output)


def test_a_changed_recipe(recipe: Make) -> None:
    """A finished run, started again under a recipe of another length, that replaces its result by random weights."""
    Trainer(recipe(stage("pretrain", 2) + stage("pretrain", 1))).train()
    again = Trainer(recipe(stage("pretrain", 5) + stage("pretrain", 1)))
    (written,) = again.train()
    fresh = Trainer(recipe(stage("pretrain", 1), output="fresh"))
    learned = load_model(written).embed_tokens.weight
    assert not torch.equal(learned, fresh.decoder.embed_tokens.weight)
    with pytest.raises(ValueError, match="further than this recipe"):
        Trainer(recipe(stage("pretrain", 2))).train()


def test_sources_of_a_stage(recipe: Make) -> None:
    """A stage that reads what it was not told to."""
    more = '[[data.text]]\nname = "more"\nfiles = ["text.txt"]\n'
    made = recipe(more + stage("pretrain", 2, sources=["more"]), checkpoint_minutes=1e-9)
    Trainer(made).train()
    assert list(progress_of(made.run.output / "checkpoints" / "step-00000001")["feed"]["rows"]) == ["more"]
    with pytest.raises(ValueError, match=r"stages\.sources: other is none of text0, more"):
        recipe(more + stage("pretrain", 2, sources=["other"]))


def test_indexers_of_its_own(recipe: Make) -> None:
    """Learned indexers that nothing is written of, since the base has them already."""
    made = recipe(stage("warmup", 1))
    assert Trainer(made).train() == [made.run.output / "model"]


def test_what_cannot_be_written(recipe: Make, base: Path) -> None:
    """A run of hours whose result cannot be written, which is only said at its end; a base's quantisation that is
    written beside weights which no longer have it."""
    start = f'start = "{base}"\n{INDEXER}'
    made = recipe(stage("warmup", 1), start, output="new")
    with pytest.raises(ValueError, match="sparse llama has no standard"):
        Trainer(made).train(merge=True)
    trainer = Trainer(recipe(stage("finetune", 1), start, output="new"))
    trainer.model.raw_config = None  # as of a GGUF file
    with pytest.raises(ValueError, match=r"no config\.json"):
        trainer.train()
    assert not made.run.output.exists()
    trainer.model.raw_config = json.loads((base / "config.json").read_text()) | {"quantization_config": {}}
    written = trainer.train()[0]
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
