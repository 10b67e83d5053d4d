"""What a run takes of each GPU, how long it lasts and what to change: from configs and the index of its shards, without a GPU."""
