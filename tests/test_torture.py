"""A few tries of most attacks in torture.py; make torture makes them all."""


def test_nothing_is_lost(few_attacks):
    output, _ = few_attacks.communicate(timeout=300)
    assert few_attacks.returncode == 0, output
