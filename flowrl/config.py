"""Reading a run's configuration: strict YAML, `key=value` overrides, and every mistake reported at once.

    config = load_config("quickstart", ["updates=2", "optimizer.lr=1e-4"])

`flowrl.schema` holds the fields, `flowrl.config_checks` the rules that join them.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flowrl.config_checks import problems
from flowrl.errors import UserError
from flowrl.schema import Config

__all__ = [
    "Config",
    "apply_overrides",
    "config_folder",
    "descriptions",
    "load_config",
    "parse_config",
    "parse_yaml",
    "read_yaml",
    "resolved_yaml",
    "shipped_config",
    "shipped_configs",
    "valid_names",
]

Data = dict[str, Any]


# ---------------------------------------------------------------------------------------------------- shipped configs
def config_folder() -> Path:
    """The folder of shipped configs: inside the package when installed from a wheel, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of all shipped run configs, such as "quickstart" and "flow_grpo/flux_dev"."""
    folder = config_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("accelerate/"))


def shipped_config(name: str) -> Path:
    """Path of a shipped config by its name. Raises UserError with the nearest name if there is none."""
    path = config_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    known = shipped_configs()
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"no config named {name!r}; expected a path to a YAML file or one of {', '.join(known)}{hint}")


# ------------------------------------------------------------------------------------------------------- strict YAML
class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-4 as a number (YAML 1.1 would take it for a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a text", key_node.start_mark)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the texts that _StrictLoader would read as numbers."""


for _kind in (_StrictLoader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text strictly. Raises UserError naming `where`, the line and the column."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{place}: {what}; expected valid YAML with each key once; correct the file") from error


def read_yaml(path: Path) -> Data:
    """Read a YAML file that holds one mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; expected a YAML file; is this the right file?") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a readable YAML file") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        got = "an empty file" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{path} holds {got}; expected `key: value` lines; see `flowrl list` for shipped configs")
    return data


# --------------------------------------------------------------------------------------------------------- overrides
def apply_overrides(data: Data, overrides: Sequence[str]) -> tuple[Data, list[str]]:
    """Set dotted keys from `key=value` texts, values read as YAML. Returns new data and a list of problems."""
    data = _copy(data)
    found: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key):
            found.append(f"override {override!r}: expected key=value with a dotted key, such as optimizer.lr=1e-4")
            continue
        try:
            value = parse_yaml(text, f"override {override!r}")
        except UserError as error:
            found.append(str(error))
            continue
        *parents, leaf = key.split(".")
        section = data
        for name in parents:
            if section.get(name) is None:  # a section that is absent or null is opened by setting one of its keys
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                found.append(
                    f"override {override!r}: {name} is a single value, not a section; expected a key inside one"
                )
                break
        else:
            section[leaf] = value
    return data, found


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


# -------------------------------------------------------------------------------------------------------- validation
def load_config(source: str | Path, overrides: Sequence[str] = (), *, processes: int = 1) -> Config:
    """Read, override and check a config.

    Args:
        source: path of a YAML file, or the name of a shipped config.
        overrides: `key=value` with dotted keys; values are read as YAML, so `null`, `true`, `1e-4` and `[a, b]` work.
        processes: number of processes of the run, for the rules that depend on it.

    Raises:
        UserError: one line for every problem found, before anything is loaded.
    """
    path = Path(source)
    data = read_yaml(path if path.is_file() or path.suffix in (".yaml", ".yml") else shipped_config(str(source)))
    data, found = apply_overrides(data, overrides)
    return parse_config(data, processes=processes, already=found)


def parse_config(data: Data, *, processes: int = 1, already: Sequence[str] = ()) -> Config:
    """Check a nested dictionary against the schema and the cross-field rules; see `load_config`.

    `policy.dtype: auto` becomes the type for the device, `rollout.level: null` the kernel's: a run folder says what
    they were.
    """
    found = list(already)
    broken: set[str] = set()
    config: Config | None = None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = _dotted(detail)
            if name not in broken:  # a union reports each of its arms
                broken.add(name)
                found.append(_explain(name, detail))
        config = _repaired(data, broken)
    if config is not None:
        found += [p.message for p in problems(config, processes) if not any(_touches(n, broken) for n in p.names)]
    if found or config is None:
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise UserError("\n".join([f"the configuration has {count}:", *(f"  - {line}" for line in found)]))
    return _settled(config)


def _settled(config: Config) -> Config:
    """The config with the values that follow from the device and from the kernel in place of "auto" and null."""
    policy, rollout = config.policy, config.rollout
    if policy.dtype == "auto":
        from flowrl.policies.loading import native_dtype

        policy = policy.model_copy(update={"dtype": native_dtype(policy.device)})
    if rollout.level is None:
        from samplers.kernels import get_kernel

        rollout = rollout.model_copy(update={"level": get_kernel(rollout.kernel).default_level})
    return config.model_copy(update={"policy": policy, "rollout": rollout})


def resolved_yaml(config: Config) -> str:
    """The whole configuration with every default filled in, as YAML that loads to an equal config."""
    data = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _dotted(detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"]]
    if detail["type"] != "extra_forbidden":  # pydantic adds the arm of a union, which is no key of the file
        parts = [part for part in parts if part not in ("str", "dict[str,any]")]
    return ".".join(parts)


def _touches(name: str, broken: set[str]) -> bool:
    return any(name == b or name.startswith(f"{b}.") or b.startswith(f"{name}.") for b in broken)


def _explain(name: str, detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown key {name}; {_nearest(name)}"
    meaning = descriptions().get(re.sub(r"\.\d+$", "", name), "")
    meaning = f" ({meaning})" if meaning else ""
    if detail["type"] == "missing":
        return f"{name} is missing; expected a value{meaning}; add it to the file"
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name} is {detail['input']!r}; expected {message}{meaning}"


def _nearest(name: str) -> str:
    """The valid dotted name that looks most like a wrong one, by its whole or by its last part."""
    known = valid_names()
    leaf = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if not near:
        leaves = [k.rpartition(".")[2] for k in known]
        best = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
        near = [k for k, last in zip(known, leaves, strict=True) if best and last == best[0]]
    if not near:
        return "expected one of the keys that `flowrl list keys` names; remove it"
    return f"did you mean {' or '.join(near)}?"


def valid_names() -> list[str]:
    """All dotted names of the schema, sections included."""
    return list(descriptions())


def descriptions(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Dotted name -> what the field means, for the whole schema, in its order."""
    found: dict[str, str] = {}
    for attribute, field in model.model_fields.items():
        name = prefix + (field.alias or attribute)
        found[name] = field.description or ""
        if section := _section(field.annotation):
            found |= descriptions(section, f"{name}.")
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next((found for arm in typing.get_args(annotation) if (found := _section(arm))), None)
    return None


_STAND_INS: Mapping[str, Any] = {  # for required keys, so that the other rules can still be checked
    "output_dir": "run",
    "policy": {"path": "policy"},
    "policy.path": "policy",
    "reward": "shapes",
    "prompts": {"source": "prompts"},
    "prompts.source": "prompts",
    "updates": 10**9,
    "prompts_per_update": 1,
    "group_size": 2,
}


def _repaired(data: Data, broken: set[str]) -> Config | None:
    """The config without its broken values, so that cross-field rules about the rest are checked as well."""
    data = _copy(data)
    for name in sorted({re.sub(r"\.\d+$", "", b) for b in broken}, reverse=True):  # a bad item spoils its list
        *parents, leaf = name.split(".")
        section: Any = data
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(leaf, None)
            if name in _STAND_INS:
                section[leaf] = _STAND_INS[name]
    try:
        return Config.model_validate(data)
    except ValidationError:
        return None  # the errors already found are reported alone
