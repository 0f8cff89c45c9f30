"""Speed on a CPU: compiled products and loops, attention, the KV cache, threads, memory pages.

Arrays in, arrays out: nothing here knows of experts, routers or plans.
"""
