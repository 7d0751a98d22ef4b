"""A trained drafter on disk: one file of Paceline's own, or a folder in the style of SGLang (SpecForge) or vLLM (speculators).

The servers count a row's position by the state that it reads, which is one less than by its token, as Eagle3Network counts.
Rotary attention sees distances only, so the same weights serve both. Row 0, the first token without a state, has no
counterpart there, and no other row attends to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paceline.drafters.checkpoint_styles import from_json, from_values, to_json, to_values
from paceline.drafters.config import DraftConfig
from paceline.drafters.float8 import MARKOV, all_rows, drafted_rows, expanded, float8_rows
from paceline.errors import BadDrafter
from paceline.models.config import ModelConfig
from paceline.models.tokenizer import Tokenizer

STYLES = ("paceline", "sglang", "vllm")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMED = 6  # tensors that a message lists
_KEPT = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class DraftCheckpoint:
    """A drafter as read: its config, and its tensors under speculators' names.

    tensors       with lm_head.weight and embed_tokens.weight only where it has its own; else they are the target's
    draft_tokens  [draft vocabulary] int64, the target's token of each draft token; None where they are the same
    card          what the trainer wrote about it
    """

    config: DraftConfig
    tensors: dict[str, Tensor]
    draft_tokens: Tensor | None = None
    card: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path, num_target_layers: int | None = None) -> DraftCheckpoint:
    """Reads a .safetensors file that `write_checkpoint` wrote, or a folder with config.json and safetensors.

    `num_target_layers` serves a config that leaves the target's layers to the servers' default.
    Raises BadDrafter, which names what is wrong.
    """
    if path.is_dir():
        config = from_json(_json_file(path / "config.json"), num_target_layers)
        stored, _ = _load(_weight_files(path))
        card = _json_file(path / "card.json") if (path / "card.json").exists() else {}
        stored = _renamed(stored)
    elif path.is_file():
        stored, metadata = _load([path])
        if "config" not in metadata:
            raise BadDrafter(f"{path} holds no drafter's config; for a drafter in a folder, give the folder")
        config = from_values(_json_text(metadata["config"], path))
        card = _json_text(metadata.get("card", "{}"), path)
        stored = expanded(stored)
    else:
        raise BadDrafter(f"there is no drafter at {path}")
    offsets, members = stored.pop("d2t", None), stored.pop("t2d", None)
    draft_tokens = _draft_tokens(config, offsets, members)
    tensors = dict(sorted(all_rows(config, stored, draft_tokens).items()))
    check_tensors(config, tensors)
    return DraftCheckpoint(config, tensors, draft_tokens, card)


def write_checkpoint(
    path: Path,
    config: DraftConfig,
    tensors: Mapping[str, Tensor],
    draft_tokens: Tensor | None,
    *,
    style: str = "paceline",
    card: Mapping[str, Any] | None = None,
    head: Tensor | None = None,
    float8: bool = False,
) -> None:
    """Writes a drafter: the file `path` in the style "paceline", else the folder `path` in the style "sglang" or "vllm".

    The servers need a head of the drafter's own: where `tensors` have no lm_head.weight, `head` [V, H], the target's, gives
    its rows. With `float8` (style "paceline") matrices are stored as E4M3 with a float32 scale a row, and a Markov head is
    stored for tokens of the draft vocabulary alone: after others it adds nothing, to the confidence head neither.
    Raises BadDrafter for tensors that do not belong to `config`, and for what the style cannot say.
    """
    if style not in STYLES:
        raise BadDrafter(f"the style {style!r} is not known; known: {', '.join(STYLES)}")
    check_tensors(config, tensors)
    kept = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    offsets = _offsets(config, draft_tokens)
    if style == "paceline":
        stored = float8_rows(drafted_rows(kept, draft_tokens)) if float8 else kept
        metadata = {"format": "pt", "config": json.dumps(to_values(config)), "card": json.dumps(dict(card or {}))}
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, stored if offsets is None else {**stored, "d2t": offsets}, metadata)
        return
    if float8:
        raise BadDrafter(f"float8 is of Paceline's own files, not of the style {style!r}")
    values = to_json(config, style, card or {}, str(kept["fc.weight"].dtype).removeprefix("torch."))
    if "lm_head.weight" not in kept and (config.kind == "eagle3" or offsets is not None):
        kept["lm_head.weight"] = _head_rows(config, draft_tokens, head).to(kept["fc.weight"].dtype)
    if config.kind == "eagle3" or offsets is not None:
        kept |= _vocabulary_maps(config, draft_tokens)
    if style == "sglang" and config.kind == "eagle3":
        kept = {name.replace("layers.0.", "midlayer.", 1): each for name, each in kept.items()}
    path.mkdir(parents=True, exist_ok=True)
    _save(path / _WEIGHTS, kept, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if card:
        (path / "card.json").write_text(json.dumps(dict(card), indent=2) + "\n", encoding="utf-8")


def check_target(
    checkpoint: DraftCheckpoint, target: ModelConfig, identity: str = "", force: bool = False, vocabulary: str = ""
) -> None:
    """Raises BadDrafter unless the drafter fits `target`.

    `identity` is the target's `Checkpoint.identity` and `vocabulary` its `vocabulary_digest`, "" where they are not known.
    `force` accepts other weights of the same shapes and vocabulary.
    """
    config = checkpoint.config
    beyond = [each for each in config.features if each > target.num_layers]
    own_embedding, own_head = "embed_tokens.weight" in checkpoint.tensors, "lm_head.weight" in checkpoint.tensors
    borrows = not (own_embedding and own_head)
    width, size = config.layer.hidden_size, config.layer.vocab_size
    checks = (
        (not beyond, f"it reads the layers {beyond} of a target that has {target.num_layers}"),
        (
            config.target_hidden_size == target.hidden_size,
            f"it reads states of {config.target_hidden_size} values, and the target's have {target.hidden_size}",
        ),
        (
            not borrows or width == target.hidden_size,
            f"it borrows the target's embeddings or head, and its hidden size is {width}, not {target.hidden_size}",
        ),
        (size == target.vocab_size, f"its vocabulary has {size} tokens, and the target's {target.vocab_size}"),
        (
            not vocabulary or config.vocabulary_digest in ("", vocabulary),
            "its tokens are those of another tokenizer (the digests of the vocabularies differ)",
        ),
    )
    for holds, message in checks:
        if not holds:
            raise BadDrafter(f"this drafter does not fit the target: {message}")
    if identity and config.target_digest not in ("", identity) and not force:
        raise BadDrafter(
            "this drafter was trained for other weights than the target's (their digests differ): it drafts worse for these; "
            "--force (in the config: force_drafter) uses it all the same"
        )


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """A digest of the bytes of every token. Unused ids do not count: file formats name them differently."""
    digest = hashlib.sha256()
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token)
        if text and text != b"[PAD%d]" % token:
            digest.update(b"%d %d " % (token, len(text)) + text)
    return digest.hexdigest()


def tensor_shapes(config: DraftConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of the tensors that a drafter must have, and of those that it may have."""
    layer = config.layer
    hidden, vocab, states = layer.hidden_size, layer.vocab_size, config.target_hidden_size
    queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    count = len(config.features)
    inputs = hidden * 2 if config.kind == "eagle3" else hidden
    needed: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, count * states), "norm.weight": (hidden,)}
    for index in range(layer.num_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, inputs),
            "self_attn.k_proj": (keys, inputs),
            "self_attn.v_proj": (keys, inputs),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (layer.intermediate_size, hidden),
            "mlp.up_proj": (layer.intermediate_size, hidden),
            "mlp.down_proj": (hidden, layer.intermediate_size),
        }
        if layer.qk_norm:
            of_layer |= {"self_attn.q_norm": (layer.head_dim,), "self_attn.k_norm": (layer.head_dim,)}
        needed |= {f"layers.{index}.{name}.weight": shape for name, shape in of_layer.items()}
    needed["layers.0.hidden_norm.weight" if config.kind == "eagle3" else "hidden_norm.weight"] = (hidden,)
    if config.norm_before_fc:
        needed["input_norm.weight"] = (count * states,)
    if config.fc_norm:
        needed |= {f"fc_norm.{index}.weight": (states,) for index in range(count)}
    if config.markov_rank:
        needed[MARKOV] = (vocab, config.markov_rank)
        needed["markov_head.markov_w2.weight"] = (config.draft_vocab_size, config.markov_rank)
    if config.confidence_head:
        needed |= {"confidence_head.proj.weight": (1, hidden + config.markov_rank), "confidence_head.proj.bias": (1,)}
    optional: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "embed_tokens.weight": (vocab, hidden),
    }
    if config.kind == "eagle3":
        optional["fc.bias"] = (hidden,)
    return needed, optional


def check_tensors(config: DraftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises BadDrafter unless these are the tensors of `config`, in their shapes."""
    needed, optional = tensor_shapes(config)
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise BadDrafter(f"the drafter lacks {_list(missing)}")
    extra = [name for name in tensors if name not in needed and name not in optional]
    if extra:
        raise BadDrafter(f"the drafter has tensors that its config has no use for: {_list(extra)}")
    for name, tensor in tensors.items():
        shape = {**optional, **needed}[name]
        if tuple(tensor.shape) != shape:
            raise BadDrafter(f"the drafter's {name} is {list(tensor.shape)}, and by its config should be {list(shape)}")
        if tensor.dtype not in _KEPT:
            raise BadDrafter(
                f"the drafter's {name} is of {str(tensor.dtype).removeprefix('torch.')}, which is not supported"
            )


def _draft_tokens(config: DraftConfig, offsets: Tensor | None, members: Tensor | None) -> Tensor | None:
    """From d2t (offsets: draft id i stands for token i + d2t[i]) and t2d (whether a token is among them)."""
    count, vocab = config.draft_vocab_size, config.layer.vocab_size
    if offsets is None:
        if count < vocab:
            raise BadDrafter(f"the drafter lacks d2t, which maps its {count} tokens to the target's {vocab}")
        return None
    if tuple(offsets.shape) != (count,):
        raise BadDrafter(f"the drafter's d2t is {list(offsets.shape)}, and by its config should be [{count}]")
    if offsets.is_floating_point():
        raise BadDrafter("the drafter's d2t does not hold whole numbers")
    tokens = torch.arange(count) + offsets.long()
    check_draft_tokens(config, tokens)
    if members is not None:
        listed = members.bool().nonzero().flatten() if members.shape == (vocab,) else None
        if listed is None or not torch.equal(listed, tokens):
            raise BadDrafter("the drafter's t2d does not list the tokens that its d2t does")
    return tokens if count < vocab else None


def check_draft_tokens(config: DraftConfig, tokens: Tensor) -> None:
    """Raises BadDrafter unless `tokens` are as many as the draft vocabulary, of the target's, and ascend."""
    vocab = config.layer.vocab_size
    if tuple(tokens.shape) != (config.draft_vocab_size,):
        raise BadDrafter(f"{len(tokens)} draft tokens for a draft vocabulary of {config.draft_vocab_size}")
    outside = tokens[(tokens < 0) | (tokens >= vocab)]
    if len(outside):
        raise BadDrafter(f"the drafter's d2t leads to token {int(outside[0])}, outside the vocabulary of {vocab}")
    falls = (tokens[1:] <= tokens[:-1]).nonzero()
    if len(falls):
        first = int(falls[0])
        raise BadDrafter(
            f"the drafter's d2t does not ascend: its tokens {first} and {first + 1} are the target's {int(tokens[first])} "
            f"and {int(tokens[first + 1])}"
        )


def _offsets(config: DraftConfig, draft_tokens: Tensor | None) -> Tensor | None:
    """d2t; None where the draft vocabulary is the whole one."""
    if draft_tokens is None:
        if config.draft_vocab_size < config.layer.vocab_size:
            raise BadDrafter(f"a draft vocabulary of {config.draft_vocab_size} tokens that are not said")
        return None
    check_draft_tokens(config, draft_tokens.cpu())
    return draft_tokens.cpu().long() - torch.arange(config.draft_vocab_size)


def _vocabulary_maps(config: DraftConfig, draft_tokens: Tensor | None) -> dict[str, Tensor]:
    tokens = torch.arange(config.layer.vocab_size) if draft_tokens is None else draft_tokens.cpu().long()
    members = torch.zeros(config.layer.vocab_size, dtype=torch.bool)
    members[tokens] = True
    return {"d2t": tokens - torch.arange(len(tokens)), "t2d": members}


def _head_rows(config: DraftConfig, draft_tokens: Tensor | None, head: Tensor | None) -> Tensor:
    shape = (config.layer.vocab_size, config.layer.hidden_size)
    if head is None:
        raise BadDrafter("this drafter has no lm_head.weight, and the servers need one: give the target's head")
    if tuple(head.shape) != shape:
        raise BadDrafter(f"the target's head is {list(head.shape)}, and for this drafter should be {list(shape)}")
    return (head if draft_tokens is None else head[draft_tokens.to(head.device)]).cpu().contiguous()


def _renamed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SpecForge's names as speculators', and older DSpark files' as today's."""
    old = {"midlayer.": "layers.0.", "logit_head.": "", "aux_norm_low.": "fc_norm.0."}
    old |= {"aux_norm_mid.": "fc_norm.1.", "aux_norm_high.": "fc_norm.2."}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        prefix = next((each for each in old if name.startswith(each)), "")
        tensors[old.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return tensors


def _weight_files(path: Path) -> list[Path]:
    if (path / _INDEX).exists():
        listed = _json_file(path / _INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise BadDrafter(f"{path / _INDEX} lists no weights")
        files = [path / name for name in sorted({str(each) for each in listed.values()})]
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadDrafter(f"{path} lacks {_list(missing)} of the drafter's weights")
    if not files:
        pickled = next(iter(sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])), None)
        reason = (
            f"; {pickled.name} is not read, since a pickle can run code: convert it to safetensors" if pickled else ""
        )
        raise BadDrafter(f"{path} holds no {_WEIGHTS}{reason}")
    return files


def _load(files: Iterable[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no iterator
        except (SafetensorError, OSError) as error:
            raise BadDrafter(f"{file} is cut short or damaged: {error}") from error
    return tensors, metadata


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Under a temporary name first, so that a kill leaves no half of a file."""
    partial = path.with_name(f"partial-{path.name}")
    save_file(dict(tensors), partial, metadata=metadata)
    partial.replace(path)


def _json_file(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise BadDrafter(f"{file.parent} holds no {file.name}")
    return _json_text(file.read_text(encoding="utf-8"), file)


def _json_text(text: str, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise BadDrafter(f"{file} does not hold JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadDrafter(f"{file} does not hold a JSON object")
    return values


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
