"""Which values an optimizer's options may have, by name: those of several optimizers here, an optimizer's own in its
class's `checks`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gradstats.errors import GradstatsError
from gradstats.optim.moment import ESTIMATORS, SOURCES
from gradstats.units import AVERAGES

TEXT = ", which is text; YAML reads 1e-3 as text, and 1.0e-3 as a number"


class Check(NamedTuple):
    """Whether a value is in range, and what the error adds if it is not."""

    valid: Callable[[Any], bool]
    hint: str = ""

    def accepts(self, value: Any) -> bool:
        """A value of another type, such as the text that YAML reads in 1e-8, is not in range."""
        try:
            return bool(self.valid(value))
        except (TypeError, ValueError):
            return False


def one_of(choices: tuple[Any, ...]) -> Check:
    return Check(lambda value: value in choices, f": one of {choices}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_rate(lr: Any) -> bool:
    """A tensor on a device is believed, since reading it would wait for the device at every step."""
    if not isinstance(lr, Tensor):
        return is_number(lr) and lr >= 0
    return lr.numel() == 1 and (lr.device.type != "cpu" or 0 <= float(lr) < math.inf)


DECAY = Check(lambda beta: 0 <= beta < 1)
YES_OR_NO = Check(lambda value: isinstance(value, bool), ": True or False")
CHECKS: dict[str, Check] = {
    "lr": Check(is_rate),
    "weight_decay": Check(lambda decay: is_number(decay) and decay >= 0),
    "batch_size": Check(lambda b: is_number(b) and b > 0),
    "max_norm": Check(lambda bound: bound is None or bound > 0),
    "eps": Check(lambda eps: 0 <= eps < math.inf),
    "betas": Check(lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
    "reference_batch_size": Check(lambda r: r is None or r == "tuned" or (not isinstance(r, str) and r >= 1)),
    "average": one_of(AVERAGES),
    "source": one_of(SOURCES),
    "estimator": one_of(ESTIMATORS),
    **dict.fromkeys(("momentum", "dampening", "alpha", "noise_beta"), DECAY),
    **dict.fromkeys(("maximize", "decoupled_weight_decay", "amsgrad", "nesterov", "centered", "eps_inside"), YES_OR_NO),
}


@functools.cache
def checks_of(kind: type) -> Mapping[str, Check]:
    """Those of all, and of a class and the classes that it is made of."""
    found = dict(CHECKS)
    for base in reversed(kind.__mro__):
        found |= vars(base).get("checks", {})
    return found


def check_options(kind: type, group: Mapping[str, Any]) -> None:
    """Raises: GradstatsError naming an option that is out of range."""
    for name, check in checks_of(kind).items():
        if name in group and not check.accepts(group[name]):
            hint = check.hint or (TEXT if isinstance(group[name], str) else "")
            raise GradstatsError(f"{kind.__name__}: invalid {name} = {group[name]!r}{hint}")
