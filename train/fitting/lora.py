"""LoRA heads while they are fitted: PEFT's own layers on frozen rows; the result is a `runtime` head.

Knows no fitting loop and no files. `runtime.drafting.heads.LoraHead` computes the same numbers without PEFT.
"""

from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import LORA_ALPHA_PER_RANK, ExitHead, HeadContext, LoraHead
from runtime.drafting.unembedding import DraftUnembedding


class FrozenRows(nn.Linear):
    """A Linear on the base's own rows, which stay out of its state and so of checkpoints."""

    def __init__(self, unembedding: DraftUnembedding) -> None:
        nn.Module.__init__(self)  # the Linear's own would allocate rows
        self.out_features, self.in_features = unembedding.weight.shape
        self.weight = nn.Parameter(unembedding.weight, requires_grad=False)
        bias = unembedding.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of it is saved."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """A state without it loads without complaint."""


class PeftLoraHead(LoraHead):
    """`LoraHead` with its arithmetic done by PEFT, as the twin that is fitted."""

    def __init__(self, unembedding: DraftUnembedding, rank: int) -> None:
        draft_vocab_size, hidden_size = unembedding.weight.shape
        ExitHead.__init__(self, hidden_size, draft_vocab_size, rank)  # the weights are PEFT's
        self.rows: nn.Module = FrozenRows(unembedding)
        alpha = int(LORA_ALPHA_PER_RANK * rank)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["rows"]), self)
        for parameter in self.parameters():
            if parameter.requires_grad:  # PEFT gives them the rows' dtype; heads are fitted in float32
                parameter.data = parameter.data.float()

    def forward(self, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D]; the context is not read."""
        logits: Tensor = self.rows(unembedding.normalize(hidden))
        return logits / unembedding.scaling if unembedding.scaling != 1.0 else logits


def use_peft(heads: DraftHeads) -> DraftHeads:
    """Put a PEFT twin in the place of every LoRA head; other heads stay. Returns the same heads."""
    for layer, head in heads.exits.heads.items():
        if isinstance(head, LoraHead) and head.rank is not None:
            heads.exits.heads[layer] = PeftLoraHead(heads.unembedding, head.rank)
    return heads


def without_peft(heads: DraftHeads) -> DraftHeads:
    """Put a `LoraHead` with the fitted weights in the place of every twin; returns the same heads."""
    for layer, head in heads.exits.heads.items():
        if isinstance(head, PeftLoraHead):
            heads.exits.heads[layer] = _export(head)
    return heads


def _export(twin: PeftLoraHead) -> LoraHead:
    state = get_peft_model_state_dict(twin)
    lora_A, lora_B = state.pop("rows.lora_A.weight"), state.pop("rows.lora_B.weight")
    assert not state, f"PEFT trained more than LoRA: {sorted(state)}"
    head = LoraHead(lora_A.shape[1], lora_B.shape[0], lora_A.shape[0]).to(lora_A.device)
    head.load_state_dict({"lora_A": lora_A, "lora_B": lora_B})
    return head
