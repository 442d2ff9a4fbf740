"""Statistics under torch.nn.parallel.DistributedDataParallel: those of one process that sees the examples of all ranks.

    ddp = DDP(model)
    stats = gradstats.attach(ddp)                # or attach(model) before DDP(model)

There is nothing else to call: the first forward inside of DDP tells. DDP averages the gradients of W ranks, so that
what is backpropagated is

    L = (1/W) sum_r L_r          c_b = (1/W) dL_r/dtheta_b for the examples b of rank r          B = sum_r B_r

and every statistic is that of one process that backpropagates L over all B examples. For L to be the mean over these,
L_r is the mean over rank r's if all ranks have as many, and W B_r/B times that else; for their sum, W times the sum
over rank r's; for a mean over tokens, W/T times the sum over rank r's, T the tokens of all ranks.

Raw sums go with the gradients, in the all-reduce of DDP's own buckets (exchange.py). Reading never communicates, so
that one rank alone may read.

For parameters that ranks share out among them (fully_shard, FSDP2) see sharded.py: the same loss and the same B, and
sums go where FSDP puts the gradients.
"""
