"""What one run did, as plain arrays: the record, its statistics, its file. No torch."""

from spectr_demo.trace.record import (
    NOT_ROUTED,
    PARTS,
    ColumnTrace,
    Part,
    RoutingTrace,
    mean_logprob,
)

__all__ = ["NOT_ROUTED", "PARTS", "ColumnTrace", "Part", "RoutingTrace", "mean_logprob"]
