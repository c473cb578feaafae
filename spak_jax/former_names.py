"""The names that keys of configurations had before, read as those that they have now."""

from collections.abc import Mapping
from typing import Any

# Keys that were called otherwise before, by section: what checkpoints, results files and
# specifications of that time hold is read as what it is called now.
FORMER_NAMES = {
    "model": {"clip": "max_relative_distance", "free_loops": "no_grad_warmup_loops"},
    "data": {"max_digits": "max_length", "bridge_digits": "bridge_lengths"},
    "evaluation": {"digits": "lengths"},
}


def with_present_names(values: Any) -> Any:
    """The nested values of a configuration, with the names that keys have now.

    Raises:
      ValueError: a key is given by both its names.
    """
    if not isinstance(values, Mapping):
        return values
    values = dict(values)
    for section, names in FORMER_NAMES.items():
        if not isinstance(values.get(section), Mapping):
            continue
        values[section] = dict(values[section])
        for former, name in names.items():
            if former not in values[section]:
                continue
            if name in values[section]:
                raise ValueError(
                    f"{section}.{former} is the former name of {section}.{name}: give one of them"
                )
            values[section][name] = values[section].pop(former)
    return values
