"""POST /tokenize and /detokenize, in vLLM's and llama.cpp's formats, and GET /tokenizer_info, in vLLM's."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField
from paceline.models.tokenizer import Tokenizer
from paceline.serve.chat_input import ChatMessage, Tool, encode_tokenize
from paceline.serve.service import Service, run_in_worker_thread_if_large
from paceline.serve.wire import read_body, reply


class TokenizeBody(Struct, kw_only=True):
    """A body with one of `prompt` (vLLM's), `content` (llama.cpp's) and `messages`.

    `prompt` is encoded as in /v1/completions, without the prefix tokens (BOS) if `add_special_tokens` is false. `content`
    is encoded with the prefix tokens only if `add_special` is true; markers in it are text if `parse_special` is false.
    """

    model: str = ""
    prompt: str | None = None
    content: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens of `prompt` or `content`."""
        text = self.prompt if self.content is None else self.content
        assert text is not None
        begins = self.add_special_tokens is not False if self.content is None else self.add_special
        if begins and self.parse_special is not False:
            return tokenizer.encode_prompt(text)
        tokens = tokenizer.encode(text, allow_special=self.parse_special is not False)
        return [*tokenizer.bos_tokens, *tokens] if begins else tokens


class DetokenizeBody(Struct, kw_only=True):
    tokens: list[int]
    model: str = ""


async def tokenize(service: Service, http: HttpRequest) -> Response:
    """The tokens of a text, or of messages as chat completions encode them."""
    body = await read_body(http, TokenizeBody, service.body_limit)
    tokenizer = service.host.tokenizer
    if sum(each is not None for each in (body.prompt, body.content, body.messages)) != 1:
        raise BadField("send exactly one of prompt, messages and content", "prompt")
    if body.messages is None:
        tokens = await run_in_worker_thread_if_large(http, body.encode, tokenizer)
    elif body.messages:
        tokens = await run_in_worker_thread_if_large(http, encode_tokenize, tokenizer, body.messages, body)
    else:
        raise BadField("messages must not be empty", "messages")
    return reply({"count": len(tokens), "max_model_len": service.host.capacity, "tokens": tokens})


async def detokenize(service: Service, http: HttpRequest) -> Response:
    """The text of tokens, special tokens included. `prompt` is vLLM's name of the field, `content` llama.cpp's."""
    body = await read_body(http, DetokenizeBody, service.body_limit)
    text = await run_in_worker_thread_if_large(http, _decode, service, body.tokens)
    return reply({"prompt": text, "content": text})


def _decode(service: Service, tokens: list[int]) -> str:
    tokenizer = service.host.tokenizer
    vocab_size = max(service.host.vocab_size, tokenizer.vocab_size)
    for index, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise BadField(f"{str(token)[:20]} is not a token of the vocabulary", f"tokens[{index}]")
    return tokenizer.decode(tokens, skip_special=False)


async def tokenizer_info(service: Service, request: HttpRequest) -> Response:
    """The tokenizer's BOS and EOS markers and chat template, as evaluation harnesses request them."""
    tokenizer = service.host.tokenizer
    names = {"bos_token": tokenizer.bos_tokens[:1], "eos_token": tokenizer.eos_tokens[:1]}
    markers = {name: tokenizer.decode(tokens, False) if tokens else None for name, tokens in names.items()}
    return reply({**markers, "chat_template": tokenizer.chat_template, "max_model_len": service.host.capacity})
