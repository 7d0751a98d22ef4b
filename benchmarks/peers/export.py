"""Writes one GGUF model in the formats of the peers, all with the same bf16 weights.

    python -m benchmarks.peers.export MODEL      prints the two paths

A Hugging Face directory (config.json, model.safetensors; no tokenizer: the peers get tokens) for vLLM and
transformers, and a BF16 GGUF for llama.cpp. Vectors (norms, biases) stay float32 in the GGUF, which llama.cpp requires.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from safetensors.torch import save_file

from benchmarks.common import argument_parser
from paceline.env import cache_dir
from paceline.models.checkpoint import Checkpoint, open_checkpoint
from paceline.models.families import family_by
from paceline.models.pull import pull


@dataclass(frozen=True)
class Exported:
    directory: Path
    gguf: Path


def export(path: Path) -> Exported:
    """Writes both formats into the cache folder unless they are there. `path` is a GGUF file."""
    checkpoint = open_checkpoint(path)
    folder = cache_dir() / "peers" / f"{path.stem}-{checkpoint.identity[:12]}"
    exported = Exported(folder / "hf", folder / "bf16.gguf")
    if not exported.directory.exists():
        _whole(exported.directory, lambda partial: _write_directory(checkpoint, partial))
    if not exported.gguf.exists():
        _whole(exported.gguf, lambda partial: _write_gguf(path, partial))
    return exported


def _whole(target: Path, write: Any) -> None:
    """Writes under a temporary name, then renames."""
    partial = target.with_name(f"partial-{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_dir():
        shutil.rmtree(partial)
    write(partial)
    partial.rename(target)


def _write_directory(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    save_file(dict(checkpoint.tensors(torch.bfloat16)), folder / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.config
    family = family_by("name", config.family)
    assert config.rope_scaling is None and config.experts is None, "only plain dense models are supported"
    values = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": list(config.eos_tokens),
        "bos_token_id": config.bos_token,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2))


def _write_gguf(source: Path, target: Path) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name in ("general.architecture", "general.file_type") or name.startswith("GGUF."):
            continue
        inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    kinds = []
    for tensor in reader.tensors:
        shape = tensor.shape[::-1].tolist()
        kind = GGMLQuantizationType.BF16 if len(shape) > 1 else GGMLQuantizationType.F32
        size = 2 if kind is GGMLQuantizationType.BF16 else 4
        kinds.append(kind)
        writer.add_tensor_info(
            tensor.name, shape, numpy.dtype("float32"), size * int(numpy.prod(shape)), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in zip(reader.tensors, kinds, strict=True):
        values = torch.from_numpy(numpy.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        rounded = values.to(torch.bfloat16)  # vectors are rounded too, so that every peer has the same numbers
        if kind is GGMLQuantizationType.BF16:
            writer.write_tensor_data(rounded.view(torch.int16).numpy())
        else:
            writer.write_tensor_data(rounded.float().numpy())
    writer.close()


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("model", help="a name that `paceline pull` knows, or a GGUF file")
    exported = export(pull(parser.parse_args().model))
    print(exported.directory, exported.gguf, sep="\n")
