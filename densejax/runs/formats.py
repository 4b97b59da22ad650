"""The one place that formats numbers for people."""

count = "{:,}".format  # 769162 -> '769,162'


def percent(fraction):
    """0.9512 -> '95.12 %'."""
    return f"{100 * fraction:.2f} %"


def si(number):
    """287.9e6 -> '287.9M': four significant digits."""
    number = float(f"{number:.4g}")
    power = min((len(f"{abs(number):.0f}") - 1) // 3, 4)
    return f"{number / 1000**power:g}{'kMGT'[power - 1 : power]}"


def duration(seconds):
    """4980 -> '1 h 23 min', 185 -> '3 min 05 s', 12.3 -> '12.3 s'."""
    units = ((86400, 3600, "{} d {:02} h"), (3600, 60, "{} h {:02} min"), (60, 1, "{} min {:02} s"))
    for size, part, form in units:
        if round(seconds) >= size:
            return form.format(round(seconds) // size, round(seconds) % size // part)
    return f"{seconds:.1f} s"


def table(rows, right=0):
    """Rows of strings -> lines of aligned columns, the last `right` of them at their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * (len(widths) - right) + [str.rjust] * right
    return "\n".join(
        "  ".join(side(*cell) for side, *cell in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    )
