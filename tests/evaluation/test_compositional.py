"""Pairs of requests of two domains."""

from spectr_demo.evaluation.compositional import make_pairs


def test_pairs_are_of_two_domains_and_use_other_examples_than_the_single_requests() -> None:
    held = {name: [object() for _ in range(100)] for name in "abc"}
    pairs = make_pairs(held, 12)  # type: ignore[arg-type]
    assert all(pair.names[0] != pair.names[1] for pair in pairs)
    assert {pair.names[0] for pair in pairs} == {pair.names[1] for pair in pairs} == set("abc")
    used = {id(example) for pair in pairs for example in pair.examples}
    assert len(used) == 24
    assert not used & {id(example) for row in held.values() for example in row[:32]}
