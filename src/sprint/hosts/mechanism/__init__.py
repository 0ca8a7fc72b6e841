"""What happens between a host's own blocks: while its `forward` runs, its lists yield bound blocks that take a route.

`route` captures, drops, restores and fuses; `bound` is what a list yields; `wrapped` the classes that a wrapped model gets;
`state` what `wrap` adds, and `paths` chooses there. `places` says where a model keeps its blocks and these their arguments;
`keep` draws the kept tokens on their grid; `tables` gathers side inputs, out of `holders` of any kind and, without a batch,
into `rows`; `sides` refuses those that nobody declared. `guided` runs both branches of guidance in one batch, `recompute`
pays the gradients of reentrant checkpoints, and `masked` is the oracle of `check`.
"""
