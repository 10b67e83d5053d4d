#!/bin/bash
# Process 1 of one node: NAME STATE [FOLDER...]. Killing it is a power loss, since its process namespace dies with it.
# The node has a /tmp of its own, in which only the FOLDERs (software that lies under /tmp) stay where they are.
name=$1 state=$2 tmp=$2/tmp/$1
hostname "$name"
mount --bind "$state/hosts" /etc/hosts
for folder in "${@:3}"; do
  mkdir -p "$tmp/${folder#/tmp/}"
  mount --bind "$folder" "$tmp/${folder#/tmp/}"
done
mount --rbind "$tmp" /tmp
mount -t tmpfs tmpfs /dev/shm
slurmd -D -f "$state/slurm.conf" -N "$name" &
while :; do wait -n || sleep 0.2; done # orphans are reaped; a node whose slurmd died stays on
