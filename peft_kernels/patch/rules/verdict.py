"""What the forward of a class computes, decided once per class and process.

- `recognise`: a trial on a stand-in tells what a forward computes (norms, attention, MLPs, decoder layers).
- `decide`: functions of PEFT and bitsandbytes are compared with reviewed sources, which needs no weights.
  Where a source has changed, a trial on a layer tells whether ours gives the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger("peft_kernels")


class Verdict(NamedTuple):
    """What a class computes, or why that is not known."""

    computes: Any = None
    """In the terms of the rule that asked."""
    reason: str = ""
    tried: bool = False
    """Whether a trial told, since a source has changed."""


class CannotTry(Exception):
    """Why a trial is impossible in the present state. The next call tries again."""


class Differs(Exception):
    """What a trial found."""


_verdicts: dict[Any, Verdict] = {}


def cached(key: Any) -> Verdict | None:
    """The verdict under a key: a rule, a class, and those of its functions that other libraries replace."""
    return _verdicts.get(key)


def recognise(key: Any, trial: Callable[[], Any], otherwise: str) -> Verdict:
    """What a class computes by a trial; the reason `otherwise` if that returns None."""
    found = _verdicts.get(key)
    if found is None:
        computes = trial()
        found = _verdicts[key] = Verdict(computes, otherwise if computes is None else "")
    return found


def decide(
    key: Any, unknown: Callable[[], str], trial: Callable[[], object], computes: Any = True
) -> Verdict:
    """Whether a class computes what ours does.

    Parameters
    ----------
    unknown
        Why one of its sources is not a reviewed one, "" if all are.
    trial
        Raises Differs or CannotTry if it does not, or if that cannot be seen now.
    computes
        What the verdict says in case it does, also to calls inside the trial.
    """
    found = _verdicts.get(key)
    if found is not None:
        return found
    same = Verdict(computes)
    reason = unknown()
    if reason:
        _verdicts[key] = same
        try:
            trial()
            logger.info("%s; tried on one layer, the fused forward gives the same", reason)
            found = same._replace(tried=True)
        except CannotTry as why:
            return Verdict(reason=f"{reason}, and could not be tried: {why}")
        except Exception as error:  # an unknown forward may raise anything
            how = f"a trial failed ({type(error).__name__}: {error})"
            if isinstance(error, Differs):
                how = f"gives other results ({error})"
            found = Verdict(reason=f"{reason}, and {how}; nothing to do with this version")
        finally:
            del _verdicts[key]
    _verdicts[key] = found = found or same
    return found
