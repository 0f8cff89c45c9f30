"""The method: align, score, select, compose; the table of routers; what they compute with."""
