"""`specbound audit`: prompts from a file through `runtime.audit`, with what it was run on.

Knows no comparison rule: that is `runtime.audit`'s.
"""

from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from runtime import ConfigError, DataError, load_specbound
from runtime.audit import AuditedPrompt, audit
from runtime.benchmark import hardware
from train.prompts import Prompt, read_prompts

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def run_audit(
    adapter: str,
    base_model: str | None,
    prompts: str,
    options: dict[str, Any],
    *,
    limit: int | None,
    dtype: str,
    threads: int | None,
    seed: int,
    exactness: str,
) -> dict[str, Any]:
    """Audit and report.

    Args:
        prompts: a .jsonl file or the name of a data set; the first turn of each is asked.
        options: of `generate`.

    Returns:
        JSON values: `prompts`, `tokens`, `differing_tokens`, `identical_prompts`, `findings` (one a prompt),
        `certificate`, `options`, `seed`, `hardware`, `dtype`, `threads`.

    Raises:
        SpecBoundError: wrong options, prompts, adapter or base.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    transformers_logging.set_verbosity_error()
    texts = read_prompts(prompts, limit=limit)
    if threads is not None:
        torch.set_num_threads(threads)
    model: Any = load_specbound(adapter, base_model, dtype=DTYPES[dtype], exactness=exactness)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids = [encode(tokenizer, prompt).to(model.device) for prompt in texts]
    findings: list[AuditedPrompt] = []
    with tqdm(total=len(ids), desc="audit", unit="prompt") as bar:
        for finding in audit(model, ids, seed=seed, **options):
            findings.append(finding)
            bar.set_postfix_str(f"{sum(found.differing for found in findings)} differing tokens")
            bar.update()
    return {
        "prompts": len(findings),
        "tokens": sum(found.tokens for found in findings),
        "differing_tokens": sum(found.differing for found in findings),
        "identical_prompts": sum(found.differing == 0 for found in findings),
        "findings": [found.to_dict() for found in findings],
        "certificate": str(model.specbound.certificate or "batched: nothing is promised"),
        "options": options,
        "seed": seed,
        "hardware": hardware(model.device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }


def encode(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    """Token ids [1, T] of a prompt's first turn, through the chat template where there is one.

    Raises:
        DataError: nothing is left of it.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer("\n".join(message.content for message in prompt.messages))["input_ids"]
    else:
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise DataError("a prompt has no tokens: remove it from the file")
    return torch.tensor([ids])
