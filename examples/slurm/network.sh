# Settings of the network between the nodes, which train.sbatch and tool.sbatch source; docs/clusters.md has the details.
# What is set already stays. Change the lines marked `yours` if tools/preflight.py finds all-reduces slow.

# A line for each fault, and NCCL's version. INFO says which network was chosen ("NET/IB" or "NET/Socket"); it is long.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# InfiniBand and RoCE: a link may be gone for two minutes (22, times 7 retries) instead of 30 s (20, the default) before
# NCCL gives up. The watchdog (parallel.timeout_seconds) waits longer, so that the message of NCCL comes first.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
# The interface over which the processes find each other. NCCL prefers ib*, then takes any other; gloo takes that of the
# host's name, which may be 127.0.1.1. Name it where nodes have several, or where processes wait for each other at the
# start. An = before the name means exactly this one.
# export NCCL_SOCKET_IFNAME==ib0 GLOO_SOCKET_IFNAME=ib0  # yours
# The adapters for tensors, one for each GPU. Name them where some belong to the storage or to another network.
# export NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7  # yours
