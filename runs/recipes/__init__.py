"""The recipes that come with llmctl: whole run.yaml files, model and hardware, to start from.

`llmctl init --recipe NAME` writes one; each is a valid spec as it stands.
"""

from __future__ import annotations

from importlib import resources

DEFAULT = "quickstart"
_ORDER = (
    DEFAULT,
    "finetune",
    "evaluate",
    "speedrun",
    "gpt2",
    "1xrtx3090",
    "8xa100-40gb",
    "8xa100-80gb",
    "8xh100",
    "8xb200",
)


class UnknownRecipe(KeyError):
    """There is no recipe of that name; `str()` lists those that there are."""

    exit_code = 2

    def __str__(self) -> str:
        return f"there is no recipe {self.args[0]!r}; there are {', '.join(names())}"


def names() -> list[str]:
    """The recipes, the one to begin with first."""
    here = resources.files(__name__)
    found = {entry.name.removesuffix(".yaml") for entry in here.iterdir() if entry.name.endswith(".yaml")}
    return [name for name in _ORDER if name in found] + sorted(found.difference(_ORDER))


def text(name: str) -> str:
    """The recipe as it is shipped, comments included. Raises UnknownRecipe."""
    if name not in names():
        raise UnknownRecipe(name)
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The first line of the recipe's opening comment: what it is, in a sentence. Raises UnknownRecipe."""
    return text(name).splitlines()[0].lstrip("# ")
