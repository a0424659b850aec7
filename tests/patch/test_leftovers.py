"""What the package leaves behind in other libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh_process import Python
from installed import before

TESTS = Path(__file__).parents[1]
CODE = """
import gc, sys
import bitsandbytes, peft, torch, transformers

LIBRARIES = ("bitsandbytes.", "peft.", "transformers.", "torch.nn.", "torch.optim.", "torch.autograd.")

def snapshot():
    "What modules hold, with the methods of classes and the items of dictionaries."
    found = {}
    for name, module in list(sys.modules.items()):
        for key, value in list(vars(module).items()) if f"{name}.".startswith(LIBRARIES) else ():
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{part}": each for part, each in vars(value).items()}
    dicts = [(name, each) for name, each in found.items() if isinstance(each, dict) and name[-2:] != "__"]
    return found | {f"{name}[{key!r}]": item for name, each in dicts for key, item in dict.items(each)}

def train(patch, unpatch):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    patch(model)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(input_ids=(ids := torch.arange(16)[None]), labels=ids).loss.backward()
    optimizer.step()
    unpatch(model)
    return model

train(id, id).merge_and_unload()  # imports what the libraries import late
before = snapshot()
import peft_kernels as pk
from peft_kernels.integrations import bitsandbytes as ops, peft as merging, transformers as loading
import small_models  # every size counts as worth a kernel
for each in (loading, ops):
    each.enable()
merging.merge_and_unload(train(pk.patch, pk.unpatch))
for each in (loading, ops):
    each.disable()
gc.collect()
after = snapshot()
changed = {name for name, value in before.items() if after.get(name) is not value}
for name in after.keys() - before:
    holder = name.partition("[")[0] if "[" in name else name.rpartition(".")[0]
    if isinstance(before.get(holder), (dict, type)):
        changed.add(name)
print(*changed, sep="\\n")
"""
LEFT = {
    # Importing the package registers `quant_method: peft_kernels_nf4` of its checkpoints.
    "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING['peft_kernels_nf4']",
    "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING['peft_kernels_nf4']",
    # Calls transformers' function for modules that are not patched. Other models may still be patched.
    "transformers.modeling_utils.AttentionInterface._global_mapping['sdpa']",
    # Do nothing while no lazy logits live. The last ones may be collected inside an optimizer's step, where
    # torch iterates over the hooks, so their end must not remove them.
    "torch.optim.optimizer._global_optimizer_pre_hooks[0]",
    "torch.optim.optimizer._global_optimizer_post_hooks[1]",
}


def test_nothing_else_is_left(python: Python) -> None:
    for library in ("bitsandbytes", "peft", "transformers"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    if before("transformers", "5.23"):
        pytest.skip("transformers before 5.23 has no quantiser of ours")
    assert set(python(CODE, TESTS).stdout.splitlines()) == LEFT
