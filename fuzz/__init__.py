"""
Whatever bytes a stranger sends: facts, or the one error that is promised. Run by `make fuzz`.
"""
