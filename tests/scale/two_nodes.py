"""`python tests/scale/two_nodes.py NODES`: a Ray cluster of so many nodes of one processor each, on 127.0.0.1.

It prints its address. A line "kill N" on stdin kills the node N, as a power cut would; the end of stdin ends the cluster.
"""

import logging
import os
import sys

os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import ray  # noqa: F401 - with this environment
from ray.cluster_utils import Cluster

logging.disable(logging.CRITICAL)
small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=small["object_store_memory"], memory=2 * 10**9) for _ in range(int(sys.argv[1]))]
cluster.wait_for_nodes()
print(cluster.address, flush=True)  # noqa: T201
for line in sys.stdin:
    cluster.remove_node(nodes[int(line.split()[1])], allow_graceful=False)
    print("killed", flush=True)  # noqa: T201
cluster.shutdown()
