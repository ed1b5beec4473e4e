"""The components of a pipeline in a diffusers folder: which classes may be loaded, and loading one strictly.

diffusers and transformers initialize weights at random where a file lacks them, fall back to pickle, and can
run code from a folder. Here each of these is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from halftone.errors import UserError
from halftone.files import read_json

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
SAFETY = ("safety_checker", "feature_extractor")
_LARGEST_JSON = 1 << 20
_LARGEST_SIZE = 1 << 24
_MOST_LAYERS = 1 << 10
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_REMOTE_CODE = ("auto_map", "quantization_config")
_PLACE_ONLY = ("_name_or_path", "_commit_hash")


@dataclass(frozen=True)
class Entry:
    """One line of model_index.json: the component's library and class, both checked."""

    name: str
    kind: type


@dataclass(frozen=True)
class Index:
    """model_index.json: the pipeline's class and its components that are not null."""

    pipeline_class: type
    entries: dict[str, Entry]

    @property
    def denoiser(self) -> Entry:
        """Raises UserError where the pipeline has no denoiser, or more than one."""
        found = [self.entries[name] for name in DENOISERS if name in self.entries]
        if len(found) != 1:
            raise UserError(f"{self.pipeline_class.__name__}: has {len(found)} denoisers; it needs one")
        return found[0]


def read_index(folder: Path) -> Index:
    """Raises UserError unless every class named is one of diffusers' or transformers' own."""
    import diffusers

    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder}: no {INDEX}; give a folder in diffusers layout")
    index = small_json(path)
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UserError(f"{path}: _class_name {name!r} is no pipeline of diffusers {diffusers.__version__}")
    entries = {}
    for key, value in index.items():
        if key.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        entries[key] = Entry(key, _component_class(path, key, value, skip=key in SAFETY))
    return Index(found, entries)


def _component_class(path: Path, key: str, value: list[Any], *, skip: bool) -> type:
    import diffusers
    import transformers
    from diffusers import pipelines

    if not key.isidentifier() or len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise UserError(f"{path}: component {key!r} must be written as [library, class]")
    library, name = value
    if library in ("diffusers", "transformers"):
        home: Any = diffusers if library == "diffusers" else transformers
    else:
        home = getattr(pipelines, library, None) if library.isidentifier() else None
    found = getattr(home, name, None) if home is not None and name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, _allowed_bases()):
        return found
    if skip:  # old folders name classes that are gone; these components are not loaded
        return object
    raise UserError(f"{path}: component {key!r} is {library}.{name}, no class of diffusers or transformers")


def _allowed_bases() -> tuple[type, ...]:
    from diffusers import ModelMixin, SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin

    tools = (PreTrainedTokenizerBase, FeatureExtractionMixin, ImageProcessingMixin)
    return (ModelMixin, SchedulerMixin, PreTrainedModel, *tools)


def small_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 1 MiB. Raises UserError."""
    if path.stat().st_size > _LARGEST_JSON:
        raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a configuration")
    try:
        value = read_json(path)
    except (RecursionError, ValueError):  # nested thousands deep, or a number of thousands of digits
        raise UserError(f"{path}: not a sensible JSON configuration") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """config.json of a component; refuses one that asks for code or another quantization."""
    path = folder / name / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: component {name!r} has no config.json; the folder is incomplete")
    config = small_json(path)
    _check_sizes(path, config)
    for key in _REMOTE_CODE:
        if key in config:
            raise UserError(f"{path}: has {key!r}; it must be unquantized and without code")
    return config


def without_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what says where it was read from."""
    return {key: value for key, value in dict(config).items() if key not in _PLACE_ONLY}


def _check_sizes(path: Path, value: Any, key: str = "") -> None:
    """Refuse sizes that no model has, before a library builds one of that size."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_sizes(path, inner, str(name))
    elif isinstance(value, list):
        if len(value) > _MOST_LAYERS:
            raise UserError(f"{path}: {key[:100]} has {len(value)} entries; no model has that many")
        for inner in value:
            _check_sizes(path, inner, key)
    elif isinstance(value, int) and abs(value) > (_MOST_LAYERS if "layers" in key else _LARGEST_SIZE):
        raise UserError(f"{path}: {key[:100]} is {str(value)[:30]}; no model is that large")


def weight_files(folder: Path, name: str) -> tuple[list[Path], str | None]:
    """The safetensors files of a component, and their variant (`fp16`) where no plain ones exist.

    Raises UserError for pickled weights, none at all, several variants, or a truncated file.
    """
    home = folder / name
    if not home.is_dir():
        raise UserError(f"{folder}: component {name!r} is missing; the folder is incomplete")
    by_variant: dict[str | None, list[Path]] = {}
    for path in sorted(home.glob("*.safetensors")):
        parts = path.name.split(".")
        by_variant.setdefault(parts[1].split("-")[0] if len(parts) > 2 else None, []).append(path)
    if not by_variant:
        pickled = sorted(p.name for p in home.iterdir() if p.suffix in _PICKLES)
        if pickled:
            raise UserError(
                f"{home}: only pickled weights ({pickled[0]}), which can run code when read; "
                "convert them to safetensors (save_pretrained of a current diffusers does)"
            )
        raise UserError(f"{home}: no .safetensors weights; the folder is incomplete")
    by_variant.pop("non_ema", None) if len(by_variant) > 1 else None
    variant = None if None in by_variant else next(iter(by_variant))
    if variant is not None and len(by_variant) > 1:
        raise UserError(f"{home}: weights in variants {', '.join(map(str, by_variant))}; keep one of them")
    for path in by_variant[variant]:
        check_safetensors(path)
    return by_variant[variant], variant


def check_safetensors(path: Path) -> None:
    """Raises UserError for a file whose header is not sound or does not match its length."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as fault:
        raise UserError(
            f"{path}: truncated or not a safetensors file ({first_line(fault)}); get it again"
        ) from None


def load_component(folder: Path, entry: Entry, dtype: torch.dtype = torch.float32) -> Any:
    """Load one component.

    Raises UserError for missing, left-over or misshapen weights, and for NaN or infinity in them.
    """
    from diffusers import ModelMixin

    home = folder / entry.name
    if not home.is_dir():
        raise UserError(f"{folder}: component {entry.name!r} is missing; the folder is incomplete")
    loader: Any = entry.kind
    if not issubclass(entry.kind, nn.Module):
        with explain_load(home, entry.kind):
            return loader.from_pretrained(home, local_files_only=True)
    config_of(folder, entry.name)
    _, variant = weight_files(folder, entry.name)
    options = {"variant": variant} if variant else {}
    with explain_load(home, entry.kind):
        module, report = loader.from_pretrained(
            home,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=dtype,
            **options,
        )
    kinds = ["missing", "mismatched"] + (["unexpected"] if issubclass(entry.kind, ModelMixin) else [])
    for kind in kinds:
        if keys := sorted(map(str, report.get(f"{kind}_keys") or ())):
            raise UserError(
                f"{home}: {len(keys)} {kind} weights, the first is {keys[0]}: not a whole {_name(entry.kind)}"
            )
    check_finite(module, str(home))
    module.eval()
    return module


def empty_component(folder: Path, entry: Entry, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A component with weights from its configuration alone, on the meta device and in evaluation mode.

    Only buffers that no file holds are real; weights that are one tensor are one here. Raises UserError.
    """
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    config: Any = config_of(folder, entry.name)
    kind: Any = entry.kind
    with explain_load(folder / entry.name, entry.kind):
        if not issubclass(kind, PreTrainedModel):
            with init_empty_weights(include_buffers=False):
                module = kind.from_config(config)
        else:
            config = kind.config_class.from_pretrained(folder / entry.name, local_files_only=True)
            config.dtype = dtype
            with init_empty_weights(include_buffers=False):
                module = kind(config)
            module.tie_weights()  # which building it out of meta tensors undid
    module.eval()
    return module


def check_finite(module: nn.Module, where: str) -> None:
    """Raises UserError naming the first weight that holds NaN or infinity."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{where}: {name} holds NaN or infinity; the weights are damaged, get them again")


def assemble(folder: Path, components: Mapping[str, Any]) -> Any:
    """The pipeline of a folder from components already loaded; those not given are left out."""
    from diffusers import DiffusionPipeline

    index = read_index(folder)
    absent = {name: None for name in index.entries if name not in components}
    with explain_load(folder, index.pipeline_class):
        pipeline = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, **{**absent, **components}
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def explain_load(where: Path | str, kind: type) -> Iterator[None]:
    """Turn whatever a library raises on a bad folder into one line, and keep its chatter out of the log."""
    try:
        with quiet():
            yield
    except (UserError, MemoryError):
        raise
    except Exception as fault:
        # a weight that no file holds stays on the meta device
        cause = "it lacks weights" if "meta tensor" in str(fault) else first_line(fault)
        raise UserError(f"{where}: cannot be loaded as {_name(kind)} ({cause})") from fault


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only errors from diffusers and transformers, and no progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: list[Any] = [diffusers_logging, transformers_logging]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def _name(kind: type) -> str:
    return kind.__name__


def first_line(fault: BaseException) -> str:
    """What a library says about a failure, cut to one line of at most 200 letters."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return (lines[0] if lines else type(fault).__name__)[:200]
