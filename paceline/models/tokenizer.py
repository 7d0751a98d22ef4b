"""The tokenizer of a model, from a tokenizer.json or from GGUF metadata, including chats by the model's template."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from paceline.errors import BadWeights, RequestError
from paceline.models.special_tokens import SpecialTokenEscaper, all_strings, splitting_pattern
from paceline.models.template import (
    ChatMessage,
    looks_like_control,
    prompt_before,
    render,
    text_to_continue,
    turn_end_token,
)
from paceline.models.token_cache import TokenCache

# the pre-tokenizer patterns that GGUF's `pre` names, as in the models' own tokenizer.json
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types
# by their text, the tokens that frame tool calls or reasoning: part of a model's output even if marked special
_OUTPUT_MARKUP = re.compile(
    r"tool|think|DSML|arg_(key|value)|\[(ARGS|CALL_ID)\]|function|invoke|parameter", re.IGNORECASE
)
_BATCH_SIZE = 4096  # bounds memory: texts encoded in one call


class Tokenizer:
    """Converts text and chats to tokens, and tokens to text.

    `encode` makes no special token out of text unless `allow_special`; a chat's special tokens come from its template only.
    `special_tokens` maps the text of every added token to its id. Control tokens are those marked special, except for tokens
    that frame tool calls or reasoning: these belong to the output however a tokenizer marks them (DeepSeek's
    `<｜tool▁calls▁begin｜>` is marked, Qwen's `<tool_call>` is not). `text_bytes` and `decode` omit control tokens.
    `eos_tokens` end the output; the chat template's end of turn is the first. `bos_tokens` precede a prompt that is no chat.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        specials: Mapping[str, int],
        eos_tokens: Sequence[int],
        chat_template: str | None,
        markers: Mapping[str, str] | None = None,
        bos_tokens: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(specials)
        self.eos_tokens = tuple(eos_tokens)
        self.bos_tokens = tuple(bos_tokens)
        self.chat_template = chat_template
        self._markers = dict(markers or {})
        self._special_ids = frozenset(self.special_tokens.values())
        self._added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self._marked_special = frozenset(index for index, each in self._added.items() if each.special)
        self._control_tokens = frozenset(
            index for index in self._marked_special if not _OUTPUT_MARKUP.search(self._added[index].content)
        )
        self._text_only = _without_added(backend)
        self._bytes: dict[int, bytes] = {}
        self._cache = TokenCache()

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return str(self._backend.to_str())

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Text to tokens, without added BOS or EOS. Without `allow_special`, "<|im_end|>" in the text is plain characters.

        Raises RequestError for text that cannot be encoded as UTF-8 (it holds half of a surrogate pair).
        """
        return list(_encodings(self._backend if allow_special else self._text_only, [text])[0].ids)

    def encode_prompt(self, text: str) -> list[int]:
        """A prompt that is no chat, as tokens. Its markup becomes special tokens, and it begins with `bos_tokens` once."""
        tokens = self.encode(text, allow_special=True)
        bos = list(self.bos_tokens)
        return tokens if tokens[: len(bos)] == bos else bos + tokens

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each of many texts. Raises what `encode` raises."""
        found: list[int] = []
        for start in range(0, len(texts), _BATCH_SIZE):
            found += map(len, _encodings(self._text_only, texts[start : start + _BATCH_SIZE]))
        return found

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Tokens to text. Invalid UTF-8 becomes U+FFFD. Control tokens are omitted unless `skip_special` is False."""
        bytes_of = self.text_bytes if skip_special else self.token_bytes
        return b"".join(map(bytes_of, tokens)).decode("utf-8", "replace")

    def text_bytes(self, token: int) -> bytes:
        """The bytes of a token in the visible text: as `token_bytes`, but empty for a control token."""
        return b"" if token in self._control_tokens else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, perhaps part of a character: of a special token its text, of an unused id none."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._bytes_of(token)
        return known

    def _bytes_of(self, token: int) -> bytes:
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        table = byte_of_character()
        if token in self._special_ids or any(character not in table for character in text):
            return str(text).encode()
        return bytes(table[character] for character in text)

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """The chat as the model's template renders it, with further template `variables`.

        With `continue_final` the last message, an assistant's, is left open: the text ends with its content, and no turn is
        opened. Raises RequestError if the model has no template, or the template refuses the messages or cannot leave the last
        one open.
        """
        return "".join(self._rendered(messages, tools, add_generation_prompt, variables, continue_final))

    def _rendered(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
        continue_final: bool,
    ) -> tuple[str, str]:
        """(what the template writes, the text to be continued after it); the latter is empty without `continue_final`."""
        if self.chat_template is None:
            raise RequestError("this model has no chat template; send a prompt instead of messages")
        template, fixed_variables = self.chat_template, {**(variables or {}), **self._markers, "tools": tools}

        def render_with(messages: Sequence[ChatMessage], add_generation_prompt: bool = False) -> str:
            return render(
                template, {**fixed_variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
            )

        if not continue_final:
            return render_with(messages, add_generation_prompt), ""
        continued = text_to_continue(messages)
        return prompt_before(messages, continued, render_with), continued

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> list[int]:
        """The chat as tokens. Markup in messages, tools and variables stays text: only the template makes special tokens.

        One exception: if the template itself searches messages for markup (such as `</think>` in an earlier answer), that
        markup becomes added tokens too, as in transformers, unless they are marked special. The same holds for the text to be
        continued with `continue_final` (see `render`). Raises RequestError if the template rewrites text so that given markup
        cannot be distinguished from its own, or if the messages are nested too deep.
        """
        try:
            return self._encode_chat(messages, tools, add_generation_prompt, variables, continue_final)
        except RecursionError as error:
            raise RequestError("these messages or tools are nested too deep") from error

    def _encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
        continue_final: bool,
    ) -> list[int]:
        given = (list(messages), tools, variables)
        unescaped, continued = self._rendered(messages, tools, add_generation_prompt, variables, continue_final)
        for tokens, visible in self._escape_options:
            escaper = SpecialTokenEscaper.for_texts(
                tokens, visible, [unescaped, continued, self.chat_template or "", *all_strings(given)]
            )
            escaped = escaper.escape(given)
            if continue_final:  # the template sees it unescaped: what it writes before it may depend on it
                escaped[0][-1] = {**escaped[0][-1], "role": "assistant", "content": continued}
            text = unescaped
            if escaped != given:
                text, _ = self._rendered(escaped[0], escaped[1], add_generation_prompt, escaped[2], continue_final)
            if escaper.restore(text) == unescaped:
                return self._encode_rendered(
                    text + replace(escaper, visible=self._unmarked_pattern).escape(continued), escaper
                )
        raise RequestError("this chat template rewrites special tokens in messages; take them out of the messages")

    @cached_property
    def _unmarked_pattern(self) -> re.Pattern[str]:
        """Matches the added tokens that are not marked special, which a model's own output may hold."""
        marked = frozenset(text for text, index in self.special_tokens.items() if index in self._marked_special)
        return SpecialTokenEscaper.for_texts(marked, frozenset(self.special_tokens) - marked, ()).visible

    @cached_property
    def _escape_options(self) -> tuple[tuple[frozenset[str], frozenset[str]], ...]:
        """(added tokens to escape, texts to leave visible): the first choice, and the one for templates that need markup."""
        every = frozenset(self.special_tokens)
        marked = frozenset(text for text, index in self.special_tokens.items() if index in self._marked_special)
        unmarked = every.union(re.findall(r"</?\w+>", self.chat_template or "")) - marked
        return (every, frozenset()), (marked, unmarked)

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        return splitting_pattern(self.special_tokens)

    def _encode_rendered(self, text: str, escaper: SpecialTokenEscaper) -> list[int]:
        """A rendered chat as tokens: its unescaped added tokens, and the text between them, restored and encoded."""
        pieces = self._added_pattern.split(text)
        tokens: list[int] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                tokens.append(self.special_tokens[piece])
                continue
            if index and self._added[tokens[-1]].rstrip:
                piece = piece.lstrip()
            if index + 1 < len(pieces) and self._added[self.special_tokens[pieces[index + 1]]].lstrip:
                piece = piece.rstrip()
            if piece:
                tokens += self._cache.encode(escaper.restore(piece), self.encode)
        return tokens

    @classmethod
    def from_directory(cls, path: Path, eos_tokens: Sequence[int]) -> Tokenizer:
        """From a folder's tokenizer.json, tokenizer_config.json and, if present, chat_template.jinja."""
        file = path / "tokenizer.json"
        if not file.exists():
            raise BadWeights(f"{path} holds no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower class
            raise BadWeights(f"{file} is damaged: {error}") from error
        if not _is_byte_level(backend):
            raise BadWeights(f"{file} is not a byte-level tokenizer; other kinds are not supported")
        backend.no_truncation()  # settings that were active when the file was saved
        backend.no_padding()
        settings: dict[str, Any] = {}
        if (path / "tokenizer_config.json").exists():
            try:
                settings = dict(json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise BadWeights(f"{path / 'tokenizer_config.json'} is no JSON object: {error}") from error
        template = settings.get("chat_template")
        if (path / "chat_template.jinja").exists():
            template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):
            template = next((each["template"] for each in template if each["name"] == "default"), None)
        specials = {str(each.content): index for index, each in backend.get_added_tokens_decoder().items()}
        markers, ids = {}, {}
        for name in ("bos_token", "eos_token"):
            value = settings.get(name)
            markers[name] = str((value["content"] if isinstance(value, dict) else value) or "")
            ids[name] = backend.token_to_id(markers[name])
        added = backend.encode("a")  # including the tokens that its post-processor adds
        bos = added.ids[: [*added.special_tokens_mask, 0].index(0)]
        if not bos and settings.get("add_bos_token") is True and ids["bos_token"] is not None:
            bos = [ids["bos_token"]]
        tokenizer = cls(backend, specials, (), template, markers, bos)
        tokenizer._set_eos_tokens([*eos_tokens, ids["eos_token"]])
        return tokenizer

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata: byte-level BPE (`gpt2`) with one of the supported pre-tokenizers."""
        model_kind, pre_tokenizer = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if model_kind != "gpt2" or pre_tokenizer not in _PRE_TOKENIZERS:
            known = ", ".join(sorted(_PRE_TOKENIZERS))
            raise BadWeights(
                f"the GGUF tokenizer {model_kind!r} with pre {pre_tokenizer!r} is not supported; known: gpt2 with {known}"
            )
        texts, kinds, merges = _vocabulary(metadata)
        vocabulary = {text: index for index, text in enumerate(texts)}
        whole_words = pre_tokenizer == "llama-bpe"  # Llama 3 takes a word of the vocabulary whole, without merges
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
        if pre_tokenizer == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _PRE_TOKENIZERS[pre_tokenizer]()
        backend.decoder = decoders.ByteLevel()
        added = {text: kind for text, kind in zip(texts, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)}
        backend.add_tokens(
            [AddedToken(text, normalized=False, special=kind == _CONTROL) for text, kind in added.items()]
        )
        eos, eot, eom, bos = (_named_token(metadata, name, len(texts)) for name in ("eos", "eot", "eom", "bos"))
        specials = {text: vocabulary[text] for text in added}
        markers = {
            "bos_token": "" if bos is None else texts[bos],
            "eos_token": "" if eos is None else texts[eos],
        }
        # Llama 3 begins every prompt with BOS, even if its file does not say so
        begins = bos is not None and metadata.get("tokenizer.ggml.add_bos_token", pre_tokenizer == "llama-bpe") is True
        template = metadata.get("tokenizer.chat_template")
        tokenizer = cls(backend, specials, (), template, markers, [bos] if bos is not None and begins else [])
        tokenizer._set_eos_tokens([eos, eot, eom])
        return tokenizer

    def _set_eos_tokens(self, named: Sequence[int | None]) -> None:
        """Sets `eos_tokens`: the chat template's end of turn, the tokens that the checkpoint names, and `<|endoftext|>`.

        The latter ends a text in every vocabulary that has it, even if a file calls it BOS or does not mention it. A config
        copied from a model with another vocabulary may name a token of ordinary text; that counts only if there is no other.
        """
        control = {t: i for t, i in self.special_tokens.items() if i in self._marked_special or looks_like_control(t)}
        candidates = [*named, control.get("<|endoftext|>")]
        if self.chat_template is not None:
            end = turn_end_token(
                splitting_pattern(control), functools.partial(self.render, add_generation_prompt=False)
            )
            candidates.insert(0, None if end is None else control[end])
        found = dict.fromkeys(token for token in candidates if token is not None)
        self.eos_tokens = tuple(token for token in found if token in self._special_ids) or tuple(found)


def _encodings(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    """Encodes texts by the library's batch call, which releases the GIL; a single text too."""
    try:
        return list(backend.encode_batch_fast(list(texts), add_special_tokens=False))
    except (TypeError, UnicodeEncodeError) as error:  # which one depends on the library's version
        raise RequestError("the text cannot be encoded: it holds half of a surrogate pair") from error


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """(tokens by id, token types, merges) from GGUF metadata. Raises BadWeights if they are missing or inconsistent."""
    lists: list[list[Any]] = []
    for name in ("tokens", "token_type", "merges"):
        found = metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, list):
            raise BadWeights(f"the GGUF file lacks tokenizer.ggml.{name}")
        lists.append(found)
    texts, kinds, merges = lists
    parts = [str(merge).partition(" ") for merge in merges]
    known = set(texts)
    if len(kinds) != len(texts) or not all(known.issuperset((left, right, left + right)) for left, _, right in parts):
        raise BadWeights("the GGUF file's tokenizer is damaged: its tokens, types and merges do not match")
    return texts, kinds, [(left, right) for left, _, right in parts]


def _named_token(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token is not None and not (isinstance(token, int) and 0 <= token < num_tokens):
        raise BadWeights(f"the GGUF file's {name} token {token!r} is not one of its {num_tokens} tokens")
    return token


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "qwen2": lambda: _split_then_bytes(_QWEN2_SPLIT),
    "llama-bpe": lambda: _split_then_bytes(_LLAMA3_SPLIT),
    "smollm": _digits_then_bytes,
}


def _without_added(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same model, normalizer and pre-tokenizer (shared, not copied) without any added token."""
    plain = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    if backend.decoder is None:
        return False
    state = json.loads(backend.decoder.__getstate__())
    return any(each["type"] == "ByteLevel" for each in [state, *state.get("decoders", [])])


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table of printable characters that stand for the 256 bytes: character to byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(rest)}
