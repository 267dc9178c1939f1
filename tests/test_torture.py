"""A few tries of most attacks in torture.py; make torture makes them all."""


def test_nothing_is_lost(beside):
    output, _ = beside["attacks"].communicate(timeout=300)
    assert beside["attacks"].returncode == 0, output
