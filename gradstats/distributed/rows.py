"""Sums with an entry for every example, and those of a batch as a whole, over the examples of all ranks.

Examples are in the order of the ranks. All parameters' sums go in one collective at the end of the backward pass, since
what one layer has of them is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from gradstats.account import Account
from gradstats.distributed.account import ShardedAccount
from gradstats.distributed.sharded import Shards, Sizes
from gradstats.sums import SUMS


def join_rows(shards: Shards, accounts: Sequence[Account], sizes: Mapping[int, Sizes]) -> None:
    """What the backward pass that ends has gathered of its rank's examples becomes that of all examples."""
    ours = [account for account in accounts if isinstance(account, ShardedAccount)]
    found = [(account.steps[kind], SUMS[kind], g) for account in ours for kind, g in account.own]
    if not found:
        return
    # Entries of one tensor from every rank.
    widths = [
        [prod(raw.trailing) * (n if raw.per == "example" else 1) for n in sizes[g].of_ranks] for _, raw, g in found
    ]
    own = torch.cat([steps[g].flatten() for steps, _, g in found])
    ranks = shards.concatenated(own, [sum(of_rank) for of_rank in zip(*widths, strict=True)])
    parts = [row.split(list(of_rank)) for row, of_rank in zip(ranks, zip(*widths, strict=True), strict=True)]
    for (steps, raw, g), of_ranks in zip(found, zip(*parts, strict=True), strict=True):
        shape = (-1, *raw.trailing) if raw.per == "example" else raw.trailing
        tensors = [part.view(shape).to(steps[g].dtype) for part in of_ranks]
        steps[g] = raw.joined(tensors)
    for account in ours:
        account.own.clear()
