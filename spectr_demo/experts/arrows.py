"""The experts' arrows in 8 bits, which LAG's filter reads on a CPU, kept as long as their bank."""

from weakref import WeakKeyDictionary

from spectr_demo.cpu.filter import Arrows
from spectr_demo.routing.bank import ExpertBank

_arrows: WeakKeyDictionary[ExpertBank, Arrows] = WeakKeyDictionary()


def arrows_of(bank: ExpertBank) -> Arrows:
    """The first row of each A*, made when it is first asked for."""
    if bank not in _arrows:
        _arrows[bank] = Arrows.of(bank.A[:: bank.singular_values.shape[-1]])
    return _arrows[bank]


def keep_arrows(bank: ExpertBank, arrows: Arrows) -> None:
    """Use these, which were made of the bank's factors before."""
    _arrows[bank] = arrows
