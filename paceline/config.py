"""The engine's settings: one frozen dataclass, checked when made, completed for a machine by `resolve`."""

from __future__ import annotations

import dataclasses
import difflib
import os
import shutil
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from paceline.errors import ConfigError, DeviceError

MAX_DRAFT = 256  # tokens that a step may draft for a request; kernels, graphs and page tables are sized for it
# Drafters by name, as module:class. A class is made as `Class(config, model)`; see drafters/base.py.
DRAFTERS = {
    "copy": "paceline.drafters.copy:CopyDrafter",
    "none": "paceline.drafters.base:NoDrafter",
    "eagle3": "paceline.drafters.eagle3:Eagle3Drafter",
    "dflash": "paceline.drafters.dflash:DFlashDrafter",
    "joint": "paceline.drafters.joint:JointDrafter",
}
TRAINED = ("eagle3", "dflash", "joint")  # those that read a trained drafter, `draft_model`


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs. `None` means: chosen by `resolve` for the machine."""

    device: str = _setting("auto", "cpu, cuda, or auto: CUDA where there is a GPU")
    dtype: str = _setting("auto", "float32, bfloat16, float16, or auto: bfloat16 where it is fast, else float32")
    threads: int | None = _setting(None, "CPU threads (default: one a core)")
    max_context: int | None = _setting(
        None, "longest prompt and output together, in tokens (default: the model's, at most 32768)"
    )
    max_batch: int = _setting(64, "requests decoded together")
    page_size: int = _setting(16, "tokens a KV page holds")
    cache_tokens: int | None = _setting(None, "tokens the KV cache holds (default: by free memory)")
    prefill_chunk: int | None = _setting(None, "prompt tokens computed in one pass (default: 8192 on CUDA, 512 on CPU)")
    max_stall_ms: int | None = _setting(
        None, "longest pause of running requests for a chunk of others' prompts (default: 100 on CUDA, 3000 on CPU)"
    )
    prefix_cache: bool = _setting(True, "keep prompts' pages for later requests")
    drafter: str = _setting(
        "auto",
        "none, copy, eagle3, dflash, joint (copy and a trained one), or auto: joint where there is a trained one, else copy",
    )
    draft_model: str | None = _setting(
        None, "path of a trained drafter (default: the one that comes with Paceline, if any)"
    )
    force_drafter: bool = _setting(False, "use a drafter that was trained for other weights")
    max_draft: int | None = _setting(None, f"longest draft in tokens (default: {MAX_DRAFT})")
    fixed_draft: int | None = _setting(None, "draft exactly this many tokens instead of choosing by cost (benchmarks)")
    deterministic: bool = _setting(False, "batch-invariant operations: drafted output equals plain output bit by bit")
    cuda_graphs: bool = _setting(True, "replay captured graphs on CUDA")

    def __post_init__(self) -> None:
        choices = (
            ("device", ("auto", "cpu", "cuda")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("drafter", ("auto", *DRAFTERS)),
        )
        for name, allowed in choices:
            value = getattr(self, name)
            if value not in allowed and not (name == "device" and str(value).startswith("cuda:")):
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        for name in (
            "threads",
            "max_context",
            "max_batch",
            "page_size",
            "cache_tokens",
            "prefill_chunk",
            "max_draft",
            "max_stall_ms",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")
        for name, limit in (("max_draft", MAX_DRAFT), ("fixed_draft", MAX_DRAFT)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= limit:
                raise ConfigError(f"{name} must be between 0 and {limit}, not {value}")
        if self.fixed_draft is not None and self.max_draft is not None and self.fixed_draft > self.max_draft:
            raise ConfigError(f"fixed_draft {self.fixed_draft} is more than max_draft {self.max_draft}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Raises ConfigError for a key that is no setting (naming the nearest) or a value of the wrong type."""
        hints = get_type_hints(cls)
        for key, value in values.items():
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1)
                raise ConfigError(f"there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            allowed = get_args(hints[key]) or (hints[key],)
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise ConfigError(f"{key} cannot be {value!r}")
        return cls(**values)


@dataclass(frozen=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig with every choice made, as `resolve` gives it. `cache_tokens` may be None: by free memory."""

    threads: int = field(kw_only=True)
    max_context: int = field(kw_only=True)
    prefill_chunk: int = field(kw_only=True)
    max_stall_ms: int = field(kw_only=True)
    max_draft: int = field(kw_only=True)


@dataclass(frozen=True)
class Hardware:
    """What `resolve` needs to know of the machine. `free_bytes` is of the device's memory.

    `bfloat16`: its products are fast, by the device itself, by oneDNN or by the native kernels.
    """

    cuda: bool
    cores: int
    free_bytes: int
    bfloat16: bool = True

    @classmethod
    def detect(cls) -> Hardware:
        import torch  # here, since a command that needs no model reads the settings too

        if torch.cuda.is_available():
            return cls(True, _cores(), torch.cuda.mem_get_info()[0])
        pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return cls(False, _cores(), pages * size, _bfloat16_on_cpu())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _bfloat16_on_cpu() -> bool:
    import torch

    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and shutil.which("cc") is not None


def resolve(config: EngineConfig, hardware: Hardware, model_context: int) -> ResolvedConfig:
    """`config` with every choice made for a machine and a model of at most `model_context` positions.

    Raises DeviceError where CUDA is asked for and absent, ConfigError for a `max_context` that the model does not have.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if hardware.cuda else "cpu"
    if device != "cpu" and not hardware.cuda:
        raise DeviceError("device 'cuda' was requested, but no CUDA GPU is usable here; use device 'cpu' or 'auto'")
    on_gpu = device != "cpu"
    context = config.max_context or min(model_context, 32768)
    if context > model_context:
        raise ConfigError(f"max_context {context} is more than the model's {model_context}")
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(EngineConfig)}
    on_gpu_or_fast = on_gpu or hardware.bfloat16
    values |= {
        "device": device,
        "dtype": ("bfloat16" if on_gpu_or_fast else "float32") if config.dtype == "auto" else config.dtype,
        "threads": config.threads or hardware.cores,
        "max_context": context,
        "prefill_chunk": config.prefill_chunk or (8192 if on_gpu else 512),
        "max_stall_ms": config.max_stall_ms or (100 if on_gpu else 3000),
        "max_draft": MAX_DRAFT if config.max_draft is None else config.max_draft,
    }
    return ResolvedConfig(**values)
