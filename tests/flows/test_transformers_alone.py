"""In separate processes: importing has no side effects, and nothing needs bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import moe_models
import pytest
import transformers_models
from fresh_process import Python
from transformers_models import Auto, assert_same_state, bnb_config, loaded, read, saved

import testing

FOLDERS = [str(Path(module.__file__ or "").parent) for module in (moe_models, transformers_models, testing)]

WITHOUT_BITSANDBYTES = f"""
import importlib.machinery, os, sys

class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "bitsandbytes" else super().find_spec(name, path, target)

sys.meta_path[:] = [Hidden if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
sys.path += {FOLDERS!r}
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
import transformers
from transformers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available()
import peft_kernels as pk
from transformers_models import *
"""


def test_importing_imports_no_transformers_and_replaces_nothing(python: Python) -> None:
    python("import sys, peft_kernels; assert 'transformers' not in sys.modules")
    python(
        "from transformers.quantizers import auto\n"
        "before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
        "import peft_kernels.integrations.transformers\n"
        "after = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "for one, other in zip(before, after):\n"
        "    assert one.items() <= other.items() and other.keys() - one.keys() == {'peft_kernels_nf4'}\n"
    )


def test_old_transformers_is_named_and_quantize_model_works(python: Python) -> None:
    python(
        f"import sys; sys.path += {FOLDERS!r}\n"
        "import transformers\n"
        "from transformers.quantizers.base import HfQuantizer\n"
        "del HfQuantizer.get_new_dtype\n"
        "import models, peft_kernels as pk\n"
        "model = pk.quantize_model(models.tiny_llama())\n"
        "assert model.is_loaded_in_4bit and getattr(model, 'hf_quantizer', None) is None\n"
        "try:\n"
        "    import peft_kernels.integrations.transformers\n"
        "except ImportError as error:\n"
        "    expected = f'transformers: expected 5.23 or later, got {transformers.__version__}'\n"
        "    assert str(error) == expected, error\n"
        "else:\n"
        "    raise AssertionError('it was imported')\n"
    )


def test_reads_and_writes_without_bitsandbytes(python: Python, tmp_path: Path) -> None:
    bnb_config()
    theirs = Auto.from_pretrained(saved(tmp_path / "dense"), quantization_config=bnb_config())
    theirs.save_pretrained(tmp_path / "theirs")
    python(
        WITHOUT_BITSANDBYTES
        + f"""
folder = Path({str(tmp_path)!r})
model = read(folder / "theirs")
assert_same_state(model, loaded(folder / "dense"))
model.save_pretrained(folder / "ours", max_shard_size="30kB")
assert_same_state(read(folder / "ours"), model)
assert model.num_parameters() == llama().num_parameters()
assert model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 10)
from peft_kernels.integrations.transformers import enable
enable()
assert_same_state(Auto.from_pretrained(folder / "theirs"), model)
config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
assert nf4_layers(Auto.from_pretrained(folder / "dense", quantization_config=config)) == nf4_layers(model)
model.dequantize()
"""
    )
    ours = Auto.from_pretrained(tmp_path / "ours")
    assert type(ours.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert_same_state(ours, loaded(tmp_path / "dense"))
    assert_same_state(ours, read(tmp_path / "theirs"))


@pytest.mark.parametrize("device_map", ["None", '"auto"', '{"": "cpu"}'])
def test_trains_without_bitsandbytes(device_map: str, python: Python, tmp_path: Path) -> None:
    """accelerate asks bitsandbytes whether a 4-bit model may be trained on a CPU."""
    for name in ("accelerate", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    saved(tmp_path / "dense")
    python(
        WITHOUT_BITSANDBYTES
        + f"""
import peft
model = loaded(Path({str(tmp_path)!r}) / "dense", device_map={device_map})
model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), peft.LoraConfig())
pk.patch(model)
options = dict(max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(output_dir={str(tmp_path / "out")!r}, **options),
    train_dataset=[dict(input_ids=row, labels=row) for row in ids(4)],
)
assert trainer.train().training_loss > 0
"""
    )
