"""Fields that clients send and this server does not act on: any value of some, and of others what changes nothing."""

from collections.abc import Container
from typing import Any

from runtime.server.errors import ApiError
from runtime.server.request.strict import describe, without_null

# Whatever they say, the answer is the same: of keeping, accounting and caching.
INERT = {
    "cache_prompt", "keep_alive", "metadata", "prediction", "priority", "prompt_cache_key",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
# What changes nothing, by field; any other value is refused. Null always passes.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True, False),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "audio": (),
    "background": (False,),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "context_management": ([],),
    "continue_final_message": (False,),
    "conversation": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "echo": (False,),
    "enable_thinking": (True, False),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include": ([], ["reasoning.encrypted_content"]),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "max_tool_calls": (),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "no_repeat_ngram_size": (0,),
    "parallel_tool_calls": (True, False),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "truncation": ("disabled",),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# What to do about a field that is refused, where leaving it out is not all.
HINTS = {"truncation": "leave it out, and send fewer messages where the context has no room"}


def describe_body(schema: dict[str, Any]) -> None:
    """Say in the document what a body may hold beside its own fields."""
    describe(schema)
    told = {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    schema["properties"] = {name: {} for name in sorted(INERT)} | told | schema["properties"]


def without_neutral(fields: dict[str, Any], own: Container[str]) -> dict[str, Any]:
    """The fields of a request that say something.

    Args:
        own: fields that the request knows itself.

    Raises:
        ApiError: one that is not honoured has a value that would change the answer.
    """
    kept = {name: value for name, value in fields.items() if value is not None and (name not in INERT or name in own)}
    for name in [name for name in kept if name in NEUTRAL and name not in own]:
        value = without_null(kept.pop(name))
        same = (*NEUTRAL[name], kept.get("n")) if name == "best_of" else NEUTRAL[name]  # of which none is left out
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in same):
            said = f"{name} is not supported by this server: {HINTS.get(name, 'leave it out')}"
            raise ApiError(400, said, param=name)
    return kept
