"""Arguments that count something, checked."""

import operator
from typing import Any


def checked_count(argument: str, number: Any, least: int = 1, meaning: str = "") -> int:
    """The number as an int.

    Raises:
        TypeError: it is not an integer (2.0 is not one either).
        ValueError: it is below `least`.
    """
    try:
        found = operator.index(number)
    except TypeError:
        raise TypeError(f"`{argument}` must be an integer, got {number}.") from None
    if found < least:
        raise ValueError(f"`{argument}` must be at least {least}{meaning}, got {found}.")
    return found
