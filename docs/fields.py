"""Every field of a config, read from the classes: `python docs/fields.py > docs/fields.md` writes the page anew."""

import inspect
import re
import typing
from collections.abc import Iterator

import yaml
from pydantic.fields import FieldInfo

from gadjax.algorithms.registry import ALGORITHMS
from gadjax.algorithms.stage import SamplingStageConfig, StageConfig
from gadjax.config import Config
from gadjax.section import Section

HEAD = """# Every field of a config

By section, with the value that holds where it is left out; [configs.md](configs.md) is the page to read first. Every field can be given on
the command line, too:

    gadjax run configs/quickstart.yaml run.name=short stages.gad.max_steps=20

`python docs/fields.py > docs/fields.md` writes this page from the classes.
"""
FIELD = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
END = "\n...\n"  # of YAML's plain values
TABLE = "| field | by default | |\n|---|---|---|"


def meanings(section: type[Section]) -> dict[str, str]:
    """What the docstrings of a section and its bases say of its fields."""
    told: dict[str, str] = {}
    for each in reversed(section.__mro__):
        _, _, attributes = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        told |= {name: " ".join(text.split()) for name, text in FIELD.findall(attributes)}
    return told


def nested(annotation: object) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := nested(part))), None)


def default(field: FieldInfo) -> str:
    """As one would write it in a config; nothing for a section that is there anyway."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        return ""
    text = yaml.safe_dump([*value] if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return f"`{text.removesuffix(END).strip()}`"


def lines(section: type[Section], prefix: str, seen: dict[type[Section], str]) -> Iterator[str]:
    """A row for each field, but for those that the section has from one that was `seen` under another name; each inner section follows."""
    told = meanings(section)
    inherited = {name for base in section.__mro__[1:] if base in seen for name in base.model_fields if name not in section.__annotations__}
    seen[section] = prefix.rstrip(".")
    for name, field in section.model_fields.items():
        if name in inherited or name == "algorithm":
            continue
        path, inner = f"{prefix}{field.alias or name}", nested(field.annotation)
        base = next((base for base in inner.__mro__ if base in seen), None) if inner else None
        also = f" It has the fields of `{seen[base]}`{', and' if base is not inner else '.'}" if base else ""
        yield f"| `{path}` | {default(field)} | {told[name]}{also} |"
        if inner and base is not inner:
            yield from lines(inner, f"{path}.", seen)


def page() -> str:
    """The whole page."""
    seen: dict[type[Section], str] = {}
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        section = nested(field.annotation)
        assert section is not None, "there are sections only"
        about = (section.__doc__ or "").partition("\n\n")[0]
        parts.append(f"## `{name}`\n")
        if section in seen:
            parts.append(f"{meanings(Config)[name][0].upper()}{meanings(Config)[name][1:]} Each has the fields of `{seen[section]}`.\n")
        elif section is StageConfig:
            parts.append("Named stages in their order. `algorithm` is one of " + ", ".join(f"`{each}`" for each in ALGORITHMS) + ".\n")
            for title, stage in {"Every stage": StageConfig, "`warmup` and `gad`": SamplingStageConfig}.items():
                parts += [f"{title}:\n", TABLE, *lines(stage, "stages.NAME.", seen), ""]
            for title, entry in ALGORITHMS.items():
                if rows := [*lines(entry.config, "stages.NAME.", seen)]:
                    parts += [f"`{title}`:\n", TABLE, *rows, ""]
        else:
            parts += [f"{about}\n", TABLE, *lines(section, f"{name}.", seen), ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
