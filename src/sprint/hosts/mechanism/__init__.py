"""What happens between a host's own blocks: while its `forward` runs, its lists yield bound blocks that take a route.

`route` captures, drops, restores and fuses; `bound` is what a list yields; `wrapped` the classes that a wrapped model gets.
"""
