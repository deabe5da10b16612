"""Sizes as people read them."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """'512 KiB', '2.30 GiB', '1,023 B': in binary units, with two decimals where there is a fraction."""
    value, unit = float(count), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:,.0f} {_UNITS[unit]}" if value == int(value) else f"{value:,.2f} {_UNITS[unit]}"
