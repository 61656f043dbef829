"""Run one row of the SQAKD paper's tables, by a recipe.

    accelerate launch examples/paper/run.py cifar10-resnet20-ewgs-w2a2
    accelerate launch examples/paper/run.py cifar10-resnet20-ewgs-w2a2 --dataset fashion_mnist --epochs 3

A recipe is a file of arguments for `sqakd distill`; README.md beside this script lists them. Further arguments
are passed on and overrule it; another --dataset drops what belongs to its own (label column, image size).
--epochs N sets the epochs of both teacher and student.
"""

import difflib
import json
import sys
from pathlib import Path

from sqakd_hf import InputError
from sqakd_hf.cli import distill


RECIPES = Path(__file__).parent / "recipes"
OF_THE_DATASET = ("label_column", "image_size")


def main() -> None:
    known = sorted(path.stem for path in RECIPES.glob("*.json"))
    name, *given = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nRecipes: {', '.join(known)}")
        return
    name = Path(name).name.removesuffix(".json")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise InputError(
            f"There is no recipe {name!r}. " + (f"Close: {', '.join(close)}." if close else "See --help.")
        )
    recipe = json.loads((RECIPES / f"{name}.json").read_text())
    if any(argument.split("=")[0] == "--dataset" for argument in given):
        recipe = {key: value for key, value in recipe.items() if key not in OF_THE_DATASET}
    recipe.setdefault("output_dir", f"outputs/paper/{name}")
    distill.main([*as_arguments(recipe), *expand_epochs(given)])


def as_arguments(recipe: dict) -> list[str]:
    """Return a recipe's entries as command-line arguments."""
    arguments = []
    for key, value in recipe.items():
        arguments.append(f"--{key}")
        arguments += map(str, value) if isinstance(value, list) else [str(value)]
    return arguments


def expand_epochs(given: list[str]) -> list[str]:
    """Return the arguments with `--epochs N` written as the epochs of teacher and student."""
    if "--epochs" not in given:
        return given
    place = given.index("--epochs")
    if place + 1 == len(given):
        raise InputError("--epochs needs a number.")
    number = given[place + 1]
    return [*given[:place], "--num_train_epochs", number, "--teacher_epochs", number, *given[place + 2 :]]


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
