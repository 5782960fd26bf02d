"""Processes that the agent starts: the training process and the bench, their owner, and what confines them.

What runs in a child loads numpy and torch; what the supervisor imports from here (`trainer`, `messages`)
never does.
"""
