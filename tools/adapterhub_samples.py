"""Writes adapters of AdapterHub's library and the outputs it computes with them to tests/adapters/adapterhub.

Written with adapters 1.3.0 and transformers 4.57.6, in an environment of their own:

    pip install adapters torch
    python tools/adapterhub_samples.py tests/adapters/adapterhub

The models are tiny, with random weights that the tests reproduce by `filled`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 50, "max_position_embeddings": 24, "pad_token_id": 0,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "bert-seq_bn": ("Bert", "SeqBnConfig", {"reduction_factor": 8}, True),
    "bert-double_seq_bn": ("Bert", "DoubleSeqBnConfig", {"reduction_factor": 8, "ln_before": True}, False),
    "roberta-par_bn": ("Roberta", "ParBnConfig", {"reduction_factor": 8}, True),
    "roberta-seq_bn": ("Roberta", "SeqBnConfig", {"reduction_factor": 16, "mh_adapter": True}, False),
}
"""Model, config, its options, and whether to save safetensors."""


def filled(model: Any, seed: int = 0) -> Any:
    """Fills the parameters, the same in every version of transformers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(values + 1 if name.endswith("LayerNorm.weight") else values)
    return model.eval()


def inputs() -> torch.Tensor:
    return torch.arange(3, 3 + 14).reshape(2, 7)


def write(folder: Path) -> None:
    import adapters
    import transformers
    from safetensors.torch import save_file

    for case, (family, kind, options, safe) in CASES.items():
        config = getattr(transformers, family + "Config")(**SIZES)
        model = filled(getattr(transformers, family + "Model")(config))
        adapters.init(model)
        model.add_adapter("sample", config=getattr(adapters, kind)(**options))
        model.set_active_adapters("sample")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if ".sample." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            model.eval()
            output = model(inputs())[0]
        model.save_adapter(str(folder / case), "sample", use_safetensors=safe)
        save_file({"output": output.contiguous()}, folder / case / "expected.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
