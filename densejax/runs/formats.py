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


def clock(seconds):
    """3725.4 -> '1:02:05': hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def plural(number, noun):
    """1, 'epoch' -> '1 epoch'; 30 -> '30 epochs'; 0.6 -> '0.6 epochs'."""
    return f"{number:,}".removesuffix(".0") + f" {noun}{'s' * (number != 1)}"


def table(rows, right=0):
    """Rows of strings -> lines of aligned columns; the last `right` columns are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * (len(widths) - right) + [str.rjust] * right
    return "\n".join(
        "  ".join(side(*cell) for side, *cell in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    )
