"""Write `docs/cli.md` from the commands themselves.

python tools/cli_reference.py
"""

from __future__ import annotations

import inspect
from pathlib import Path

import click

from ditcast.cli import app
from ditcast.recipe import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """\
# Command line

Made by `tools/cli_reference.py` from the commands themselves; `ditcast COMMAND --help` says the
same.

Exit codes: 0 done; 1 a check failed; 2 wrong usage or input, in one line on standard error. Results
go to standard output, progress and warnings to standard error. `--labels` and
`--compute-capability` take several values (`--labels 3 5`).
"""
RECIPE_HEAD = """\
## Keys of the recipe

Flags of `calibrate`, `compile` and `tune`, and keys of the YAML file of `--recipe`, with `_` in
place of `-`. `rules` are a key of that file only.
"""
DEFAULT = "[default: "  # where a help text names a default that is found out when the command runs
NUMBERS = {"integer range": "INTEGER", "float range": "FLOAT"}


def page() -> str:
    """The whole page: a section per command, and one on the flags that are recipe keys."""
    sections = [_section(name, app.commands[name]) for name in sorted(app.commands)]
    recipe = [option for option in _options(app.commands["compile"]) if _of_recipe(option)]
    return "\n".join([HEAD, *sections, RECIPE_HEAD, *_table(recipe)])


def _section(name: str, command: click.Command) -> str:
    """Usage, help and options of a command."""
    options = _options(command)
    own = [option for option in options if not _of_recipe(option)]
    usage = ["ditcast", name]
    usage += [
        str(argument.name).upper() + ("..." if argument.nargs < 0 else "")
        for argument in command.params
        if isinstance(argument, click.Argument)
    ]
    usage += [f"{option.opts[0]} {_kind(option)}" for option in own if option.required]
    lines = [f"## ditcast {name}", "", f"`{' '.join([*usage, '[OPTIONS]'])}`", ""]
    lines += [inspect.cleandoc(command.help or ""), ""]
    if own:
        lines += _table(own)
    if len(own) < len(options):
        lines += ["Every [key of the recipe](#keys-of-the-recipe) is an option too.", ""]
    return "\n".join(lines)


def _options(command: click.Command) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option)]


def _of_recipe(option: click.Option) -> bool:
    """Whether an option is a recipe key; some commands have others of the same name."""
    field = Recipe.model_fields.get(str(option.name))
    return field is not None and (option.help or "").startswith(str(field.description))


def _table(options: list[click.Option]) -> list[str]:
    """A row per option: its names and value, its default, and what it does."""
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for option in options:
        text, _, named = (option.help or "").partition(DEFAULT)
        default = named.removesuffix("]") or _default(option)
        lines.append(f"| {_names(option)} | {default} | {text.strip()} |")
    return [*lines, ""]


def _names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        return f"{names}, `{option.secondary_opts[0]}`"
    if isinstance(option.type, click.Choice):
        return f"{names} ({', '.join(option.type.choices)})"
    return names if option.is_flag else f"{names} {_kind(option)}"


def _kind(option: click.Option) -> str:
    """What kind of value an option takes."""
    return NUMBERS.get(option.type.name, option.type.name.upper())


def _default(option: click.Option) -> str:
    if option.required:
        return "(required)"
    if not option.show_default:
        return ""
    if option.secondary_opts:
        return (option.opts if option.default else option.secondary_opts)[0].removeprefix("--")
    return str(option.default)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
