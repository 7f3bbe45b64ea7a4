"""Is a circuit enough, and is it needed?"""
