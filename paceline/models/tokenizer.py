"""Tokens and text, and chat templates, from a tokenizer.json or from what a GGUF file carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from paceline.errors import BadWeights, RequestError

# How GGUF's `pre` names split text before byte-level BPE; the patterns are those of the models' own tokenizer.json.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_CONTROL, _USER_DEFINED = 3, 4

Message = Mapping[str, Any]


class Tokenizer:
    """`encode` never makes a special token out of text unless told to; a chat's markup comes from its template alone."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        specials: Mapping[str, int],
        eos_tokens: Sequence[int],
        chat_template: str | None,
        markers: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(specials)
        self.eos_tokens = tuple(eos_tokens)
        self.chat_template = chat_template
        self._markers = dict(markers or {})
        self._special_ids = frozenset(self.special_tokens.values())
        self._text_only = tokenizers.Tokenizer.from_str(_without_added(backend.to_str()))

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Text to tokens, nothing added. Without `allow_special`, "<|im_end|>" in the text is just those characters."""
        backend = self._backend if allow_special else self._text_only
        return list(backend.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Tokens to text; bytes that are no UTF-8 become U+FFFD."""
        kept = [token for token in tokens if not (skip_special and token in self._special_ids)]
        return b"".join(self.token_bytes(token) for token in kept).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for: half a character, perhaps. A special token gives its text, an unused id nothing."""
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        table = _byte_of_character()
        if token in self._special_ids or any(character not in table for character in text):
            return str(text).encode()
        return bytes(table[character] for character in text)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The chat as the model's template writes it. Raises RequestError where there is none or it refuses."""
        if self.chat_template is None:
            raise RequestError("this model has no chat template")
        try:
            text: str = _compiled(self.chat_template).render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._markers
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        return text

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """The chat as tokens. Markup in a message's own content stays text: only the template makes special tokens."""
        hidden = [_hide(message, self.special_tokens) for message in messages]
        text = self.render(hidden, tools, add_generation_prompt)
        tokens: list[int] = []
        for index, piece in enumerate(_split(text, self.special_tokens)):
            if index % 2:
                tokens.append(self.special_tokens[piece])
            elif piece:
                tokens += self.encode(_reveal(piece))
        return tokens

    @classmethod
    def from_directory(cls, path: Path, eos_tokens: Sequence[int]) -> Tokenizer:
        """From tokenizer.json and tokenizer_config.json (and chat_template.jinja where the template has its own file)."""
        file = path / "tokenizer.json"
        if not file.exists():
            raise BadWeights(f"{path} holds no tokenizer.json")
        backend = tokenizers.Tokenizer.from_file(str(file))
        settings: dict[str, Any] = {}
        if (path / "tokenizer_config.json").exists():
            settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = settings.get("chat_template")
        if (path / "chat_template.jinja").exists():
            template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):
            template = next((each["template"] for each in template if each["name"] == "default"), None)
        specials = {str(each.content): index for index, each in backend.get_added_tokens_decoder().items()}
        markers = {}
        for name in ("bos_token", "eos_token"):
            value = settings.get(name)
            markers[name] = (value["content"] if isinstance(value, dict) else value) or ""
        return cls(backend, specials, eos_tokens, template, markers)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata: byte-level BPE (`gpt2`) with one of the known pre-tokenizers."""
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
            known = ", ".join(sorted(_PRE_TOKENIZERS))
            raise BadWeights(f"the GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not known; known: gpt2 with {known}")
        texts: list[str] = metadata["tokenizer.ggml.tokens"]
        kinds: list[int] = metadata["tokenizer.ggml.token_type"]
        added = [text for text, each in zip(texts, kinds, strict=True) if each in (_CONTROL, _USER_DEFINED)]
        vocabulary = {text: index for index, text in enumerate(texts)}
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        if pre != "smollm":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens([AddedToken(text, normalized=False, special=True) for text in added])
        eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "bos")]
        end_of_text = [token for token in eos[:2] if token is not None]
        if eos[2] is not None and texts[eos[2]] == "<|endoftext|>":
            end_of_text.append(eos[2])
        specials = {text: vocabulary[text] for text in added}
        markers = {name: texts[metadata.get(f"tokenizer.ggml.{name[:3]}_token_id", 0)] for name in ("bos_token", "eos_token")}
        return cls(backend, specials, tuple(dict.fromkeys(end_of_text)), metadata.get("tokenizer.chat_template"), markers)


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


_PRE_TOKENIZERS = {
    "qwen2": lambda: _split_then_bytes(_QWEN2_SPLIT),
    "llama-bpe": lambda: _split_then_bytes(_LLAMA3_SPLIT),
    "smollm": _digits_then_bytes,
}


def _without_added(serialised: str) -> str:
    values = json.loads(serialised)
    values["added_tokens"] = []
    values["post_processor"] = None
    return json.dumps(values)


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, character to byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(rest)}


@cache
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)


# A private-use character put inside a special token's text in message content, so that it stays text in the rendering.
_HIDE = "\U000f5bad"


def _hide(value: Any, specials: Mapping[str, int]) -> Any:
    if isinstance(value, str):
        for text in specials:
            if text in value:
                value = value.replace(text, text[0] + _HIDE + text[1:])
        return value
    if isinstance(value, Mapping):
        return {key: each if key == "role" else _hide(each, specials) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(each, specials) for each in value]
    return value


def _reveal(text: str) -> str:
    return text.replace(_HIDE, "")


def _split(text: str, specials: Mapping[str, int]) -> list[str]:
    """Plain text and special tokens in turn, plain text first; the longest special token wins at each place."""
    import re

    if not specials:
        return [text]
    pattern = "|".join(re.escape(each) for each in sorted(specials, key=len, reverse=True))
    return re.split(f"({pattern})", text)
