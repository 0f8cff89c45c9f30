"""How well routing works: tasks with held-out examples, scores without a judge, the comparison of
routers, and its report.
"""
