"""Prints the JobSet of a run on TPUs of a GKE cluster as one line of JSON: see gke.sh.

python3 launch/jobset.py --name N --image I --tpu v5p:4x4x8 -- COMMAND...
"""

import argparse
import json
import math
import sys

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}


def workers_and_chips(kind: str, topology: str) -> tuple[int, int]:
    """Machines of a slice, and chips of each: 4, but 8 where they are all of a flat slice."""
    chips = math.prod(map(int, topology.split("x")))
    flat = kind in ("v5e", "v6e")
    if chips <= (8 if flat else 4):
        return 1, chips
    return chips // 4, 4


def jobset(arguments: argparse.Namespace) -> dict:
    kind, _, topology = arguments.tpu.partition(":")
    workers, chips = workers_and_chips(kind, topology)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[kind],
        "cloud.google.com/gke-tpu-topology": topology,
    }
    if arguments.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "train",
        "image": arguments.image,
        # Kubernetes makes $$ one $, and $(NAME) the value of a variable.
        "command": [word.replace("$", "$$") for word in arguments.command],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": chips}},
    }
    pod = {
        "restartPolicy": "Never",
        # Time to save after SIGTERM, as `stacking-jax train` does.
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": selector,
        "containers": [container],
    }
    if arguments.service_account:
        pod["serviceAccountName"] = arguments.service_account
    job = {
        "parallelism": workers,
        "completions": workers,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # Code 2 is for the user to put right: trying again would not help.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]},
                }
            ]
        },
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": arguments.name,
            # All workers of a slice in one node pool, and no two slices in the same.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": arguments.limit,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": arguments.slices, "template": {"spec": job}}
            ],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--name", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--tpu", required=True)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--service_account")
    parser.add_argument("--limit", type=int, default=100)
    own = sys.argv[1 : sys.argv.index("--")]
    arguments = parser.parse_args(own)
    arguments.command = sys.argv[len(own) + 2 :]
    kind, _, topology = arguments.tpu.partition(":")
    dimensions = topology.split("x")
    flat = kind in ("v5e", "v6e")
    if kind not in ACCELERATORS or not all(size.isdecimal() for size in dimensions) or (
        len(dimensions) != (2 if flat else 3)
    ):
        sys.exit(f"error: --tpu {arguments.tpu}: write v4:2x2x2, v5e:4x4, v5p:4x4x8 or v6e:16x16")
    print(json.dumps(jobset(arguments), separators=(",", ":")))


if __name__ == "__main__":
    main()
