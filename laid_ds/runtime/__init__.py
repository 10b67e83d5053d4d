"""What a run stands on: processes, environment, DeepSpeed's engines, checkpoints, stopping."""
