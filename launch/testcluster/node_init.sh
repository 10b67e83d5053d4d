#!/bin/bash
# Process 1 of one node: NAME STATE. Killing it is a power loss, since its process namespace dies with it.
name=$1 state=$2
hostname "$name"
mount --bind "$state/hosts" /etc/hosts
mount --bind "$state/tmp/$name" /tmp
mount -t tmpfs tmpfs /dev/shm
slurmd -D -f "$state/slurm.conf" -N "$name" &
while :; do wait -n || sleep 0.2; done # orphans are reaped; a node whose slurmd died stays on
