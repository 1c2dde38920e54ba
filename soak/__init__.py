"""
Does it stay as it is: many processes, and memory, descriptors and cost after them as before. Run by `make soak`.
"""
