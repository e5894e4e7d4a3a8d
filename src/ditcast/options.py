"""Flags of the command line: those of the recipe come from its definition."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import click

from ditcast import progress
from ditcast.errors import ConfigError
from ditcast.recipe import Recipe
from ditcast.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

ENGINE_BACKENDS = ("tensorrt", "tensorrt-rtx")  # they run what `ditcast build` has built
LISTS = ("--labels", "--compute-capability")  # options that take several values

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
MODEL = click.argument("model")
OUTPUT = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="what to write"
)
BACKEND = click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    help="runtime: onnxruntime, openvino, tensorrt, tensorrt-rtx, or auto: the faster one of the "
    "first two here, measured once",
)
TARGETS = click.option(
    "--target",
    "targets",
    multiple=True,
    help="graphs to export, several times  [default: onnxruntime and that of --backend]",
)


def runtime_options(command: F) -> F:
    """Add `--threads`, `--spin` and `--trust-engines`; the command gets them as `settings`."""

    @functools.wraps(command)
    def wrapped(threads: int, spin: bool, trust_engines: bool, **rest: Any) -> Any:
        settings = Settings(threads=threads, spin=spin, trust_engines=trust_engines)
        return command(settings=settings, **rest)

    spinning = click.option(
        "--spin/--no-spin",
        default=True,
        show_default=True,
        help="waiting threads keep their cores: faster alone, slower beside other work",
    )
    count = click.option("--threads", default=0, show_default=True, help="0 is one per core")
    trust = click.option(
        "--trust-engines", is_flag=True, help="run TensorRT plans that this user has not built"
    )
    return cast(F, count(spinning(trust(wrapped))))


def writable(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the long work."""
    del context
    if path is None:
        return path
    name = (option.name or "output").removesuffix("_file")
    if not path.parent.is_dir():
        raise ConfigError(f"{name}: no folder {path.parent}; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{name}: {path} cannot be written; give another file")
    return path


JSON = click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=writable,
    help="write figures",
)


def _silence(context: click.Context, option: click.Parameter, value: bool) -> None:
    """No progress until the command ends."""
    del option
    if value:
        context.with_resource(progress.quiet())


QUIET = click.option(
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_silence,
    help="no progress: only results, warnings and errors",
)
STRICT = click.option("--strict", is_flag=True, help="a cache that does nothing is an error")
LOOP = click.option(
    "--loop",
    type=click.Choice(["host", "graph"]),
    default="host",
    show_default=True,
    help="step by step, or sampler.onnx as a whole",
)
IMAGES = click.option(
    "--images", type=click.IntRange(1), help="how many to measure on  [default: 128; random: 1]"
)


def recipe_options(command: F) -> F:
    """Add `--recipe` and one flag per recipe key, so that both have one definition."""
    for name, field in reversed(Recipe.model_fields.items()):
        kind = field.annotation
        if name == "rules":
            continue  # they are lists of mappings: YAML only
        if get_origin(kind) is tuple:
            help_text = f"{field.description}  [default: all]"
            command = click.option(f"--{name}", help=help_text)(command)
            continue
        choice = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
        if get_origin(kind) is UnionType:  # of a type and None
            choice = get_args(kind)[0]
        default = "none" if field.default is None else field.default
        help_text = f"{field.description}  [default: {default}]"
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, type=choice, help=help_text)(command)
    path = click.Path(path_type=Path)
    return click.option("--recipe", "recipe_file", type=path, help="YAML of recipe keys")(command)


def parse_labels(text: str, classes: tuple[str, ...]) -> list[int]:
    """Class numbers or names, one a line or separated by commas; a name may hold commas."""
    parts: list[str] = []
    for line in text.split("\n"):
        parts += [line] if line in classes else line.split(",")
    found = []
    for part in filter(None, parts):
        if part in classes:
            found.append(classes.index(part))
        elif part.removeprefix("-").isdecimal():
            found.append(int(part))
        else:
            names = f" or a name, such as {classes[0]}" if classes else ""
            raise ConfigError(f"labels: got {part!r}, expected class numbers{names}")
    if not found:
        raise ConfigError("labels: got none, expected at least one, such as --labels 3 5")
    return found


def join_labels(arguments: list[str]) -> list[str]:
    """`--labels 3 5` as one value of two lines: click options take one value each.

    So it is with all `LISTS`.
    """
    found: list[str] = []
    inside = False
    for argument in arguments:
        if inside and not (argument.startswith("-") and not argument[1:].isdigit()):
            found[-1] += "\n" * bool(found[-1]) + argument
            continue
        inside = argument in LISTS
        found += [argument, ""] if inside else [argument]
    return found


def write_json(path: Path | None, values: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write the figures of a command to the file of its `--json`, if there is one."""
    if path is not None:
        path.write_text(json.dumps(values, indent=1) + "\n")
