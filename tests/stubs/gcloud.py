"""A cloud of folders: one per node in $CLOUD/nodes, and in it one per worker, which is its home."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
WORKERS = 2

words = sys.argv[1:]
with open(CLOUD / "calls", "a", encoding="utf-8") as calls:
    calls.write(" ".join(word for word in words[:5] if not word.startswith("--")) + "\n")
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
what, name = words[2:4], words[4] if len(words) > 4 else ""
state = CLOUD / "state"

if words[:2] != ["compute", "tpus"]:
    pass  # `services enable`, `storage buckets create`, ...: only noted.
elif what == ["queued-resources", "create"]:
    count, prefix = int(flags.get("node-count", 0)), flags.get("node-prefix")
    for node in [f"{prefix}-{i}" for i in range(count)] or [flags["node-id"]]:
        for worker in range(WORKERS):
            (CLOUD / "nodes" / node / str(worker)).mkdir(parents=True)
    state.write_text("ACTIVE")
elif what == ["queued-resources", "describe"]:
    if not state.exists():
        sys.exit("NOT_FOUND")
    print(state.read_text())
elif what == ["queued-resources", "delete"]:
    shutil.rmtree(CLOUD / "nodes")
    state.unlink()
elif what[0] == "tpu-vm":
    node = CLOUD / "nodes" / name.rstrip(":")
    if what[1] == "scp":
        node = CLOUD / "nodes" / words[5].rstrip(":")
    chosen = sorted(node.iterdir()) if flags["worker"] == "all" else [node / flags["worker"]]
    result = 0
    for home in chosen:
        if what[1] == "scp":
            shutil.copy(name, home)
            continue
        # gcloud splits the command at spaces, ssh joins it, and the login shell there reads it.
        command = " ".join(flags["command"].split(" "))
        environment = {"HOME": str(home), "PATH": os.environ["WORKER_PATH"]}
        done = subprocess.run(["bash", "-c", command], cwd=home, env=environment)
        result = result or done.returncode
    sys.exit(result)
else:
    sys.exit(f"no such command: {words}")
