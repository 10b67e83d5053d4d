"""A real SLURM on one machine, for tests: munge, slurmctld and N slurmd, without systemd, containers or another computer.

With namespaces (root), each node has its own address, host name, process tree, /tmp and /dev/shm, so it can lose its power or its network.
Without, the nodes are N slurmd on N ports of the loopback. Everything lies in one state folder; `down` leaves nothing behind.
"""
