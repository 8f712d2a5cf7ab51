"""What was trained and how to look at it: run.yaml, flags and detection in one checked object. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, TypeAdapter, ValidationError

from autointerp.errors import InputError
from autointerp.evidence.sae_spec import hook_in_config, split_spec

if TYPE_CHECKING:
    from autointerp.evidence.series import Checkpoint

T = TypeVar("T")

RUN_FILE = "run.yaml"
KEYS = ("base", "adapter", "since", "sae", "hook", "corpus", "text_column", "context_length", "max_tokens")
"""The keys of run.yaml; each is also a flag."""
PATHS = ("base", "adapter", "since", "sae", "corpus")
_SINGLE = ("base", "since", "sae", "corpus")
"""Those of PATHS that are one; adapters can be several."""

WEIGHTS_ONLY = ("weights",)
"""Selectors that need neither corpus nor model when nothing but the selection is wanted."""
DEFAULT_TOP = 50
DEFAULT_CHECKPOINTS = 20
AUTO_TOP = 200
"""Latents that `--top auto` selects at most."""

_ADAPTER_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
_HUB_IDS = {
    "base": re.compile(r"^[\w-][\w.-]*(/[\w.-]+)?$"),
    "adapter": _ADAPTER_ID,
    "since": _ADAPTER_ID,
    "sae": re.compile(r"^[\w-][\w.-]*/[^\s]+$"),  # release/sae_id; a sae_id has slashes of its own
    "corpus": re.compile(r"^[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?(?<!\.jsonl)(?<!\.parquet)(?<!\.txt)$"),
}
_WEIGHT_FILES = (".json", ".safetensors", ".bin", ".pt", ".npz", ".model", ".yaml")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to select and collect; none of it says what was trained."""

    top: PositiveInt | Literal["auto"] = DEFAULT_TOP
    """Latents to select; `auto`: until the coverage curve flattens, AUTO_TOP at most."""
    selector: Annotated[
        tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v), Field(min_length=1)
    ] = ("change",)
    """Selectors by name; the first one ranks."""
    fdr: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """False discovery rate of the tests."""
    sae_adapted: str | None = None
    """A copy of the SAE fine-tuned on the adapted model, a path or release/sae_id, for the selector `rotation`."""
    outcome_column: str | None = None
    """A column of the corpus with a number for each document, for the selector `outcome`."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    checkpoints: Annotated[int, Field(ge=0)] = DEFAULT_CHECKPOINTS
    """Checkpoints of one training, at most, over which the selected latents are followed; see `Run.checkpoints`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    """A torch device; `auto` takes a GPU where there is one."""
    tokens_per_batch: PositiveInt | None = None
    """Positions per forward pass, padding included; what suits the device when None."""
    scratch: Path | None = None
    """Where large temporary files go; the system's temporary directory when None."""


@dataclass(frozen=True, slots=True)
class _View:
    """The keys of run.yaml that are no paths."""

    hook: str | None = None
    text_column: str = "text"
    context_length: Annotated[int, Field(ge=8)] = 128
    max_tokens: PositiveInt = 1_000_000


SETTINGS = tuple(setting.name for setting in dataclasses.fields(Settings))


@dataclass(frozen=True, slots=True)
class Run:
    """One adapter, looked at through one dictionary on one corpus. `Run.load` makes a checked one.

    Local paths are absolute; hub ids stand as they were given. `base` and `corpus` are None only where `load` was told
    that they are not needed.
    """

    path: Path
    """The run directory."""
    base: str | None
    adapter: str
    """Of several that are active together, what `adapters.together` makes of them, or the folder that holds them."""
    adapter_format: str
    adapter_sha256: str
    sae: str
    """A local folder or file, or a SAELens release/sae_id; `#key=value` behind a path says what its files do not."""
    hook: str | None = None
    """Hook point; None until the dictionary, which names it, is loaded from the hub."""
    corpus: str | None = None
    text_column: str = "text"
    context_length: int = 128
    max_tokens: int = 1_000_000
    since: str | None = None
    """Another adapter of the same base, which the base side carries: the change is what was trained since it."""
    since_sha256: str | None = None
    settings: Settings = Settings()
    checkpoints: tuple[Checkpoint, ...] = ()
    """Where the adapter is the end of a training that left checkpoints beneath its folder: those, in order, evenly
    spaced, the adapter among them. They are no part of what is selected, nor of `run_id`."""
    fingerprints: dict[str, str] = field(default_factory=dict, hash=False)
    """What base, sae and corpus held when the run was loaded; see `fingerprint`."""

    @classmethod
    def load(cls, path: str | Path, *, need: Collection[str] = ("base", "corpus"), **flags: Any) -> Run:
        """The run at `path`: a directory that a trainer wrote, one with a run.yaml, or that file itself.

        `flags` are keys of run.yaml or settings; None counts as not given, any other value wins over run.yaml. Paths
        among them are relative to the working directory, those in run.yaml to it. `need`: which of base and corpus the
        caller cannot go on without (weights-only selectors need neither). All that can be seen without loading a model
        is checked here, cheap things first; InputError, in one line, names what is wrong and the mend.
        """
        folder = _folder(Path(path))
        given = {key: value for key, value in flags.items() if value is not None}
        if "sae_adapted" in given:
            given["sae_adapted"] = _locate("sae", given["sae_adapted"], Path.cwd(), "sae-adapted")
        written = _read(folder / RUN_FILE)
        adapters = _adapters(given, Path.cwd()) or _adapters(written, folder)
        located = _located(written, folder) | _located(given, Path.cwd())
        view, settings = _checked(written | given)
        if "sae" not in located:
            raise InputError(f"no SAE for {path}: give --sae a folder or release/sae_id, or sae: in {RUN_FILE}")
        if "corpus" in need and "corpus" not in located:
            raise InputError(f"no corpus for {path}: give --corpus a path or a hub id, or corpus: in {RUN_FILE}")
        prints = {key: fingerprint(located[key], key) for key in ("sae", "corpus") if key in located}
        if settings.sae_adapted is not None:
            prints["sae_adapted"] = fingerprint(settings.sae_adapted, "sae")
        from autointerp.evidence.adapters import together
        from autointerp.evidence.series import resolve

        adapter, checkpoints = resolve(together(adapters or [str(folder)]), settings.checkpoints)
        name, sha256, base = _detected(adapter, located.get("base"), "base" in need)
        since = located.get("since")
        return cls(
            path=folder,
            base=base,
            adapter=adapter,
            adapter_format=name,
            adapter_sha256=sha256,
            sae=located["sae"],
            hook=view.hook or hook_of(located["sae"]),
            corpus=located.get("corpus"),
            text_column=view.text_column,
            context_length=view.context_length,
            max_tokens=view.max_tokens,
            since=since,
            since_sha256=since and _begins_with(since, adapter, None if "base" in located else base),
            settings=settings,
            checkpoints=checkpoints,
            fingerprints=prints | ({"base": fingerprint(base, "base")} if base else {}),
        )

    def with_hook(self, hook: str | None) -> Run:
        """This run at `hook`, unless it has one: for dictionaries that say where they belong only once loaded."""
        if self.hook is None and hook is None:
            raise InputError(
                f"no hook: the config of SAE {self.sae} names none; give --hook, e.g. blocks.6.hook_resid_post"
            )
        return self if self.hook is not None else dataclasses.replace(self, hook=hook)

    @property
    def run_id(self) -> str:
        """12 hex digits of all that determines the evidence, so that the same command finds its run again.

        Files count by name, size and samples of their content (the adapter by all of it), not by path or time: a copy
        of a run is the same run, a SAE trained anew in place is another.
        """
        settings = {key: getattr(self.settings, key) for key in ("top", "selector", "fdr", "seed", "dtype")}
        extra = {
            "sae_adapted": self.fingerprints.get("sae_adapted"),
            "outcome_column": self.settings.outcome_column,
            "since": self.since_sha256,
        }
        parts = {
            "base": self.fingerprints.get("base", self.base),
            "sae": self.fingerprints.get("sae", self.sae),
            "corpus": self.fingerprints.get("corpus", self.corpus),
            "adapter": self.adapter_sha256,
            **{key: getattr(self, key) for key in ("hook", "text_column", "context_length", "max_tokens")},
            **settings,
            **{key: value for key, value in extra.items() if value is not None},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(path: str, key: str) -> str:
    """What identifies the files at `path` cheaply: names, sizes, and the first, middle and last 64 KiB of each.

    Every byte of a small file counts; a large one written anew differs in its samples too. For a hub id, the id.
    """
    from autointerp.evidence.weight_files import samples

    root, said = split_spec(path) if key == "sae" else (Path(path), {})
    if not root.exists():
        return path
    digest = hashlib.sha256(json.dumps(said).encode() if said else b"")
    for file in _files(root, key):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root) if root.is_dir() else file.name}\0{size}\0".encode())
        for sample in samples(file):
            digest.update(sample)
    return digest.hexdigest()


def hook_of(sae: str) -> str | None:
    """The hook point that a local SAE's files name: its `cfg.json`, under SAELens' present and former keys, or whatever
    its format has instead (only then is torch loaded). None where they name none; loading it will tell more."""
    named = hook_in_config(Path(sae) / "cfg.json")
    if named is None and split_spec(sae)[0].exists():
        from autointerp.evidence import dictionaries

        return dictionaries.hook_of(sae)
    return named


def _files(root: Path, key: str) -> Iterable[Path]:
    if key == "corpus":
        from autointerp.evidence.documents import corpus_files

        return corpus_files(root)
    if root.is_file():
        return [root]
    return sorted(file for file in root.iterdir() if file.suffix in _WEIGHT_FILES and file.name != RUN_FILE)


def _folder(path: Path) -> Path:
    path = path.expanduser()
    if path.name == RUN_FILE and path.is_file():
        path = path.parent
    if not path.exists():
        raise InputError(
            f"run {path}: no such directory; give --run one that a trainer wrote, or one with a {RUN_FILE}"
        )
    if not path.is_dir():
        raise InputError(f"run {path}: is a file; give --run a directory, or a {RUN_FILE}")
    return path.resolve()


def _read(file: Path) -> dict[str, Any]:
    """The keys of a run.yaml that have a value; none when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable YAML ({error}); mend it") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{file}: a {type(content).__name__}, want lines of key: value with the keys {', '.join(KEYS)}"
        )
    for key in content:
        if key not in KEYS:
            raise InputError(f"{file}: unknown key {key!r}; the keys are {', '.join(KEYS)}")
    return {key: value for key, value in content.items() if value is not None}


def _located(values: dict[str, Any], root: Path) -> dict[str, str]:
    return {key: _locate(key, values[key], root) for key in _SINGLE if key in values}


def _adapters(values: dict[str, Any], root: Path) -> list[str]:
    """The one adapter that is given, or those that are to be active together; empty where none is."""
    given = values.get("adapter")
    return [_locate("adapter", each, root) for each in (given if isinstance(given, list | tuple) else [given]) if each]


def _locate(key: str, value: Any, root: Path, option: str | None = None) -> str:
    """`value` as an absolute path if it exists under `root`, as it is if it may be a hub id.

    `option`: what error messages call it, `key` where that is None.
    """
    option = option or key
    if not isinstance(value, str | Path):
        raise InputError(f"{option} {value!r}: want a path or a hub id")
    said = ""
    path = root / Path(value).expanduser()
    if key == "sae" and "#" in str(value) and not path.exists():
        path, said = root / split_spec(value)[0], "#" + str(value).rpartition("#")[2]
    if path.exists():
        return f"{path.resolve()}{said}"
    if _HUB_IDS[key].match(str(value)):
        return str(value)
    other = "a SAELens release/sae_id" if key == "sae" else "a hub id"
    raise InputError(f"{option} {value}: no such file or folder ({path}); give --{option} an existing path, or {other}")


def _checked(values: dict[str, Any]) -> tuple[_View, Settings]:
    """All that is no path, types and ranges checked."""
    known = (*KEYS, *SETTINGS)
    for key in values:
        if key not in known:
            raise InputError(f"unknown option {key!r}: choose from {', '.join(known)}")
    view = {key: value for key, value in values.items() if key not in PATHS and key not in SETTINGS}
    return _validated(_View, view), _validated(Settings, {key: values[key] for key in SETTINGS if key in values})


def _validated(kind: type[T], values: dict[str, Any]) -> T:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InputError(
            f"{name} {first['input']!r}: {first['msg']}; give another --{name.replace('_', '-')}"
        ) from error


def _detected(adapter: str, base: str | None, base_needed: bool) -> tuple[str, str, str | None]:
    """Format, hash and base of the adapter, by its files."""
    from autointerp.evidence import adapters

    found = adapters.detect(adapter)
    base = base or found.base_of(adapter)
    if base is None and base_needed:
        raise InputError(f"no base model: adapter {adapter} names none; give --base, or base: in {RUN_FILE}")
    return found.name, found.sha256(adapter), base


def _begins_with(since: str, adapter: str, base: str | None) -> str:
    """The hash of the adapter `since`. base: what `adapter` names, None where that does not matter; InputError where
    the two name different ones."""
    _, sha256, theirs = _detected(since, None, False)
    if None not in (theirs, base) and theirs != base:
        raise InputError(
            f"since {since} names base {theirs}, adapter {adapter} names {base}: if those are one model, give it with"
            " --base; else give --since another adapter of this base"
        )
    return sha256
