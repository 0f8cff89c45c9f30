"""What one run did, as plain arrays. No torch.

`column` is the routing of one column, `record` is the run's columns together, `statistics` are
shares and dominant experts, `file` is the .npz.
"""

from spectr_demo.trace.column import NOT_ROUTED, PARTS, Candidates, ColumnTrace, Part, Reading
from spectr_demo.trace.record import RoutingTrace, mean_logprob
from spectr_demo.trace.statistics import TIE_MARGIN, BestScores, DominantExperts

__all__ = [
    "NOT_ROUTED",
    "PARTS",
    "TIE_MARGIN",
    "BestScores",
    "Candidates",
    "ColumnTrace",
    "DominantExperts",
    "Part",
    "Reading",
    "RoutingTrace",
    "mean_logprob",
]
