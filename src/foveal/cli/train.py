"""`foveal train`: run a training recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE.toml", help="What to train, on what, and how.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as run.seed=1."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every key of a recipe with its meaning.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write indexers into the model (deepseek_v32), not as an adapter.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu or cuda, cuda:1, ... (default: cpu; under torchrun CUDA, where there is any)", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object about the result.")] = False,
) -> None:
    """Train a model, or the indexers that make one sparse.

    A run that was stopped goes on from its last checkpoint when it is started again. Several processes share a run
    under torchrun: torchrun --nproc-per-node 4 --no-python foveal train RECIPE.toml.
    """
    from foveal.train.recipe import explain as explained
    from foveal.train.recipe import read_recipe
    from foveal.train.schema import Recipe

    if explain:
        print(explained(Recipe), end="")
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe, or --explain", param_hint="RECIPE.toml")
    from foveal.train.parallel import join
    from foveal.train.trainer import Trainer

    settings = read_recipe(recipe, Recipe, overrides or ())
    parallel = join(settings.parallel, device)
    try:
        trainer = Trainer(settings, parallel)
        written = trainer.train(merge=merge)
    finally:
        parallel.leave()
    if not parallel.leads:
        return
    if as_json:
        progress = trainer.progress
        print(
            json.dumps(
                {
                    "written": [str(path) for path in written],
                    "updates": progress.update,
                    "tokens": progress.tokens,
                    "seconds": progress.seconds,
                }
            )
        )
    else:
        for path in written:
            print(f"wrote {path}")
