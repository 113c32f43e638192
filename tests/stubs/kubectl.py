"""Runs the pods of a JobSet one after the other in $CLOUD, as a kubelet would start them."""

import json
import os
import re
import subprocess
import sys

if "create" not in sys.argv:
    sys.exit()
job = json.load(sys.stdin)
variables = {"HOME": "/root", "PATH": "/bin"}


def expand(word: str) -> str:
    """`$$` is `$`; `$(NAME)` is the value of a variable, or stays where there is none."""

    def value(found):
        if found[0] == "$$":
            return "$"
        return variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, word)


for slices in job["spec"]["replicatedJobs"]:
    spec = slices["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    for _ in range(slices["replicas"] * spec["completions"]):
        words = [expand(word) for word in container["command"]]
        subprocess.run(words, cwd=os.environ["CLOUD"], check=True)
