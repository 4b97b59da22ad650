"""Numbers as people read them."""

from densejax.runs.formats import clock, count, percent, plural, si, table


def test_numbers():
    assert percent(0.9512) == "95.12 %" and percent(1.0) == "100.00 %"
    assert count(769162) == "769,162"
    assert [si(number) for number in (0, 0.5, 999, 999.99, 769162, 999_960, 287.9e6, 4e12)] == [
        *("0", "0.5", "999", "1k", "769.2k", "1M", "287.9M", "4T")
    ]
    assert [clock(seconds) for seconds in (0.04, 59.97, 185, 3725.4, 93600)] == [
        *("0:00:00", "0:01:00", "0:03:05", "1:02:05", "26:00:00")
    ]
    assert [plural(number, "epoch") for number in (1, 2, 1500, 0.6, 2.0)] == [
        *("1 epoch", "2 epochs", "1,500 epochs", "0.6 epochs", "2 epochs")
    ]
    assert table([("model", "densenet"), ("parameters", "769,162")]) == (
        "model       densenet\nparameters  769,162"
    )
