"""Tokens and text, and chat templates, from a tokenizer.json or from what a GGUF file carries."""

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
from paceline.models.earlier import Earlier
from paceline.models.hiding import Hiding, any_of, strings
from paceline.models.template import Message, left_open, looks_like_control, render, said_last, turn_end

# How GGUF's `pre` names split text before byte-level BPE; the patterns are those of the models' own tokenizer.json.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_CONTROL, _USER_DEFINED = 3, 4
# Of tokens marked special those that frame tool calls or reasoning, by their text: they are part of what a model says.
_SPOKEN = re.compile(r"tool|think|DSML|arg_(key|value)|\[(ARGS|CALL_ID)\]|function|invoke|parameter", re.IGNORECASE)
_TOGETHER = 4096  # texts encoded at once, so that what is kept of them meanwhile stays small


class Tokenizer:
    """`encode` never makes a special token out of text unless told to; a chat's markup comes from its template alone.

    `special_tokens` are all added tokens by their text. Of them `text_bytes` and `decode` leave out control tokens: those
    that are marked special, but for those that frame tool calls or reasoning, which are part of what a model says however
    its tokenizer marks them (DeepSeek's `<｜tool▁calls▁begin｜>` is marked, Qwen's `<tool_call>` is not). `eos_tokens` end
    the output, the chat template's own turn end first. `bos_tokens` come before a prompt that is no chat.
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
        self._unspoken = frozenset(index for index, each in self._added.items() if each.special)
        self._silent = frozenset(index for index in self._unspoken if not _SPOKEN.search(self._added[index].content))
        self._text_only = _without_added(backend)
        self._bytes: dict[int, bytes] = {}
        self._earlier = Earlier()

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    def to_json(self) -> str:
        """As a tokenizer.json."""
        return str(self._backend.to_str())

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Text to tokens, nothing added. Without `allow_special`, "<|im_end|>" in the text is just those characters.

        Raises RequestError for text that has no UTF-8 (half of a surrogate pair).
        """
        return list(_encodings(self._backend if allow_special else self._text_only, [text])[0].ids)

    def encode_prompt(self, text: str) -> list[int]:
        """A prompt that is no chat, as tokens: special tokens are made, and `bos_tokens` come first, once."""
        tokens = self.encode(text, allow_special=True)
        bos = list(self.bos_tokens)
        return tokens if tokens[: len(bos)] == bos else bos + tokens

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens `encode` makes of each of many texts. Raises what `encode` raises."""
        found: list[int] = []
        for start in range(0, len(texts), _TOGETHER):
            found += map(len, _encodings(self._text_only, texts[start : start + _TOGETHER]))
        return found

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Tokens to text; bytes that are no UTF-8 become U+FFFD. Control tokens are left out unless told otherwise."""
        bytes_of = self.text_bytes if skip_special else self.token_bytes
        return b"".join(map(bytes_of, tokens)).decode("utf-8", "replace")

    def text_bytes(self, token: int) -> bytes:
        """The bytes of a token in what a reader sees: as `token_bytes`, but a control token gives nothing."""
        return b"" if token in self._silent else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token: half a character, perhaps. A special token gives its text, an unused id nothing."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._bytes_of(token)
        return known

    def _bytes_of(self, token: int) -> bytes:
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        table = _byte_of_character()
        if token in self._special_ids or any(character not in table for character in text):
            return str(text).encode()
        return bytes(table[character] for character in text)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """The chat as the model's template writes it, given `variables` besides. Raises RequestError where there is none or
        it refuses.

        With `continue_final` the last message, an assistant's, is left open: the text ends with its content as given, and
        no turn is opened. Raises RequestError where the template cannot leave it open.
        """
        return "".join(self._rendered(messages, tools, add_generation_prompt, variables, continue_final))

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
        continue_final: bool,
    ) -> tuple[str, str]:
        """What the template writes, and, with `continue_final`, the text that stands open after it."""
        if self.chat_template is None:
            raise RequestError("this model has no chat template")
        template, more = self.chat_template, {**(variables or {}), **self._markers, "tools": tools}

        def write(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
            return render(template, {**more, "messages": messages, "add_generation_prompt": add_generation_prompt})

        if not continue_final:
            return write(messages, add_generation_prompt), ""
        said = said_last(messages)
        return left_open(messages, said, write), said

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> list[int]:
        """The chat as tokens. Markup in what the caller gives stays text: only the template makes special tokens.

        Where the template itself looks for markup in the messages (as for an earlier answer's `</think>`), added tokens
        that are not marked special are made of it too, as transformers does; those marked special never are. With
        `continue_final`, which is as in `render`, that holds for all of the text that is to be continued. Raises
        RequestError where a template rewrites text so that the two cannot be told apart, or what is given nests too deep.
        """
        try:
            return self._encode_chat(messages, tools, add_generation_prompt, variables, continue_final)
        except RecursionError as error:
            raise RequestError("these messages or tools are nested too deep") from error

    def _encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
        continue_final: bool,
    ) -> list[int]:
        given = (list(messages), tools, variables)
        plain, said = self._rendered(messages, tools, add_generation_prompt, variables, continue_final)
        for tokens, visible in self._hidden:
            hiding = Hiding.choose(tokens, visible, [plain, said, self.chat_template or "", *strings(given)])
            changed = hiding.hide(given)
            if continue_final:  # what the template writes before it may depend on it, and nothing else does
                changed[0][-1] = {**changed[0][-1], "role": "assistant", "content": said}
            text = plain
            if changed != given:
                text, _ = self._rendered(changed[0], changed[1], add_generation_prompt, changed[2], continue_final)
            if hiding.reveal(text) == plain:
                return self._encode_rendered(text + replace(hiding, visible=self._sayable).hide(said), hiding)
        raise RequestError("this chat template rewrites special tokens in messages; take them out of the messages")

    @cached_property
    def _sayable(self) -> re.Pattern[str]:
        """Finds the added tokens that are not marked special, which a model's own text may hold."""
        marked = frozenset(text for text, index in self.special_tokens.items() if index in self._unspoken)
        return Hiding.choose(marked, frozenset(self.special_tokens) - marked, ()).visible

    @cached_property
    def _hidden(self) -> tuple[tuple[frozenset[str], frozenset[str]], ...]:
        """Which added tokens to hide from the template, and what to leave visible then; the second where the first fails."""
        every = frozenset(self.special_tokens)
        unspoken = frozenset(text for text, index in self.special_tokens.items() if index in self._unspoken)
        looked_for = every.union(re.findall(r"</?\w+>", self.chat_template or "")) - unspoken
        return (every, frozenset()), (unspoken, looked_for)

    @cached_property
    def _any_added(self) -> re.Pattern[str]:
        return any_of(self.special_tokens)

    def _encode_rendered(self, text: str, hiding: Hiding) -> list[int]:
        pieces = self._any_added.split(text)
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
                tokens += self._earlier.encode(hiding.reveal(piece), self.encode)
        return tokens

    @classmethod
    def from_directory(cls, path: Path, eos_tokens: Sequence[int]) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json, and chat_template.jinja where the template has its own file."""
        file = path / "tokenizer.json"
        if not file.exists():
            raise BadWeights(f"{path} holds no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower class
            raise BadWeights(f"{file} is damaged: {error}") from error
        if not _is_byte_level(backend):
            raise BadWeights(f"{file} is no byte-level tokenizer; others are not supported")
        backend.no_truncation()  # what was in force when the file was saved is not part of the tokenizer
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
        added = backend.encode("a")  # with what its post-processor adds
        bos = added.ids[: [*added.special_tokens_mask, 0].index(0)]
        if not bos and settings.get("add_bos_token") is True and ids["bos_token"] is not None:
            bos = [ids["bos_token"]]
        tokenizer = cls(backend, specials, (), template, markers, bos)
        tokenizer._find_ends([*eos_tokens, ids["eos_token"]])
        return tokenizer

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata: byte-level BPE (`gpt2`) with one of the known pre-tokenizers."""
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
            known = ", ".join(sorted(_PRE_TOKENIZERS))
            raise BadWeights(f"the GGUF tokenizer {kind!r} with pre {pre!r} is not known; known: gpt2 with {known}")
        texts, kinds, merges = _vocabulary(metadata)
        vocabulary = {text: index for index, text in enumerate(texts)}
        whole_words = pre == "llama-bpe"  # Llama 3 takes a word of its vocabulary as it is, merges or not
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
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
        # Llama 3 begins every prompt with it, whether or not its file says so
        begins = bos is not None and metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") is True
        template = metadata.get("tokenizer.chat_template")
        tokenizer = cls(backend, specials, (), template, markers, [bos] if bos is not None and begins else [])
        tokenizer._find_ends([eos, eot, eom])
        return tokenizer

    def _find_ends(self, named: Sequence[int | None]) -> None:
        """Sets `eos_tokens`: the chat template's turn end, those that the checkpoint names, and `<|endoftext|>`, which ends a
        text wherever there is one, though a file may call it the beginning or nothing.

        A config may have been copied from a model with another vocabulary, and then name a token of ordinary text: such a
        one counts only where there is no other.
        """
        control = {t: i for t, i in self.special_tokens.items() if i in self._unspoken or looks_like_control(t)}
        ends = [*named, control.get("<|endoftext|>")]
        if self.chat_template is not None:
            end = turn_end(any_of(control), functools.partial(self.render, add_generation_prompt=False))
            ends.insert(0, None if end is None else control[end])
        found = dict.fromkeys(token for token in ends if token is not None)
        self.eos_tokens = tuple(token for token in found if token in self._special_ids) or tuple(found)


def _encodings(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    """Of a text alone, too, by the library's call for many: that one lets Python's other threads run meanwhile."""
    try:
        return list(backend.encode_batch_fast(list(texts), add_special_tokens=False))
    except (TypeError, UnicodeEncodeError) as error:  # which one depends on the library's version
        raise RequestError("the text cannot be encoded: it holds half of a surrogate pair") from error


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Tokens by id, their kinds, and the merges, from GGUF metadata."""
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
        raise BadWeights("the GGUF file's tokenizer is damaged: its tokens, types and merges do not belong together")
    return texts, kinds, [(left, right) for left, _, right in parts]


def _named_token(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token is not None and not (isinstance(token, int) and 0 <= token < num_tokens):
        raise BadWeights(f"the GGUF file's {name} token {token!r} is none of its {num_tokens} tokens")
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
    """The same model and splitting (shared, not copied) without any added token."""
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
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, character to byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(rest)}
