"""Bottleneck adapters for transformers models (Houlsby et al. 2019, Pfeiffer et al. 2021, He et al. 2022).

pk.adapters.add(model, "task", "houlsby")   # or an AdapterConfig
pk.adapters.train(model, "task")            # active; everything else is frozen
pk.adapters.save(model, "task", "my-adapter")
pk.adapters.load(model, "my-adapter", load_as="again")
pk.adapters.set_active(model, ["task", "again"])
with pk.adapters.rows(model, ["task", None]):
    model.generate(**two_prompts)           # each row with its own
pk.adapters.delete(model, "task")           # deleting the last one restores the model
"""

from .averaging import average
from .by_row import rows
from .config import AdapterConfig
from .files import load, save
from .manage import Count, active, add, count, delete, names, set_active, train

__all__ = [
    "AdapterConfig",
    "Count",
    "active",
    "add",
    "average",
    "count",
    "delete",
    "load",
    "names",
    "rows",
    "save",
    "set_active",
    "train",
]
