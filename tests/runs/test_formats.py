"""Numbers as people read them."""

from densejax.runs.formats import count, duration, percent, si, table


def test_numbers():
    assert percent(0.9512) == "95.12 %" and percent(1.0) == "100.00 %"
    assert count(769162) == "769,162"
    assert [si(number) for number in (0, 0.5, 999, 999.99, 769162, 999_960, 287.9e6, 4e12)] == [
        *("0", "0.5", "999", "1k", "769.2k", "1M", "287.9M", "4T")
    ]
    assert [duration(seconds) for seconds in (0.04, 12.34, 59.97, 185, 3599.9, 3725, 93600)] == [
        *("0.0 s", "12.3 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "1 h 02 min", "1 d 02 h")
    ]
    assert table([("model", "densenet"), ("parameters", "769,162")]) == (
        "model       densenet\nparameters  769,162"
    )
