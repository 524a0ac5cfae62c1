#!/usr/bin/env python3
"""Stands in for gcloud: runs what is sent to a TPU's hosts in local shells, and keeps a record."""

import json
import os
import subprocess
import sys


def option(arguments, name):
    return next((a.split("=", 1)[1] for a in arguments if a.startswith(f"--{name}=")), None)


arguments = sys.argv[1:]
with open(os.environ["FAKE_GCLOUD_RECORD"], "a") as record:
    record.write(json.dumps(arguments) + "\n")
if arguments[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
    command = option(arguments, "command")
    children = [
        subprocess.Popen(["bash", "-c", command], env=os.environ | {"TPU_WORKER_ID": str(host)})
        for host in range(2)
    ]
    sys.exit(max(child.wait() for child in children))
