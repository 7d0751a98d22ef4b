"""Chats that continue their last message, and the end-of-turn token that a template shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from paceline.errors import RequestError
from paceline.models.checkpoint import open_checkpoint
from paceline.models.pull import pull
from paceline.models.tokenizer import Tokenizer
from tests.models.test_tokenizer import CHATML, backend, gguf_metadata, only_specials, user, with_markup
from tests.serve.service import TEMPLATE as SERVED

# the templates of known families, each reduced to what it does with the last message
LLAMA = """\
{{- bos_token }}{% for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}
{{- '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """\
{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- m.content + eos_token }}
{%- else %}{{- raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
PHI = """\
{% for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""
NAMED = """\
{{- bos_token }}{% for m in messages %}{{- ('You: ' if m.role == 'user' else 'Me: ') + m.content + '<|end_of_turn|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- 'Me: ' }}{% endif %}"""
GLM = """\
[gMASK]<sop>{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ '\\n' + m.content }}
{%- else %}<|assistant|>{{ '\\n<think></think>' }}{% if m.content.strip() %}{{ '\\n' + m.content.strip() }}{% endif %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
QWEN3 = """\
{% for m in messages %}{% set content = m.content %}{% set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{% endif %}{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
DEEPSEEK = """\
{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- else %}{{- '<｜Assistant｜></think>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>' }}{% endif %}"""
ALWAYS_OPENS = "{% for m in messages %}{{- '<|' + m.role + '|>\n' + m.content }}{% endfor %}{{- '<|assistant|>\n' }}"
ALWAYS_OPENS_CHATML = CHATML.replace("{%- if add_generation_prompt %}", "{%- if true %}")
NOTHING = "{% for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{% endfor %}"


def tokenizer_for(template: str) -> Tokenizer:
    """Its added tokens are those of the template; as in Qwen's, those of reasoning and calls are not marked special."""
    made = backend()
    found = re.findall(r"<[|｜][^<>' ]+[|｜]>|</?think>|\[/?INST\]", template)
    found += ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    made.add_tokens([AddedToken(t, special="think" not in t, normalized=False) for t in dict.fromkeys(found)])
    specials = {each.content: index for index, each in made.get_added_tokens_decoder().items()}
    return Tokenizer(made, specials, (), template, {"bos_token": "<s>", "eos_token": "</s>"})


FAMILIES = {
    "chatml": (CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    "served": (SERVED, "<|im_start|>assistant\n", "<|im_end|>"),
    "llama": (LLAMA, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral": (MISTRAL, " [/INST]", "</s>"),
    "phi": (PHI, "<|assistant|>\n", "<|end|>"),
    "named": (NAMED, "Me: ", "<|end_of_turn|>"),
    "glm": (GLM, "<|assistant|>\n<think></think>\n", None),
    "qwen3": (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
    "deepseek": (DEEPSEEK, "<｜Assistant｜></think>", "<｜end▁of▁sentence｜>"),
    "always opens": (ALWAYS_OPENS, "<|assistant|>\n", None),
    "always opens chatml": (ALWAYS_OPENS_CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    "nothing": (NOTHING, "assistant: ", None),
}


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("text", ["Sure, ", "x\n\n", "  two\n", "", "a </tool_call> <|im_end|> b", "if a < b:\n    "])
def test_a_message_to_be_continued_ends_the_prompt(name: str, text: str) -> None:
    template, header, _ = FAMILIES[name]
    tokenizer = tokenizer_for(template)
    asked = "why <|im_end|><|eot_id|></think>?" if name != "qwen3" else "why <|im_end|>?"
    messages = [user(asked), said(text)]
    rendered = tokenizer.render(messages, continue_final=True)
    assert rendered.endswith(header + text)
    whole = tokenizer.render([user(asked), said("x")], add_generation_prompt=False)
    assert whole.startswith(rendered.removesuffix(text))
    tokens = tokenizer.encode_chat(messages, continue_final=True)
    assert tokenizer.decode(tokens, skip_special=False) == rendered
    unmarked = tokenizer.encode_chat([user("why"), said("x")], continue_final=True)
    assert only_marked(tokenizer, tokens) == only_marked(tokenizer, unmarked)


def only_marked(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    return [each for each in only_specials(tokenizer, tokens) if each in tokenizer._marked_special]


@given(contents=st.lists(with_markup(), min_size=2, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_continued_chat_has_the_tokens_of_the_turns_before(contents: list[str]) -> None:
    """And the continued text has the tokens that the model would make: those of transformers, if none is marked special."""
    tokenizer = CONTINUED
    messages = [user(each) if index % 2 == 0 else said(each) for index, each in enumerate(contents)]
    if messages[-1]["role"] == "user":
        messages.append(said(contents[0]))
    tokens = tokenizer.encode_chat(messages, continue_final=True)
    before = tokenizer.encode_chat(messages[:-1], add_generation_prompt=False)
    start = tokenizer.special_tokens["<|im_start|>"]
    assert tokens[: len(before)] == before and tokens[len(before)] == start
    assert [each for each in only_marked(tokenizer, tokens[len(before) :])] == [start]
    open_end = f"assistant\n{messages[-1]['content']}"
    assert tokenizer.decode(tokens[len(before) + 1 :], skip_special=False) == open_end
    if not any(text in open_end for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert tokens[len(before) + 1 :] == tokenizer.encode(open_end, allow_special=True)


CONTINUED = tokenizer_for(CHATML)


def test_a_call_that_was_begun_goes_on_with_the_models_own_token() -> None:
    tokens = CONTINUED.encode_chat([user("x"), said('<tool_call>\n{"name')], continue_final=True)
    assert CONTINUED.special_tokens["<tool_call>"] in tokens
    asked = CONTINUED.encode_chat([user("<tool_call>"), said("x")], continue_final=True)
    assert CONTINUED.special_tokens["<tool_call>"] not in asked


@pytest.mark.parametrize("text", ["<think>\nhm", "<think>\nhm\n</think>\n\nSo", " <think>"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek", "glm", "chatml"])
def test_reasoning_that_is_continued_stands_alone(name: str, text: str) -> None:
    tokenizer = tokenizer_for(FAMILIES[name][0])
    rendered = tokenizer.render([user("why"), said(text)], continue_final=True)
    assert rendered.endswith(text) and rendered.count("think>") == text.count("think>")
    tokens = tokenizer.encode_chat([user("why <|im_end|>"), said(text)], continue_final=True)
    assert tokenizer.decode(tokens, skip_special=False) == rendered.replace("why", "why <|im_end|>")
    if "<think>" in tokenizer.special_tokens:
        assert tokenizer.special_tokens["<think>"] in tokens


def test_reasoning_beside_the_text_is_written_before_it() -> None:
    tokenizer = tokenizer_for(QWEN3)
    rendered = tokenizer.render([user("why"), said("So", reasoning_content="hm")], continue_final=True)
    assert rendered.endswith("<think>\nhm\n</think>\n\nSo")


@pytest.mark.parametrize(
    ("template", "last", "words"),
    [
        (CHATML, user("x"), "role is assistant"),
        (SERVED, said("x", tool_calls=[{"function": {"name": "f", "arguments": {}}}]), "tool calls"),
        (CHATML, said(None), "content is text"),
        (CHATML, said([{"type": "text", "text": "x"}]), "content is text"),
        ("{{ messages[0].content }}", said("x"), "does not write the last message once"),
        ("{{ messages[1].content * 2 }}", said("x"), "does not write the last message once"),
        ("{{ messages[1].content | upper }}", said("straße"), "rewrites"),
        ("{{ messages[1].content | tojson }}", said('"'), "rewrites"),
        (QWEN3, said("hm</think>So"), "rewrites"),
        ("<think>{{ messages[1].content }}", said("x"), "opens reasoning"),
        ("{{ messages[1].content }}<think>", said("x"), "opens reasoning"),
        (MISTRAL.replace("'user'", "'person'"), said("x"), "only user and assistant"),
    ],
)
def test_what_cannot_be_continued_is_refused(template: str, last: dict[str, Any], words: str) -> None:
    tokenizer = tokenizer_for(template)
    for ask in (tokenizer.render, tokenizer.encode_chat):
        with pytest.raises(RequestError, match=words):
            ask([user("why"), last], continue_final=True)
    with pytest.raises(RequestError, match="role is assistant"):
        tokenizer.encode_chat([], continue_final=True)


# The end of a turn


def in_folder(path: Path, template: str | None, **settings: Any) -> Path:
    tokenizer_for(template or "")._backend.save(str(path / "tokenizer.json"))
    values = {"bos_token": "<s>", "chat_template": template, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return path


def ends(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_bytes(each).decode() for each in tokenizer.eos_tokens]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_says_what_ends_a_turn(name: str, tmp_path: Path) -> None:
    template, _, end = FAMILIES[name]
    path = in_folder(tmp_path, template, eos_token="</s>")
    expected = [end, "</s>", "<|endoftext|>"] if end else ["</s>", "<|endoftext|>"]
    assert ends(Tokenizer.from_directory(path, ())) == list(dict.fromkeys(expected))


def test_no_template_and_one_that_refuses_say_nothing(tmp_path: Path) -> None:
    for template in (None, "{{ raise_exception('no') }}", "{% for %}", "{{ messages[9].content.x }}"):
        assert ends(Tokenizer.from_directory(in_folder(tmp_path, template), ())) == ["<|endoftext|>"]


def test_ends_are_those_of_every_file(tmp_path: Path) -> None:
    path = in_folder(tmp_path, CHATML, eos_token={"content": "</s>"})
    ids = Tokenizer.from_directory(path, ()).special_tokens
    named = [ids["<|user|>"], ids["<|endoftext|>"]]
    expected = ["<|im_end|>", "<|user|>", "<|endoftext|>", "</s>"]
    assert ends(Tokenizer.from_directory(path, named)) == expected
    assert ends(Tokenizer.from_directory(path, [*named, 40])) == expected  # ordinary text, from another model's config


def test_a_gguf_of_a_chatml_model_ends_at_its_turn() -> None:
    metadata = gguf_metadata("qwen2", **{"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": None})
    assert ends(Tokenizer.from_gguf(metadata)) == ["<|im_end|>", "<|endoftext|>"]
    metadata["tokenizer.ggml.eom_token_id"] = 1
    assert ends(Tokenizer.from_gguf(metadata)) == ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]


@pytest.mark.model
def test_the_real_models_templates() -> None:
    for name in ("smollm2-135m", "qwen2.5-coder-1.5b"):
        path = Path.home() / ".cache/paceline/models" / f"{name}.gguf"
        if name != "smollm2-135m" and not path.exists():
            continue  # the tests fetch only the small model
        tokenizer = open_checkpoint(pull(name)).tokenizer()
        assert ends(tokenizer) == ["<|im_end|>", "<|endoftext|>"]
        messages = [{"role": "system", "content": "s"}, user("<|im_end|> why"), said(" Because\n\n")]
        rendered = tokenizer.render(messages, continue_final=True)
        assert rendered.endswith("<|im_end|> why<|im_end|>\n<|im_start|>assistant\n Because\n\n")
        tokens = tokenizer.encode_chat(messages, continue_final=True)
        opened = tokenizer.encode_chat(messages[:-1])
        assert tokens[: len(opened) - 1] == opened[:-1]
        assert tokenizer.decode(tokens, skip_special=False) == rendered
