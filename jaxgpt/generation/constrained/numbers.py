"""Regular expressions of numbers within bounds."""


def tightest(closed: int | None, open_: int | None, sign: int) -> tuple[int | None, bool]:
    """The stricter of two bounds, and whether it is exclusive; `sign` is the direction inside."""
    given = [(sign * bound, i) for i, bound in enumerate((closed, open_)) if bound is not None]
    bound, is_open = max(given, default=(None, 0))
    return bound if bound is None else sign * bound, bool(is_open)


def integers(low: int, above: bool, high: int | None, below: bool) -> list[str]:
    """Patterns of the integers from `low` >= 0 to `high`; `above`, `below`: bounds are
    exclusive."""
    return _naturals(low + above, high if high is None else high - below)


def _naturals(low: int, high: int | None) -> list[str]:
    """Patterns of the integers from `low` >= 0 to `high`, one for each number of digits."""
    patterns = []
    while high is None or low <= high:
        digits = len(str(low))
        last = 10**digits - 1
        patterns.append(_as_long(str(low), str(last if high is None else min(last, high))))
        if high is None:
            return [*patterns, f"[1-9][0-9]{{{digits},}}"]
        low = last + 1
    return patterns


def _as_long(low: str, high: str) -> str:
    """The pattern of the numbers from `low` to `high`, which have equally many digits."""
    if low == high:
        return low
    if low[0] == high[0]:
        return low[0] + _as_long(low[1:], high[1:])
    digits = len(low) - 1
    first, last, patterns = int(low[0]), int(high[0]), []
    if int(low[1:] or 0) > 0:
        patterns.append(low[0] + _as_long(low[1:], "9" * digits))
        first += 1
    if high[1:] != "9" * digits:
        patterns.append(high[0] + _as_long("0" * digits, high[1:]))
        last -= 1
    if first <= last:
        patterns.append(f"[{first}-{last}][0-9]{{{digits}}}")
    return f"(?:{'|'.join(patterns)})"


# Six fractional digits, which a double distinguishes from a bound of up to 10**9.
_ZEROS, _FRACTION = r"(?:\.0{1,6})?", r"(?:\.[0-9]{1,6})?"
_MORE = rf"\.(?:{'|'.join('0' * zeros + f'[1-9][0-9]{{0,{5 - zeros}}}' for zeros in range(6))})"


def reals(low: int, above: bool, high: int | None, below: bool) -> list[str]:
    """As `integers`, for numbers with fractions."""
    if high is not None and low >= high:
        return [f"{low}{_ZEROS}"] if low == high and not (above or below) else []
    patterns = [f"{low}{_MORE if above else _FRACTION}"]
    between = _naturals(low + 1, None if high is None else high - 1)
    patterns += [pattern + _FRACTION for pattern in between]
    if high is not None and not below:
        patterns.append(f"{high}{_ZEROS}")
    return patterns
