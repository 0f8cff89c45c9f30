"""The method: align, score, select, compose. Also the table of routers, the stacked factors,
calibration, and evidence over a text.
"""
