"""What is wrong with adapters, said in another process."""

import pickle

from spectr_demo.experts.messages import AdapterError


def test_an_error_of_adapters_is_the_same_in_another_process() -> None:
    error = AdapterError(["expert 'red': no weights", "expert 'blue': no weights"])
    other = pickle.loads(pickle.dumps(error))
    assert str(other) == str(error)
    assert other.problems == error.problems
