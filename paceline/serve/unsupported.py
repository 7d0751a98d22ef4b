"""Request fields of other servers that change the output and are not supported. A request that sets one is refused."""

from __future__ import annotations

from typing import Any

from paceline.errors import BadField
from paceline.serve.constrain import Constraints

# values without an effect, for the fields whose neutral value is neither false nor empty
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "truncate_prompt_tokens": (-1,),
    "thinking_token_budget": (-1,),
    "typical_p": (1,),
    "top_n_sigma": (-1,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "n_probs": (0,),
    "n_predict": (-1,),
    "n_indent": (0,),
    "t_max_predict_ms": (0, -1),
    "modalities": (["text"],),
}


class UnsupportedFields(Constraints, kw_only=True):
    """Fields of vLLM, SGLang, llama.cpp and OpenAI. Ignoring one would return another output than requested."""

    use_beam_search: Any = None
    include_stop_str_in_output: Any = None
    no_stop_trim: Any = None
    stop_regex: Any = None
    truncate_prompt_tokens: Any = None
    prompt_logprobs: Any = None
    logprob_token_ids: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None
    watermarking: Any = None
    prompt_embeds: Any = None
    chat_template: Any = None
    lora_path: Any = None
    lora: Any = None
    typical_p: Any = None
    top_n_sigma: Any = None
    dynatemp_range: Any = None
    mirostat: Any = None
    dry_multiplier: Any = None
    xtc_probability: Any = None
    samplers: Any = None
    n_probs: Any = None
    n_predict: Any = None
    n_indent: Any = None
    t_max_predict_ms: Any = None
    modalities: Any = None
    web_search_options: Any = None

    def refuse_unsupported(self) -> None:
        """Raises BadField for a field whose value would change the output."""
        for name in UnsupportedFields.__annotations__:
            if _changes(getattr(self, name), _NEUTRAL.get(name)):
                raise BadField(f"{name} is not supported", name)


def _changes(value: Any, neutral: tuple[Any, ...] | None) -> bool:
    if value is None:
        return False
    return value not in neutral if neutral else value is not False and value not in ("", [], {})
