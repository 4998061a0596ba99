"""Settings files: ``--config settings.yaml`` under the command line and over the defaults, and ``gemq settings``."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

# not settings: they say where settings come from, or end the command
_NEVER = {"help-all", "config-file", "config", "help", "example"}
# decisions of whoever types the command: a file may be a stranger's
_LINE_ONLY = {"trust-remote-code"}
# bytes of a settings file
_LARGEST = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without tags, without aliases, which can stand for more than memory holds, and without keys that come
    twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node; an alias is an error."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"aliases like *{event.anchor} are not read", event.start_mark
            )
        return super().compose_node(parent, index)


def _distinct(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, f"{_shown(key)} is no key", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {_shown(key)} comes twice", node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _shown(value: Any) -> str:
    """A value for an error, cut: it may be as large as the file."""
    try:
        text = repr(value)
    except ValueError:
        # a whole number of thousands of digits
        text = f"a {type(value).__name__} that is too long"
    return text if len(text) <= 80 else f"{text[:77]}..."


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _distinct)


def _options(command: Any) -> dict[str, Any]:
    """The parameters of a command by the name that a settings file uses: the long option, or the argument."""
    found = {}
    for parameter in command.params:
        long = [o for o in parameter.opts if o.startswith("--")]
        name = (long[0][2:] if long else parameter.name).replace("_", "-")
        if name not in _NEVER and name not in _LINE_ONLY:
            found[name] = parameter
    return found


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise typer.BadParameter(f"--config {path} has more than {_LARGEST} bytes, which is no settings file")
        content = yaml.load(data.decode("utf-8-sig"), _Loader)
    except OSError as error:
        raise typer.BadParameter(f"--config {path} cannot be read ({error.strerror})") from None
    except RecursionError:
        raise typer.BadParameter(f"--config {path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise typer.BadParameter(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise typer.BadParameter(f"--config {path} must hold keys and values, got {type(content).__name__}")
    return content


def _value(path: Path, key: str, value: Any, parameter: Any) -> Any:
    """A YAML value as the command line would spell it."""
    repeats = bool(getattr(parameter, "multiple", False)) or parameter.nargs == -1
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise typer.BadParameter(f"--config {path}: {key} must be true or false, got {_shown(value)}")
        return value
    if isinstance(value, dict) and repeats:
        return [f"{_word(path, key, name)}={_word(path, key, item)}" for name, item in value.items()]
    if isinstance(value, list):
        words = [_word(path, key, item) for item in value]
        return words if repeats else ",".join(words)
    return [_word(path, key, value)] if repeats else _word(path, key, value)


def _word(path: Path, key: str, value: Any) -> str:
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not plain or (isinstance(value, int) and value.bit_length() > 64) or (isinstance(value, str) and "\0" in value):
        raise typer.BadParameter(
            f"--config {path}: {key} must be a text, a number or a list of them, got {_shown(value)}"
        )
    return str(value)


def load_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``: put the file's values under the command line's. Unknown keys are errors."""
    if path is None or context.resilient_parsing:
        return path
    known, values = _options(context.command), {}
    for key, value in _parse(path).items():
        name = key.replace("_", "-") if isinstance(key, str) else _shown(key)
        if name in _LINE_ONLY:
            raise typer.BadParameter(f"--config {path}: {name} is given on the command line only")
        if name not in known:
            near = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"gemq settings {context.command.name} shows all"
            raise typer.BadParameter(f"--config {path}: unknown key {_shown(key)}; {hint}")
        if value is not None:
            values[known[name].name] = _value(path, str(key), value, known[name])
    context.default_map = {**(context.default_map or {}), **values}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", callback=load_settings, is_eager=True,
                 help="YAML file of settings; the command line wins over it (see gemq settings --example)."),
]


def given(context: typer.Context, name: str) -> bool:
    """Return True if a parameter came from the command line or a settings file, False for its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def settings(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="Whose settings: quantize, eval, generate or bench.")] = "quantize",
    example: Annotated[bool, typer.Option("--example", help="Print a settings file with every key and its default.")]
    = False,
) -> None:
    """Show what a settings file for --config may hold.

    [dim]gemq settings --example > settings.yaml[/dim]
    """
    commands: dict[str, Any] = getattr(context.find_root().command, "commands", {})
    known = [name for name, c in commands.items() if any(p.name == "config_file" for p in c.params)]
    if command not in known:
        raise typer.BadParameter(f"settings files are for {', '.join(known)}, got {command!r}")
    options = {name: p for name, p in _options(commands[command]).items() if not getattr(p, "hidden", False)}
    if not example:
        print("\n".join(options))
        return
    print(f"# gemq {command} --config settings.yaml")
    print("# Defaults are shown: take the # away from what is to be different. The command line wins over this file,")
    print("# this file over a recipe, and a recipe over the defaults.")
    for name, parameter in options.items():
        print()
        for line in textwrap.wrap(" ".join((parameter.help or name).split()), 100):
            print(f"## {line}")
        print(_line(name, parameter))


def _line(name: str, parameter: Any) -> str:
    default = parameter.default
    if default is None or callable(default) or default == [] or type(default).__name__ == "Sentinel":
        return f"# {name}:"
    plain = getattr(default, "value", default)
    # one scalar, without the document's end mark; texts that would read as numbers are quoted
    written = yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    return f"# {name}: {written}"
